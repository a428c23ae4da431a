"""Which files make up a clip, what is known of them, what is wrong.

A clip is one video; or the two files that another system prepared of it; or a folder of pictures, named by the first of them;
or features of its frames that another system has made.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks import storage

PICTURES, SOUNDS = "video_frames", "mel_spectrograms"
SUFFIX = ".pt"
PICTURE, FEATURES = ".jpg", ".npy"  # endings of the paths of clips that are a folder of pictures, and features
ROW = ".row"  # ending of ARCHIVE.tsv/ID.row, a clip that is a row of FAVDBench's frame archive
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


def is_prepared(path: str | Path) -> bool:
    """Whether a clip's path names such a clip: its pictures."""
    return Path(path).suffix == SUFFIX


def is_pictures(path: str | Path) -> bool:
    """Whether a clip's path names a folder of pictures: its first one."""
    return Path(path).suffix == PICTURE


def is_features(path: str | Path) -> bool:
    """Whether a clip's path names features of its frames."""
    return Path(path).suffix == FEATURES


def files_of(path: Path) -> list[Path]:
    """All files of a clip: of a video itself, of a prepared clip its pictures and its sound, of a folder its pictures."""
    if is_pictures(path):
        return sorted(path.parent.glob(f"img_*{PICTURE}")) or [path]
    return [path, path.parent.with_name(SOUNDS) / f"{path.stem}.npy"] if is_prepared(path) else [path]


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
