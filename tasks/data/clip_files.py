"""Which files make up a clip, what is known of them, what is wrong.

A clip is one video, with its sound in a file of its own where it has no track; or the two files that another system prepared
of it; or a folder of pictures, named by the first of them; or features of its frames that another system has made; or a row of
archives that hold many.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from tasks import storage

PICTURES, SOUNDS = "video_frames", "mel_spectrograms"
SUFFIX = ".pt"
PICTURE, FEATURES = ".jpg", ".npy"  # endings of the paths of clips that are a folder of pictures, and features
ROW = ".row"  # ending of ARCHIVE.tsv/ID.row, a clip that is a row of FAVDBench's frame archive
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv")
STILL_LEVELS = 8  # grey levels by which no point of a picture that never changes differs, compression included


class ClipError(Exception):
    """A clip cannot be used: `reason` is a short word for tables, `detail` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Probe:
    """What a media file says of itself, and whether it can be decoded from its first to its last frame."""

    duration: float  # seconds
    fps: float
    frames: int  # counted, not what the container claims
    width: int
    height: int
    has_audio: bool
    sample_rate: int  # Hz of the sound track, 0 without one
    silent: bool  # root mean square below -60 dB of full scale
    still: bool  # five frames from first to last look the same


def suffix_of(path: str | Path) -> str:
    """A path's ending with its dot; one that is a Path already is not taken apart anew, for there may be many."""
    return path.suffix if isinstance(path, Path) else Path(path).suffix


def is_prepared(path: str | Path) -> bool:
    """Whether a clip's path names such a clip: its pictures."""
    return suffix_of(path) == SUFFIX


def is_pictures(path: str | Path) -> bool:
    """Whether a clip's path names a folder of pictures: its first one."""
    return suffix_of(path) == PICTURE


def is_features(path: str | Path) -> bool:
    """Whether a clip's path names features of its frames."""
    return suffix_of(path) == FEATURES


def is_row(path: str | Path) -> bool:
    """Whether a clip's path names a row of an archive: ARCHIVE.tsv/ID.row."""
    return suffix_of(path) == ROW


def is_there(path: Path) -> bool:
    """Whether there is a file to begin with; what is in it is another question."""
    return (path.parent if is_row(path) else path).is_file()


def row_id(key: str) -> str:
    """The last part of a key without a video's ending, be the key a path of any system or a bare id."""
    name = PurePosixPath(key.replace("\\", "/")).name
    ending = PurePosixPath(name).suffix
    return name[: -len(ending)] if ending.lower() in (*VIDEOS, ROW) else name


def row_sounds(path: Path) -> tuple[Path | None, Path | None]:
    """FAVDBench's HDF5 file of the sounds of a row's split, and the row's own mp3; None for what is not there."""
    root, split = path.parent.parent.parent, re.sub(r"_\d+frames$", "", path.parent.name.partition(".")[0])
    # The second is where the original's converter puts it, by a slash that it forgets.
    archives = [root / "audio_hdf" / f"{split}_mp3.hdf", root / f"audio_hdf{split}_mp3.hdf"]
    single = root / "audio_mp3" / split / f"{path.stem}.mp3"
    return next(filter(Path.is_file, archives), None), single if single.is_file() else None


def sound_beside(path: Path) -> Path | None:
    """audio_mp3/SPLIT/ID.mp3 of videos/SPLIT/ID.mp4, None where it is not there."""
    videos = path.parent.parent
    sound = videos.with_name("audio_mp3") / path.parent.name / f"{path.stem}.mp3" if videos.name == "videos" else None
    return sound if sound is not None and sound.is_file() else None


def files_of(path: Path) -> list[Path]:
    """All files of a clip: of a prepared clip its pictures and its sound, of a row the archives, of a folder its pictures.

    Of a video itself and its sound, where that lies apart.
    """
    if is_pictures(path):
        return sorted(path.parent.glob(f"img_*{PICTURE}")) or [path]
    if is_row(path):
        indices = [path.parent.with_suffix(ending) for ending in (".lineidx", ".lineidx.8b")]
        return [path.parent, *(file for file in (*indices, *row_sounds(path)) if file is not None and file.is_file())]
    if is_prepared(path):
        return [path, path.parent.with_name(SOUNDS) / f"{path.stem}.npy"]
    return [path, *filter(None, [sound_beside(path)])]


def open_array(path: Path, called: str) -> np.ndarray:
    """A NumPy file's array of floating-point numbers, mapped; `called` is what it is named where it is missing.

    ClipError for what is no such file; nothing in it is executed.
    """
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ClipError("missing", f"there is no {called}") from None
    except (ValueError, EOFError, OSError) as error:
        raise ClipError("foreign", f"{path.name} is no plain NumPy array: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, np.ndarray) or loaded.dtype.kind != "f":
        raise ClipError("wrong shape", f"{path.name} is no single array of floating-point numbers")
    return loaded


def checksum(path: Path) -> str:
    """SHA-256 of a clip: of its file, or of the digests of its files."""
    digests = [storage.file_digest(file) for file in files_of(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
