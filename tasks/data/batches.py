"""Which clips make up each step of a run, and the DataLoader that fetches them.

All order comes from (seed, epoch): neither the number of workers nor a restart changes a batch.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.util import Finalize
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from models.family import Batch, InputError
from tasks import storage

# (draw, row): what a sampler asks of a dataset. Draws tell the times apart that a row is taken, for its random choices: the
# epoch, or a number of its own where a row may come several times in an epoch.
Key = tuple[int, int]


class Clips(Protocol):
    """A dataset of `len` rows that gives one row's tensors by (draw, row); "row" is among them."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: Key) -> Batch: ...


class TensorClips(Dataset[Batch]):
    """Rows of tensors held in memory, such as the cached results of a phase's frozen part."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, key: Key) -> Batch:
        row = key[1]
        return {**{name: tensor[row] for name, tensor in self.tensors.items()}, "row": torch.tensor(row)}


class GlobalBatches(Sampler[list[Key]]):
    """This rank's contiguous share of each global batch for steps first..last of a run, over all epochs.

    Each epoch is its own permutation, from (seed, epoch) alone, so that a run goes on at any step without replaying.
    The clips that do not fill a last batch sit the epoch out. `batch_size` is global, a multiple of `world`.
    With `frequencies` (n,) an epoch is drawn with replacement: of n draws each clip gets its share, rounded up or down.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        first: int,
        last: int,
        rank: int = 0,
        world: int = 1,
        frequencies: np.ndarray | None = None,
    ) -> None:
        self.n, self.batch_size, self.seed, self.first, self.last = n, batch_size, seed, first, last
        self.rank, self.world, self.frequencies = rank, world, frequencies
        self.steps_per_epoch = n // batch_size

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[Key]]:
        local = self.batch_size // self.world
        drawn, order = -1, np.empty(0, dtype=int)
        for step in range(self.first, self.last):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != drawn:
                drawn, order = epoch, self._order(np.random.default_rng([self.seed, epoch]))
            start = position * self.batch_size + self.rank * local
            places = range(start, start + local)
            draws = [epoch if self.frequencies is None else epoch * self.n + place for place in places]
            yield [(draw, int(order[place])) for draw, place in zip(draws, places, strict=True)]

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        """The rows of an epoch's draws."""
        order = rng.permutation(self.n)
        if self.frequencies is None:
            return order
        ends = np.cumsum(self.frequencies[order])  # systematic sampling: n points at equal distances along them
        points = (np.arange(self.n) + rng.random()) / self.n
        return rng.permutation(order[np.searchsorted(ends / ends[-1], points, side="right")])


class InOrder(Sampler[list[Key]]):
    """Every clip once and in order, for evaluation; each rank has its contiguous share of each batch.

    All ranks have equally many batches. Where the last one has fewer clips than ranks, the ranks left over repeat the
    last clip; `loop.predictions` drops the repetition.
    """

    def __init__(self, n: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.n, self.batch_size, self.rank, self.world = n, batch_size, rank, world

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, self.n, self.batch_size):
            rows = np.arange(start, min(start + self.batch_size, self.n))
            share = np.array_split(rows, self.world)[self.rank]
            yield [(0, int(row)) for row in (share if len(share) else rows[-1:])]


def build_loader(
    clips: Clips, batches: Sampler[list[Key]], num_workers: int, device: torch.device
) -> DataLoader[Batch]:
    """A loader of stacked batches on the CPU (pinned when they go on to a GPU).

    Workers are forked: a phase's transform may be a closure, which spawn could not send. That is safe because workers
    touch no GPU and the stores open their files anew in each process. The loader has a generator of its own, so
    that starting an epoch draws nothing from the training's.
    """
    return DataLoader(
        clips,  # pyright: ignore[reportArgumentType]
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=stack,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers else None,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),
    )


def _begin_worker(worker: int) -> None:
    """A SIGTERM to the whole tree of processes is the trainer's to answer, and a worker's death would interrupt it.

    The second one ends the worker. When the trainer is killed, workers notice seconds later: its locks must be free by
    then.
    """
    storage.leave_locks()
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _end_workers() -> None:
    """At the exit of a trainer that an exception ended: Python would send workers one SIGTERM and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


Finalize(None, _end_workers, exitpriority=0)


def stack(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Samples -> one batch; plain numbers and bools become tensors, and zeros follow shorter ones up to the longest."""
    return {key: _join([torch.as_tensor(sample[key]) for sample in samples]) for key in samples[0]}


def _join(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors that differ in their first dimension at most."""
    same = all(value.shape == values[0].shape for value in values)
    # PyTorch's own writes a worker's batch straight into the memory that it shares with the trainer.
    return default_collate(list(values)) if same else pad_sequence(list(values), batch_first=True)


def read_batches(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """The loader's batches; an InputError of a worker comes out as its one line again, not as a traceback."""
    try:
        yield from loader
    except InputError as error:
        raise InputError(str(error).strip().splitlines()[-1].removeprefix("models.family.InputError: ")) from None
