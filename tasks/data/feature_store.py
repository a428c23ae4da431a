"""Features of clips as the features stage leaves them: ID.npy (T, D) for each clip, index.arrow and quarantine.csv."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from models.family import InputError
from tasks import storage
from tasks.data import index
from tasks.data.index import Places, find

SOURCE = "source.json"  # beside the index: the phase that made the features, its weights, and the kind of numbers


def feature_folder(family: str) -> Path:
    """Where the features of a family's clips lie."""
    return storage.ARTIFACTS / family / "features"


def read_source(folder: Path) -> dict[str, str]:
    """Which phase made the features ("" = none of ours), the SHA-256 of its weights, and the kind of numbers kept."""
    if not (folder / SOURCE).is_file():
        raise InputError(f"{folder / SOURCE} not found; run `python -m tasks.features {folder.parent.name}` first")
    return json.loads((folder / SOURCE).read_text())


class FeatureStore:
    """The features of clips, by clip id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = index.read(folder, f"run `python -m tasks.features {folder.parent.name}` again")
        self.places, self._times = Places(self.rows), self.rows["times"]

    @property
    def ids(self) -> list[str]:
        """Clips in the store, in its order."""
        return list(self.places)

    def read(self, clip: str) -> tuple[np.ndarray, np.ndarray]:
        """(T, D) float32 of a clip, and the seconds (T,) float32 at which its frames are shown."""
        place = find(self.places, clip, self.folder)
        times = np.asarray(self._times[place].values, np.float32)
        path = self.folder / f"{clip}.npy"
        try:
            features = np.load(path, allow_pickle=False).astype(np.float32)
        except (OSError, ValueError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path} is missing or damaged ({reason}); run the features stage again") from None
        if features.ndim != 2 or len(features) != len(times):
            raise InputError(f"{path} is {features.shape} for {len(times)} times; run the features stage again")
        return features, times
