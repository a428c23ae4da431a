"""Features of clips as the features stage leaves them: ID.npy (T, D) for each clip, index.parquet and quarantine.csv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models.family import InputError
from tasks import storage
from tasks.data.frame_store import INDEX, find

QUARANTINE = "quarantine.csv"


def feature_folder(family: str) -> Path:
    """Where the features of a family's clips lie."""
    return storage.ARTIFACTS / family / "features"


class FeatureStore:
    """The features of clips, by clip id."""

    def __init__(self, folder: Path) -> None:
        if not (folder / INDEX).is_file():
            family = folder.parent.name
            raise InputError(f"{folder / INDEX} not found; run `python -m tasks.features {family}` first")
        self.folder = folder
        index = pd.read_parquet(folder / INDEX)
        self.places = {clip: row for row, clip in enumerate(index["id"])}
        self._times: list[Any] = index["times"].tolist()

    @property
    def ids(self) -> list[str]:
        """Clips in the store, in its order."""
        return list(self.places)

    def read(self, clip: str) -> tuple[np.ndarray, np.ndarray]:
        """(T, D) float32 of a clip, and the seconds (T,) float32 at which its frames are shown."""
        times = np.asarray(self._times[find(self.places, clip, self.folder)], np.float32)
        path = self.folder / f"{clip}.npy"
        try:
            features = np.load(path, allow_pickle=False).astype(np.float32)
        except (OSError, ValueError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path} is missing or damaged ({reason}); run the features stage again") from None
        if features.ndim != 2 or len(features) != len(times):
            raise InputError(f"{path} is {features.shape} for {len(times)} times; run the features stage again")
        return features, times
