"""Segments of YouTube's videos, cut out by the program yt-dlp: an optional source for formats whose clips name their video."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from models.family import InputError
from tasks import command, sources, storage
from tasks.data import clip_files
from tasks.datasets.demo import ffmpeg_binary

CLIPS = Path(".duet/youtube")  # kept for good: what is online today may be gone tomorrow
JOURNAL = "journal.tsv"  # clip, done or dead, reason
ID = re.compile(r"[A-Za-z0-9_-]{11}")
# What says nothing about the video itself: the network, the site's limits, this machine.
PASSING = re.compile(
    r"HTTP Error (403|429|5\d\d)|timed out|try again later|not a bot|rate.?limit|resol|network|connect|ffmpeg|no space|proxy",
    re.IGNORECASE,
)
IN_A_ROW = 10  # passing failures after which it is no use going on
TIMEOUT = 900  # seconds for a clip


@dataclass(frozen=True)
class YouTube:
    """Section `download.<dataset>.youtube` of params.yaml."""

    annotations: str  # folder as `format` reads it; clips that lie there already are not fetched
    height: int  # pixels: of a video's versions the largest that is not taller
    workers: int  # clips fetched at once
    retry_dead: bool  # whether to try again what an earlier run found to be gone


@dataclass(frozen=True)
class Segment:
    """A clip's place in a video, in seconds."""

    video: str
    start: float
    end: float

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.video}_{round(1000 * self.start)}_{round(1000 * self.end)}.mp4"


def bring(
    settings: YouTube, table: pd.DataFrame, segment: Callable[[str, float], tuple[str, float, float] | None], raw: Path
) -> None:
    """Fetch the clips of `table` that are not in `raw`; `segment` tells the place of one by its id and start.

    A clip that is gone is noted with the reason and left out. InputError where clips failed for a reason that may pass.
    """
    if min(settings.height, settings.workers) < 1:
        raise InputError("params.yaml: youtube.height and youtube.workers must be 1 or more")
    program = shutil.which("yt-dlp")
    if program is None:
        raise InputError(
            "source is youtube, but there is no program yt-dlp; install it with pip install 'duet-av[youtube]'"
        )
    wanted: dict[Path, Segment] = {}
    for clip, start, path in zip(table["id"], table["start"], table["path"], strict=True):
        if not clip_files.is_there(raw / path):
            wanted[storage.inside(raw, path, settings.annotations)] = _checked(clip, segment(clip, start))
    folder = CLIPS / f"{settings.height}p"
    with storage.locked(folder):
        _fetch_all(Path(program).absolute(), list(dict.fromkeys(wanted.values())), folder, settings)
        for path, one in wanted.items():
            if (folder / one.name).is_file():
                storage.link_or_copy(folder / one.name, path)


def _checked(clip: str, told: tuple[str, float, float] | None) -> Segment:
    """An id that could be taken for an option, a path or another address never comes near a command line."""
    if told is None or not ID.fullmatch(told[0]) or not 0 <= told[1] < told[2] < 1e6:
        raise InputError(
            f"clip {clip}: it names no YouTube id of 11 characters and seconds of it; mend or delete its row"
        )
    return Segment(*told)


def _fetch_all(program: Path, segments: list[Segment], folder: Path, settings: YouTube) -> None:
    journal = folder / JOURNAL
    lines = [line.split("\t") for line in journal.read_text().splitlines()] if journal.exists() else []
    dead = {line[0] for line in lines if line[1:2] == ["dead"]} if not settings.retry_dead else set[str]()
    waiting = [one for one in segments if one.name not in dead and not (folder / one.name).is_file()]
    gone, failed, in_a_row, why = 0, 0, 0, ""
    with (
        journal.open("a", encoding="utf-8") as handle,
        ThreadPoolExecutor(settings.workers) as pool,
        tqdm(total=len(waiting), desc="youtube", unit="clip") as bar,
    ):
        arguments = ((program, one, folder, settings.height) for one in waiting)
        for one, (state, reason) in zip(waiting, sources.ahead(pool, _fetch, arguments), strict=True):
            bar.update()
            if state == "failed":
                failed, in_a_row, why = failed + 1, in_a_row + 1, f"{one.video}: {reason}"
                if in_a_row == IN_A_ROW:
                    break
                continue
            in_a_row, gone = 0, gone + (state == "dead")
            handle.write(f"{one.name}\t{state}\t{reason}\n")
            handle.flush()
    there = sum((folder / one.name).is_file() for one in segments)
    command.say(f"youtube: {there} of {len(segments)} clips there, {gone} found dead now; see {journal}")
    if failed:
        raise InputError(f"youtube: {failed} clips failed, and may not next time ({why}); run again to go on")


def _fetch(program: Path, segment: Segment, folder: Path, height: int) -> tuple[str, str]:
    """Cut a clip out of its video; "done", "dead" (for good) or "failed" (for now), and the reason."""
    with _workplace(folder / segment.name) as place:
        arguments = [
            "--ignore-config", "--no-playlist", "--quiet", "--no-warnings", "--no-progress", "--no-mtime", "--no-cache-dir",
            "--socket-timeout", "30", "--retries", "3",
            "--format-sort", f"res:{height},vcodec:h264,acodec:aac",
            "--download-sections", f"*{segment.start:.3f}-{segment.end:.3f}", "--force-keyframes-at-cuts",
            "--merge-output-format", "mp4", "--remux-video", "mp4", "--ffmpeg-location", ffmpeg_binary(),
            "--output", "clip.%(ext)s", "--", f"https://www.youtube.com/watch?v={segment.video}",
        ]  # fmt: skip
        try:
            ended = subprocess.run(
                [program, *arguments], cwd=place, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return "failed", f"timed out after {TIMEOUT} s"
        made = place / "clip.mp4"
        if ended.returncode == 0 and made.is_file() and made.stat().st_size:
            with made.open("rb") as handle:
                os.fsync(handle.fileno())
            made.replace(folder / segment.name)
            return "done", ""
    said = [" ".join(line.split()) for line in ended.stderr.decode(errors="replace").splitlines()]
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR:")]
    if ended.returncode == 0:
        return "dead", "yt-dlp made no file of it"
    if not errors or PASSING.search(errors[-1]):
        return "failed", errors[-1] if errors else f"yt-dlp ended with {ended.returncode}"
    return "dead", errors[-1]


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """A folder beside `target` that is gone afterwards; storage.locked removes those of killed runs."""
    place = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
