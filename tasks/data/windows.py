"""Long videos piece by piece: which stored frames make up each window, and the dataset that reads them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset

from models.family import Batch, ClipSpec, Sample, Window, WindowSpec
from tasks.data import manifest
from tasks.data.batches import Key
from tasks.data.frame_store import FrameStore


def window_starts(stored: int, length: int, stride: int) -> list[int]:
    """First frames of the windows that cover `stored` frames: none twice, the last one ends with the video."""
    last = max(0, stored - length)
    return [*range(0, last, stride), last]


class WindowDataset(Dataset[Batch]):
    """Windows of the videos of an index's rows: in training one of each, drawn anew each time; else all of all."""

    def __init__(
        self,
        rows: pa.RecordBatch,
        frame_store: FrameStore,
        spec: ClipSpec,
        transform: Callable[[Sample], Batch],
        seed: int,
        training: bool,
    ) -> None:
        assert spec.window is not None
        self.ids = manifest.Column(rows["id"], str)
        self.durations = rows["duration"].to_numpy()
        self.annotations = manifest.annotations(rows)
        self.frame_store, self.transform, self.seed = frame_store, transform, seed
        self.window: WindowSpec = spec.window
        self.places: list[tuple[int, int, int]] | None = None  # video, first frame and frames of each window
        if not training:
            stored = [frame_store.num_frames(video) for video in self.ids]
            self.places = [
                (clip, first, min(spec.num_frames, count))
                for clip, count in enumerate(stored)
                for first in window_starts(count, spec.num_frames, self.window.stride)
            ]

    def __len__(self) -> int:
        return len(self.ids if self.places is None else self.places)

    def __getitem__(self, key: Key) -> Batch:
        draw, row = key
        rng = np.random.default_rng([self.seed, draw, row])
        clip, first, length = (row, *self._drawn(row, rng)) if self.places is None else self.places[row]
        video = self.ids[clip]
        sample = Sample(
            id=video,
            frames=self.frame_store.decode(video, range(first, first + length)),
            wave=None,
            annotation=self.annotations[clip],
            rng=rng,
            window=Window(first, self.frame_store.step(video), float(self.durations[clip]), clip),
        )
        return {**self.transform(sample), "row": torch.tensor(row)}

    def _drawn(self, clip: int, rng: np.random.Generator) -> tuple[int, int]:
        """First frame and frames of a training window."""
        video = self.ids[clip]
        stored, step = self.frame_store.num_frames(video), self.frame_store.step(video)
        return self.window.draw(stored, self.annotations[clip], step, rng)
