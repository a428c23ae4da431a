"""The demo datasets: real MP4 files of seeded scenes, a few of them broken for `clean` to find.

Each kind is a module of this folder: what its clips show and how they are annotated stands there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import ffmpeg
import imageio_ffmpeg
import numpy as np
import pandas as pd
from tqdm import tqdm

from models.family import InputError
from tasks import storage
from tasks.datasets import Format
from tasks.datasets.scenes import FPS, SAMPLE_RATE

FAULTS = ("cut short", "index lost", "empty", "no audio", "missing", "duplicate", "still and silent")


@dataclass(frozen=True)
class Demo:
    """Section `download.<dataset>.demo` of params.yaml."""

    kind: Literal["sounds", "animals", "actions", "tags", "descriptions"]  # module of tasks/datasets
    seed: int
    clips: int  # good ones
    seconds: float  # length of a clip
    workers: int  # clips rendered at once


@dataclass(frozen=True)
class Clip:
    """One clip of a demo dataset and how its file comes to be."""

    index: int  # seeds the scene
    shows: Any  # what the kind's `render` draws: a class, or whatever it needs
    row: Mapping[str, Any]  # as the format's `read` gives it
    fault: str = ""  # of FAULTS


class Kind(Protocol):
    """What the module of a kind exports."""

    FORMAT: Format

    def plan(self, demo: Demo) -> list[Clip]:
        """The good clips, then one clip of each fault; InputError for a number of clips that cannot be."""
        ...

    def render(self, demo: Demo, clip: Clip) -> tuple[np.ndarray, np.ndarray | None]:
        """(T, H, W, 3) uint8 at FPS and (N,) float32 in [-1, 1] at SAMPLE_RATE; the same whenever it is called.

        None in the place of the sound: the clip has no sound track, and that is no fault.
        """
        ...


def build_demo(demo: Demo, folder: Path) -> int:
    """Fill `folder` with media and annotations; clips that an interrupted run left there stay. Returns their number."""
    if demo.seconds < 1 or demo.workers < 1:
        raise InputError("params.yaml: demo.seconds and demo.workers must be 1 or more")
    kind = cast(Kind, import_module(f"tasks.datasets.{demo.kind}"))
    clips = kind.plan(demo)
    missing = [clip for clip in clips if clip.fault != "missing" and not (folder / clip.row["path"]).exists()]
    # Threads do: numpy's work and the encoder's process both run outside the interpreter lock.
    with ThreadPoolExecutor(demo.workers) as pool:
        made = pool.map(lambda clip: _make_clip(kind, demo, clip, folder / clip.row["path"]), missing)
        for _ in tqdm(made, total=len(missing), desc="demo clips", unit="clip"):
            pass
    kind.FORMAT.write(pd.DataFrame([clip.row for clip in clips]), folder)
    return len(clips)


def _make_clip(kind: Kind, demo: Demo, clip: Clip, path: Path) -> None:
    """Render, encode, and break where the clip's fault says so."""
    frames, wave = kind.render(demo, clip)
    if clip.fault == "still and silent":
        frames, wave = np.repeat(frames[:1], len(frames), axis=0), None if wave is None else np.zeros_like(wave)
    with storage.atomic_file(path) as temporary:
        encode(frames, None if clip.fault == "no audio" else wave, temporary, index_first=clip.fault == "cut short")
        if clip.fault in ("cut short", "index lost", "empty"):
            os.truncate(temporary, 0 if clip.fault == "empty" else temporary.stat().st_size * 3 // 5)


def ffmpeg_binary() -> str:
    """The system's ffmpeg, or else the one that imageio_ffmpeg brings."""
    return shutil.which("ffmpeg") or imageio_ffmpeg.get_ffmpeg_exe()


def encode(frames: np.ndarray, wave: np.ndarray | None, path: Path, index_first: bool = False) -> None:
    """Write (T, H, W, 3) uint8 at FPS and (N,) float32 at SAMPLE_RATE as H.264 + AAC; same input, same bytes."""
    height, width = frames.shape[1:3]
    streams = [ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", r=FPS).video]
    with tempfile.NamedTemporaryFile(suffix=".f32") as sound:
        if wave is not None:
            sound.write(wave.tobytes())
            sound.flush()
            streams.append(ffmpeg.input(sound.name, format="f32le", ar=SAMPLE_RATE, ac=1).audio)
        settings = {
            "vcodec": "libx264", "preset": "ultrafast", "crf": 20, "pix_fmt": "yuv420p", "g": 12,
            "acodec": "aac", "aac_coder": "fast", "b:a": "48k", "threads": 1, "format": "mp4",
            "fflags": "+bitexact", "flags": "+bitexact", "map_metadata": -1,
        }  # fmt: skip
        if index_first:
            settings["movflags"] = "+faststart"
        command = ffmpeg.output(*streams, str(path), **settings).overwrite_output()
        try:
            command.run(cmd=ffmpeg_binary(), input=frames.tobytes(), capture_stdout=True, capture_stderr=True)
        except ffmpeg.Error as error:
            raise OSError(f"ffmpeg could not write {path}: {error.stderr.decode(errors='replace')[-500:]}") from error
