"""One process or many: where this one stands, how the module is wrapped, and what is gathered from all of them.

Launched by torchrun there are WORLD_SIZE processes; started plainly there is one and no process group at all, unless
DUET_PROCESSES asks for several on this machine.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.family import InputError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT = -1, -3, 1 << 30  # glibc's malloc.h; bytes


@dataclass(frozen=True)
class Place:
    """Where this process stands among all of the run."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def leader(self) -> bool:
        """The one process that prints and writes."""
        return self.rank == 0


def spread(module: str) -> None:
    """Where DUET_PROCESSES is above 1 and torchrun has not started this process: become torchrun, running `module`."""
    count = os.environ.get("DUET_PROCESSES", "1")
    if count != "1" and "WORLD_SIZE" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
        os.execv(sys.executable, [*torchrun, "-m", module, *sys.argv[1:]])


def keep_freed_memory() -> None:
    """Let this process, and those that it forks, use again what they free, where the C library is glibc.

    By default large tensors go back to the system and come again page by page, a tenth of a training step on a CPU.
    """
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            allocator.mallopt(parameter, KEPT)


@contextmanager
def launched(device: Literal["auto", "cpu", "cuda"]) -> Iterator[Place]:
    """This process's place; under torchrun the process group lives as long as the block."""
    keep_freed_memory()
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda and this machine has no GPU that PyTorch can use; set device: auto or cpu")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if "WORLD_SIZE" not in os.environ:
        if kind == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            # PyTorch counts cores; small models gain by their second thread too, 1.7 times as measured on one core.
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        yield Place(torch.device(kind))
        return
    where = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    try:
        yield Place(where, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def wrap(module: nn.Module, strategy: Literal["ddp", "fsdp"], place: Place) -> nn.Module:
    """What every forward pass goes through: the module alone, DDP, or FSDP2 with each layer of a list sharded."""
    if place.world == 1:
        return module
    if strategy == "ddp":
        # Buffers are not broadcast at each forward pass: evaluation would have to stay in step for nothing.
        return DistributedDataParallel(module, broadcast_buffers=False)
    from torch.distributed.device_mesh import init_device_mesh  # these take seconds to import
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(place.device.type, (place.world,))
    whole = {inner for part in module.modules() if getattr(part, "gathered_whole", False) for inner in part.modules()}
    # The root too is resharded after each forward pass: the moving average writes to the shards between two of them.
    for part in reversed(list(module.modules())):  # inner lists before outer ones
        if isinstance(part, nn.ModuleList) and part not in whole:
            for layer in part:
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module


def synchronising(wrapper: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Gradients cross the processes only in the backward pass of a step's last micro-batch."""
    if isinstance(wrapper, DistributedDataParallel) and not last:
        return wrapper.no_sync()
    if hasattr(wrapper, "set_requires_gradient_sync"):  # of FSDP
        wrapper.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]
    return nullcontext()


@torch.no_grad()
def average_statistics(module: nn.Module, place: Place) -> None:
    """Make the running statistics of batch norm the mean over all ranks, each of which has seen clips of its own.

    Called after every step: evaluation then judges on each rank what is saved, and a resumed run goes on with the same.
    """
    if place.world == 1:
        return
    trained = [part for part in module.modules() if part.training]
    found = [getattr(part, name, None) for part in trained for name in ("running_mean", "running_var")]
    statistics = [value for value in found if isinstance(value, Tensor)]
    if statistics:
        sums = total(torch.cat([value.flatten() for value in statistics]), place)
        for value, sum_ in zip(statistics, sums.split([value.numel() for value in statistics]), strict=True):
            value.copy_((sum_ / place.world).view_as(value))


def whole(value: Any) -> Any:
    """A nested structure with every sharded tensor gathered (a collective: all ranks call it), all on the CPU."""
    if hasattr(value, "full_tensor"):  # sharded
        return value.full_tensor().detach().cpu()
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device, and sharded the way, of `like`."""
    if hasattr(like, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor  # takes seconds to import

        assert isinstance(like, DTensor)
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.to(like.device)


def total(values: Tensor, place: Place, how: Literal["sum", "min", "max"] = "sum") -> Tensor:
    """The element-wise sum, minimum or maximum over all ranks, as a new tensor."""
    values = values.clone()
    if place.world > 1:
        dist.all_reduce(values, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[how])
    return values


def any_rank(flag: bool, place: Place) -> bool:
    """Whether the flag is up on any rank; over the CPU, so that no GPU waits."""
    return flag if place.world == 1 else bool(total(torch.tensor(int(flag)), place, "max"))


def gather(value: Any, place: Place) -> list[Any]:
    """Everyone's value in rank order on rank 0, an empty list elsewhere."""
    if place.world == 1:
        return [value]
    values = [None] * place.world if place.leader else None
    dist.gather_object(value, values)
    return values or []


def from_leader(value: Any, place: Place) -> Any:
    """Rank 0's value everywhere."""
    values = [value]
    if place.world > 1:
        dist.broadcast_object_list(values)
    return values[0]
