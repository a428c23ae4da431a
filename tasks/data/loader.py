"""A clip from the stores to tensors.

All randomness of a clip comes from (seed, draw, clip); which clips make up a step is for tasks/data/batches.py to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset

from models.family import Batch, ClipSpec, InputError, Sample
from tasks import storage
from tasks.data import clip_files, index, manifest
from tasks.data.audio_store import AudioStore
from tasks.data.batches import Clips, GlobalBatches, InOrder, Key, build_loader, read_batches
from tasks.data.feature_store import FeatureStore
from tasks.data.frame_store import FrameStore
from tasks.data.prepared_store import PreparedFrames, PreparedSounds, open_stores
from tasks.data.windows import WindowDataset

__all__ = [
    "ClipDataset", "GlobalBatches", "InOrder", "build_loader", "chosen_columns", "frame_columns", "open_split",
    "read_batches",
]  # fmt: skip


class ClipDataset(Dataset[Batch]):
    """The clips of an index's rows, read from the stores and put through a phase's transform."""

    def __init__(
        self,
        rows: pa.RecordBatch,
        frame_store: FrameStore | PreparedFrames,
        audio_store: AudioStore | PreparedSounds,
        spec: ClipSpec,
        transform: Callable[[Sample], Batch],
        seed: int,
        training: bool = False,
        feature_store: FeatureStore | None = None,
    ) -> None:
        self.ids = manifest.Column(rows["id"], str)
        self.has_video, self.has_audio = rows["has_video"], rows["has_audio"]
        self.annotations = manifest.annotations(rows)
        self.frame_store, self.audio_store = frame_store, audio_store
        self.feature_store = feature_store
        self.spec, self.transform, self.seed, self.training = spec, transform, seed, training

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: Key) -> Batch:
        draw, row = key
        rng = np.random.default_rng([self.seed, draw, row])
        wave, mel = self._sound(row)
        features, times = self.feature_store.read(self.ids[row]) if self.feature_store else (None, None)
        sample = Sample(
            id=self.ids[row],
            frames=self._frames(row, rng),
            wave=wave,
            mel=mel,
            annotation=self.annotations[row],
            rng=rng,
            features=features,
            feature_times=times,
        )
        return {**self.transform(sample), "row": torch.tensor(row)}

    def _frames(self, row: int, rng: np.random.Generator) -> np.ndarray | None:
        if self.spec.num_frames == 0 or not self.has_video[row].as_py():
            return None
        stored = self.frame_store.num_frames(self.ids[row])
        columns = chosen_columns(self.spec, stored, rng if self.training else None)
        return self.frame_store.decode(self.ids[row], columns)

    def _sound(self, row: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The clip's waveform, or the spectrogram that was prepared in its place."""
        if self.spec.audio_seconds == 0 or not self.has_audio[row].as_py():
            return None, None
        if isinstance(self.audio_store, PreparedSounds):
            return None, self.audio_store.read(self.ids[row])
        wave, rate = self.audio_store.read(self.ids[row])
        if rate != self.spec.sample_rate:
            raise InputError(
                f"clip {self.ids[row]} is stored at {rate} Hz and the phase hears {self.spec.sample_rate} Hz; "
                "set stores.<dataset>.sample_rate to that and run the stores stage again"
            )
        return wave[: round(rate * self.spec.audio_seconds)], None


def chosen_columns(spec: ClipSpec, stored: int, rng: np.random.Generator | None) -> Sequence[int]:
    """The stored frames that a phase takes of a clip; `rng` in training only."""
    return spec.choose(stored, rng) if spec.choose else frame_columns(stored, spec.num_frames)


def frame_columns(stored: int, wanted: int) -> list[int]:
    """`wanted` of `stored` frames, evenly from first to last: round(i (n - 1) / (T - 1)); the middle one for T = 1."""
    if wanted == 1:
        return [(stored - 1) // 2]
    return [round(i * (stored - 1) / (wanted - 1)) for i in range(wanted)]


def open_split(
    dataset: str,
    split: str,
    spec: ClipSpec,
    transform: Callable[[Sample], Batch],
    seed: int,
    training: bool = False,
    features: Path | None = None,
) -> Clips:
    """A split of data/<dataset>, by windows where the phase has them; `training` draws those, and frames.

    `features` is the folder of the clips' features; those that have none are left out, whatever the phase takes.
    InputError when the stores are of another manifest, or lack what the phase takes of the clips.
    """
    folder = storage.DATA / dataset / "stores"
    stored = index.read(folder)
    index.check(stored, folder, dataset, f"run `python -m tasks.stores {dataset}` again")
    rows = index.of_split(stored, split)
    if features and (lost := manifest.quarantined(features)):
        rows = rows.filter(pa.array(~rows["id"].to_pandas().isin(lost)))
    frame_store, audio_store = open_stores(folder)
    if isinstance(audio_store, PreparedSounds) and spec.audio_seconds and not spec.takes_mel:
        raise InputError(
            f"{folder} holds spectrograms that were prepared elsewhere and this phase hears waveforms; "
            "name a dataset of videos"
        )
    if spec.num_frames and len(rows) and clip_files.is_features(rows["path"][0].as_py()):
        raise InputError(f"{dataset} holds features of frames and no pictures, which this phase sees; begin after it")
    if spec.window is None:
        feature_store = open_features(features, dataset) if spec.features and features else None
        return ClipDataset(rows, frame_store, audio_store, spec, transform, seed, training, feature_store)
    if not isinstance(frame_store, FrameStore) or not frame_store.has_steps:
        raise InputError(
            f"{folder} holds frames chosen by their number and this phase needs them at steps in time; set "
            f"stores.{dataset}.frame_step to 1 or more, num_frames to 0, and run the stores stage again"
        )
    return WindowDataset(rows, frame_store, spec, transform, seed, training)


def open_features(folder: Path, dataset: str) -> FeatureStore:
    """The features of a dataset's clips; InputError where they are of another manifest."""
    store = FeatureStore(folder)
    index.check(store.rows, folder, dataset, "run the features stage again")
    return store
