"""Features of raw clips: frames decoded one by one, prepared, and put through a phase's module a few at a time.

Memory holds no more than some frames of each clip that is being decoded, however long the clips are. Which frames go through
the module together is a matter of the clip alone, so that the numbers do not depend on who decodes what when.
"""

from __future__ import annotations

import io
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import models
from models.family import FeatureSpec, InputError
from tasks import bundle, storage
from tasks.data.batches import read_batches
from tasks.data.clip_files import ClipError
from tasks.data.raw_clip import open_clip

Source = Path | io.BytesIO
WAITING = 2  # pieces a worker has ready at most, each of `FeatureSpec.segments` frames at most


@dataclass(frozen=True)
class Piece:
    """Some prepared frames of a clip."""

    clip: int
    numbers: list[int]
    frames: Tensor  # (N, S, S, 3) uint8 RGB


@dataclass(frozen=True)
class End:
    """What came of a clip, after its last piece."""

    clip: int
    num_frames: int  # of the video
    chosen: list[int]  # a row of features each
    times: list[float]  # seconds
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Features:
    """Features of a clip."""

    rows: np.ndarray  # (T, D) float32
    times: np.ndarray  # (T,) float32, seconds
    num_frames: int  # of the video


def pieces(clip: int, source: Source, spec: FeatureSpec) -> Iterator[Piece | End]:
    """The frames of a clip that `spec` chooses, each once, prepared, by pieces; then its end, which tells what is wrong."""
    try:
        raw = open_clip(source)
        chosen = list(spec.choose(raw.num_frames, raw.fps))
        numbers: list[int] = []
        frames: list[np.ndarray] = []
        for number, image in raw.read(sorted(set(chosen))):
            numbers.append(number)
            frames.append(spec.prepare(image))
            if len(frames) == spec.segments:
                yield Piece(clip, numbers, torch.from_numpy(np.stack(frames)))
                numbers, frames = [], []
        if frames:
            yield Piece(clip, numbers, torch.from_numpy(np.stack(frames)))
        yield End(clip, raw.num_frames, chosen, [raw.seconds(number) for number in chosen])
    except ClipError as error:
        yield End(clip, 0, [], [], error.reason, error.detail)


class Pieces(IterableDataset[Piece | End]):
    """The pieces of some clips; of several workers each has its share of the clips."""

    def __init__(self, sources: Sequence[Source], spec: FeatureSpec) -> None:
        self.sources, self.spec = sources, spec

    def __iter__(self) -> Iterator[Piece | End]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for clip in range(first, len(self.sources), step):
            yield from pieces(clip, self.sources[clip], self.spec)


def _begin_worker(worker: int) -> None:
    """Ctrl-C is the main process's to answer; where that is killed, its locks end with it."""
    storage.leave_locks()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(item: Any) -> Any:
    return item


class Extractor:
    """A phase's finished module, and how it sees a clip."""

    def __init__(self, module: nn.Module, spec: FeatureSpec, device: torch.device) -> None:
        self.module, self.spec, self.device = module.to(device).eval(), spec, device

    def extract(self, sources: Sequence[Source], workers: int = 0) -> Iterator[tuple[int, Features | ClipError]]:
        """The place in `sources` and the features of each clip, or what is wrong with it; as clips are finished.

        `workers` processes decode, 0 = this one does. This one feeds the device.
        """
        rows: dict[int, dict[int, np.ndarray]] = {}
        for item in self._pieces(sources, workers):
            if isinstance(item, Piece):
                found = zip(item.numbers, self._rows(item.frames), strict=True)
                rows.setdefault(item.clip, {}).update(found)
                continue
            own = rows.pop(item.clip, {})
            if item.reason:
                yield item.clip, ClipError(item.reason, item.detail)
            else:
                whole, times = np.stack([own[number] for number in item.chosen]), np.array(item.times, np.float32)
                yield item.clip, Features(whole, times, item.num_frames)

    def _pieces(self, sources: Sequence[Source], workers: int) -> Iterable[Piece | End]:
        clips = Pieces(sources, self.spec)
        if not workers:
            return clips
        loader: DataLoader[Any] = DataLoader(
            clips,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=WAITING,
            multiprocessing_context="fork",  # the spec's functions may be closures
            worker_init_fn=_begin_worker,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
        )
        return read_batches(loader)  # pyright: ignore[reportReturnType]

    @torch.inference_mode()
    def _rows(self, frames: Tensor) -> np.ndarray:
        """(N, S, S, 3) uint8 -> (N, D) float32."""
        seen = frames.to(self.device).permute(0, 3, 1, 2).contiguous()
        found: Tensor = self.module.extract(seen)  # pyright: ignore[reportCallIssue]
        return found.float().cpu().numpy()


def load_extractor(trained: bundle.Bundle, device: torch.device) -> Extractor:
    """Of a bundle of a phase that makes features."""
    features = models.load(trained.family).phases[trained.phase].features
    if features is None:
        raise InputError(f"{trained.path}: {trained.family} {trained.phase} makes no features")
    return Extractor(trained.module(), features(trained.config), device)
