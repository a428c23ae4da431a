"""FAVDBench's files of your own clips: `python -m tasks.favdbench FOLDER CSV --out OUT`.

FOLDER holds videos, CSV has the columns split, caption, and path (below FOLDER) or id (videos/SPLIT/ID.mp4, SPLIT/ID.mp4 or
ID.mp4). OUT becomes the original's datasets/: metadata/, frame_tsv/ and audio_hdf/, all rows of a split in the order of the ids,
and can be trained on by the original, or here as a source of format favd. Frames stand at equal distances from the first to the
last, the sound is mono. A run that was killed goes on where it stopped when it is started again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from models.family import InputError
from tasks import command, storage
from tasks.data import audio, clip_files, sound_files, video, workers
from tasks.data.audio_store import AudioShard, audio_writer, coded_writer
from tasks.data.clip_files import ClipError
from tasks.data.frame_store import FrameShard, write_frames
from tasks.datasets import favd, favd_files

PIECE = 32  # clips that are kept together, so that a killed run goes on from there
PARTS = {"metadata", "frame_tsv", "audio_hdf"}
SHOWN = 20  # broken clips


@dataclass(frozen=True)
class Build:
    """How the clips are prepared."""

    frames: int  # of each clip
    size: int  # pixels of the shorter side; 0 keeps it
    quality: int  # of the JPEGs, 1 to 100
    sample_rate: int  # Hz

    @property
    def preparation(self) -> video.Preparation:
        """The same for the decoder."""
        return video.Preparation(self.frames, self.size, self.quality, self.sample_rate)


def build(source: Path, captions: Path, out: Path, settings: Build, num_workers: int) -> str:
    """Write `out` from the clips that `captions` lists, all or nothing; returns the closing line."""
    if min(settings.frames, settings.sample_rate, num_workers) < 1 or settings.size < 0:
        raise InputError("frames, sample-rate and workers must be 1 or more, size 0 or more pixels")
    if not 1 <= settings.quality <= 100:
        raise InputError(f"quality is {settings.quality}; it goes from 1 to 100")
    check_target(out)
    table = read_clips(source, captions)
    files = [file for path in table["path"] for file in clip_files.files_of(source / path)]
    work = storage.WORK / f"favdbench-{_identity(source, table, files, settings)}"
    with storage.locked(work):
        jobs = [
            (source, part.to_dict("records"), work / f"{split}-{first:06d}", settings)
            for split, rows in table.groupby("split", sort=False)
            for first in range(0, len(rows), PIECE)
            for part in [rows.iloc[first : first + PIECE]]
        ]
        problems = [
            problem for part in workers.work(decode_piece, jobs, num_workers, len(table), "clips") for problem in part
        ]
        if problems:
            for name, problem in problems[:SHOWN]:
                command.say(f"  {name}: {problem}")
            raise InputError(
                f"{len(problems)} of {len(table)} clips cannot be used, first {problems[0][0]}: {problems[0][1]}; "
                f"mend them, or take their rows out of {captions}; nothing was written"
            )
        made = work / "made"
        shutil.rmtree(made, ignore_errors=True)
        for split, rows in table.groupby("split", sort=False):
            pieces = [piece for _, _, piece, _ in jobs if piece.name.startswith(f"{split}-")]
            write_split(made, str(split), rows.to_dict("records"), pieces, settings)
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        storage.install_folder(made, out)
        shutil.rmtree(work)
    counts = ", ".join(f"{(table['split'] == split).sum()} {split}" for split in favd.SPLITS)
    return (
        f"{out}: {len(table)} clips ({counts}), {settings.frames} frames each, sound of {settings.sample_rate} Hz as mp3, "
        f"{size / 1e6:.1f} MB; train on it by download's source {out} and format favd"
    )


def check_target(out: Path) -> None:
    """InputError where something lies at `out` that is no earlier build, and would be lost."""
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - PARTS):
        raise InputError(f"{out} exists and holds more than {', '.join(sorted(PARTS))}; name a new folder")


def read_clips(source: Path, captions: Path) -> pd.DataFrame:
    """The clips of the CSV, by split and id. InputError for a row that lacks its file or its caption, or comes twice."""
    if not source.is_dir():
        raise InputError(f"{source} is no folder; name the one that holds the videos")
    clips: dict[str, dict[str, Any]] = {}
    for where, clip in favd.read_csv(captions, source):
        name = str(clip["id"])
        if name in clips:
            raise InputError(f"{where}: clip {name} is listed twice; keep one of its rows")
        if not clip_files.is_there(source / str(clip["path"])):
            raise InputError(f"{where}: {source / str(clip['path'])} not found; bring the file or delete the row")
        if not all(favd.captions(str(clip["annotation"]))):
            raise InputError(f"{where}: the caption is empty; write what is to be seen and heard, or delete the row")
        clips[name] = clip
    if not clips:
        raise InputError(f"{captions} lists no clip")
    table = pd.DataFrame(clips.values(), columns=favd.COLUMNS)
    order = table["split"].map(favd.SPLITS.index)
    return table.assign(order=order).sort_values(["order", "id"], kind="stable").drop(columns="order")


def _identity(source: Path, table: pd.DataFrame, files: list[Path], settings: Build) -> str:
    """Of everything that decides what is made."""
    modules = (video, audio, sound_files, clip_files)
    state = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    code = [storage.file_digest(Path(str(module.__file__))) for module in modules]
    values = [str(source.resolve()), table["path"].tolist(), state, asdict(settings), code]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


# --- pictures and sound ----------------------------------------------------------------------------------------------------


def decode_piece(source: Path, clips: list[dict[str, Any]], piece: Path, settings: Build) -> list[tuple[str, str]]:
    """Decode some clips into piece.tsv and piece.h5, unless they are there; id and fault of those that cannot be used."""
    frames, sounds = piece.with_suffix(".tsv"), piece.with_suffix(".h5")
    if frames.is_file() and sounds.is_file():
        for _ in clips:
            workers.advance()
        return []
    problems: list[tuple[str, str]] = []

    def decoded(add_sound: Any) -> Iterator[tuple[str, int, int, list[bytes]]]:
        for clip in clips:
            try:
                stored = video.read_clip(source / clip["path"], settings.preparation)
                if stored.wave is None:
                    raise ClipError(
                        "no audio", "there is no sound track; put its mp3 into audio_mp3/SPLIT beside videos/"
                    )
                add_sound(clip["id"], stored.wave)
                yield clip["id"], stored.width, stored.height, stored.jpegs
            except ClipError as error:
                problems.append((clip["path"], str(error)))
            workers.advance()

    with audio_writer(sounds, settings.sample_rate, "mp3") as add_sound:
        write_frames(frames, decoded(add_sound))
        if problems:  # before the sounds take their name, by which the piece would count as done
            frames.unlink()
    return problems


def write_split(folder: Path, split: str, clips: Sequence[dict[Any, Any]], pieces: list[Path], settings: Build) -> None:
    """A split's files in the original's places, put together from its pieces."""
    keys = {str(clip["id"]): f"datasets/videos/{split}/{clip['id']}.mp4" for clip in clips}
    told = [(keys[clip["id"]], [{"caption": text} for text in favd.captions(clip["annotation"])]) for clip in clips]
    favd_files.write_split(folder / "metadata", split, told)
    kind = f"{split}_{settings.frames}frames"
    img, sound = f"frame_tsv/{kind}.img.tsv", f"audio_hdf/{split}_mp3.hdf"
    favd_files.write_yaml(folder / f"metadata/{kind}.yaml", split, img, sound)
    write_frames(folder / img, _rows(pieces, keys))
    with coded_writer(folder / sound, settings.sample_rate, "mp3") as add:
        for piece in pieces:
            shard = AudioShard(piece.with_suffix(".h5"))
            for number, name in enumerate(shard.names()):
                add(name, shard.stored(number)[0])


def _rows(pieces: list[Path], keys: dict[str, str]) -> Iterator[tuple[str, int, int, list[bytes]]]:
    for piece in pieces:
        shard = FrameShard(piece.with_suffix(".tsv"))
        for number in range(len(shard)):
            width, height = shard.size(number)
            yield keys[shard.key(number)], width, height, shard.jpegs(number, range(shard.num_frames(number)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the videos")
    parser.add_argument("csv", type=Path, help="columns split, caption, and path or id")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to make; an earlier one of this command is replaced"
    )
    parser.add_argument("--frames", type=int, default=32, help="of each clip")
    parser.add_argument("--size", type=int, default=256, help="pixels of the shorter side, 0 keeps it")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs, 1 to 100")
    parser.add_argument("--sample-rate", type=int, default=32000, help="Hz of the sound")
    parser.add_argument("--workers", type=int, default=2, help="clips decoded at once")
    given = parser.parse_args()
    settings = Build(given.frames, given.size, given.quality, given.sample_rate)
    command.say(build(given.folder, given.csv, given.out, settings, given.workers))


if __name__ == "__main__":
    command.run(main)
