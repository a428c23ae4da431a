"""Prepared clips in a stores folder, which keeps their files as they are: what FrameStore and AudioStore offer of others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.family import InputError
from tasks.data import index, prepared
from tasks.data.audio_store import AudioStore
from tasks.data.clip_files import PICTURES, SOUNDS, SUFFIX, ClipError
from tasks.data.frame_store import FrameStore
from tasks.data.index import Places, find


class PreparedFrames:
    """What FrameStore offers, of the prepared clips in a stores folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = index.read(folder)
        self.places, self._num_frames = Places(rows), rows["num_frames"].to_numpy()

    @property
    def ids(self) -> list[str]:
        """Clips in the store, in its order."""
        return list(self.places)

    def num_frames(self, clip: str) -> int:
        """Stored frames of a clip."""
        return int(self._num_frames[find(self.places, clip, self.folder)])

    def decode(self, clip: str, columns: Sequence[int]) -> np.ndarray:
        """(T, H, W, 3) uint8 RGB of the chosen frames."""
        try:
            return prepared.decode(self.folder / PICTURES / f"{clip}{SUFFIX}", columns)
        except ClipError as error:
            raise InputError(f"{self.folder}: clip {clip}: {error}; run the stores stage again") from None


class PreparedSounds:
    """The spectrograms of the prepared clips in a stores folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, clip: str) -> bool:
        return (self.folder / SOUNDS / f"{clip}.npy").is_file()

    def read(self, clip: str) -> np.ndarray:
        """(frames, mel) float32 of a clip."""
        try:
            return prepared.decode_sound(self.folder / SOUNDS / f"{clip}.npy")
        except ClipError as error:
            raise InputError(f"{self.folder}: clip {clip}: {error}; run the stores stage again") from None


def is_store(folder: Path) -> bool:
    """Whether a stores folder holds prepared clips."""
    return (folder / PICTURES).is_dir()


def open_stores(folder: Path) -> tuple[FrameStore, AudioStore] | tuple[PreparedFrames, PreparedSounds]:
    """A dataset's stores, of either kind."""
    if is_store(folder):
        return PreparedFrames(folder), PreparedSounds(folder)
    return FrameStore(folder), AudioStore(folder)
