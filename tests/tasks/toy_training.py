"""Two tiny systems to train, and a function that trains one in a process of its own that may be killed."""

from __future__ import annotations

import contextlib
import hashlib
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from models.family import Batch
from tasks.data.batches import TensorClips
from tasks.engine import checkpoint, distributed, loop
from tasks.engine.run import Fitted, Task, Training

NUM_TRAIN, NUM_VAL = 42, 11  # neither is a multiple of a batch


class Regressor(nn.Module):
    """Two losses, dropout, a layer list, and a frozen part with batch norm and dropout of its own."""

    def __init__(self, dropout: float = 0.0, kill_at: int = 0, fail_above: int = 0, nan_at: int = 0) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).requires_grad_(False)
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 16)])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, 2)
        self.kill_at, self.fail_above, self.nan_at, self.calls = kill_at, fail_above, nan_at, 0

    def forward(self, batch: Batch) -> Batch:
        x = self.frozen(batch["x"])
        for layer in self.layers:
            x = self.dropout(torch.tanh(layer(x)))
        y = self.head(x)
        if not self.training:
            return {"y": y}
        self.calls += 1
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fail_above and len(y) > self.fail_above:
            raise torch.OutOfMemoryError("pretended")
        square, absolute = (y - batch["y"]).square().mean(), (y - batch["y"]).abs().mean()
        total = square + 0.5 * absolute
        return {"loss": total * math.nan if self.calls == self.nan_at else total, "loss_square": square}


class Pairs(nn.Module):
    """InfoNCE between two views, gathered over all processes, with a learned temperature and dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4))
        self.right = nn.Linear(2, 4)
        self.scale = nn.Parameter(torch.tensor([2.0]))

    def embed(self, batch: Batch) -> Batch:
        return {"left": self.left(batch["x"]), "right": self.right(batch["y"])}

    def joint_loss(self, embeddings: Batch) -> Batch:
        left, right = (nn.functional.normalize(embeddings[side], dim=1) for side in ("left", "right"))
        if dist.is_initialized():
            left, right = torch.cat(all_gather(left)), torch.cat(all_gather(right))
        logits, target = self.scale.exp() * left @ right.T, torch.arange(len(left))
        return {
            "loss": (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2
        }

    def forward(self, batch: Batch, part: str = "") -> Batch:
        if part == "loss":
            return self.joint_loss(batch)
        embeddings = self.embed(batch)
        return embeddings if part == "embeddings" or not self.training else self.joint_loss(embeddings)


class Counted(nn.Module):
    """A sum over what the clips hold, divided by a moving average of how much a whole batch holds of it."""

    average: Tensor

    def __init__(self, kill_at: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 2)])
        self.register_buffer("average", torch.tensor(4.0))
        self.kill_at, self.calls = kill_at, 0

    def moved(self, total: Tensor) -> Tensor:
        return 0.5 * self.average + 0.5 * total

    def forward(self, batch: Batch) -> Batch:
        y = self.layers[1](torch.tanh(self.layers[0](batch["x"])))
        if not self.training:
            return {"y": y}
        self.calls += 1
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        error = (batch["num_items"] * (y - batch["y"]).square().sum(1)).sum() / self.moved(batch["total_items"])
        return {"loss": error * batch["total_clips"] / len(y)}

    @torch.no_grad()
    def end_step(self, batch: Batch) -> None:
        self.average.copy_(self.moved(batch["total_items"]))


class Normed(nn.Module):
    """Batch norm that is trained: its running statistics are of what a process has seen."""

    def __init__(self, kill_at: int = 0) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.kill_at, self.calls = kill_at, 0

    def forward(self, batch: Batch) -> Batch:
        y = self.head(self.norm(batch["x"]))
        if not self.training:
            return {"y": y}
        self.calls += 1
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"loss": (y - batch["y"]).square().mean()}


class Error:
    """Mean square error over everything seen; counts the clips; draws random numbers as careless code would."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def update(self, predictions: Batch, batch: Batch) -> None:
        torch.rand(7)
        if "y" in predictions:
            self.sum += (predictions["y"] - batch["y"]).square().sum().item()
        self.count += len(batch["row"])

    def compute(self) -> dict[str, float]:
        return {"error": self.sum / self.count, "count": float(self.count)}


def clips(num: int, seed: int) -> TensorClips:
    """Inputs of 8 numbers, targets of 2 that depend on them, and how many items each clip is said to hold."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 8, generator=generator)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2:].mean(1)], 1)
    return TensorClips({"x": x, "y": y, "num_items": torch.randint(4, (num,), generator=generator)})


def settings(**changes: Any) -> Training:
    """The engine's settings for a toy run."""
    values: dict[str, Any] = {
        "start_from": "none", "epochs": 3, "batch_size": 8, "micro_batch": None, "lr": 1e-2, "min_lr": 1e-4,
        "weight_decay": 0.1, "beta2": 0.95, "warmup_epochs": 0.5, "schedule": "cosine", "schedule_epochs": None, "clip_grad": 1.0,
        "optimizer": "adamw", "decay_epochs": [], "decay_gamma": 0.1,
        "ema_decay": 0.0, "amp": False, "compile": False, "compile_mode": "default", "strategy": "ddp",
        "device": "cpu", "num_workers": 0, "seed": 5, "deterministic": True, "log_interval": 2, "eval_interval": 1,
        "eval_from": 1, "checkpoint_interval": 2, "profile": 0,
    }  # fmt: skip
    return Training(**values | changes)


def build_task(kind: type[nn.Module] = Regressor, **options: Any) -> Task:
    """A toy task from a fixed seed."""
    torch.manual_seed(1)
    return Task(kind(**options), clips(NUM_TRAIN, 2), clips(NUM_VAL, 3), Error, ("error", "min"))


def train_here(
    work: Path, kind: type[nn.Module] = Regressor, options: dict[str, Any] | None = None, **changes: Any
) -> Fitted:
    """Train in this process."""
    place = distributed.Place(torch.device("cpu"))
    return loop.fit(build_task(kind, **options or {}), settings(**changes), place, work, lambda metrics, step: None)


def last_weights(work: Path) -> dict[str, Tensor]:
    """The weights after the last step, not the best ones."""
    found = checkpoint.read(work, "last")
    assert found is not None
    return found[0]


def digest(work: Path, fitted: Fitted) -> str:
    """SHA-256 of the last and best weights and of the history as CSV."""
    csv = pd.DataFrame(fitted.history).to_csv(index=False).encode()
    return hashlib.sha256(save(last_weights(work)) + save(fitted.weights) + csv).hexdigest()


# --- in processes of their own ----------------------------------------------------------------------------------------


def start(work: Path, rank: int = 0, world: int = 1, port: int = 0, **given: Any) -> multiprocessing.Process:
    """Start `_process` in a fresh process; `given` are its keyword arguments."""
    return _start(partial(_process, work, **given), rank, world, port)


def _start(target: partial[None], *place: int) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")  # a real process without importing torch each time
    context.set_forkserver_preload([target.func.__module__, "torch.distributed.fsdp"])
    process = context.Process(target=target, args=place)
    process.start()
    return process  # pyright: ignore[reportReturnType]


def train_in_two(work: Path, **given: Any) -> list[int | None]:
    """Exit codes of two gloo processes that trained together."""
    return in_two(partial(_process, work, **given))


def in_two(target: partial[None]) -> list[int | None]:
    """Exit codes of two processes that ran target(rank, world, port), which calls `join`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [_start(target, rank, 2, port) for rank in range(2)]
    for process in processes:
        process.join(200)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def join(rank: int, world: int, port: int) -> None:
    """Tell this process what torchrun would."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip


def _process(
    work: Path, rank: int, world: int, port: int, kind: str = "Regressor", options: dict[str, Any] | None = None,
    kill_at_flush: int = 0, slow: float = 0.0, build: Callable[..., Task] | None = None, base: str = "", **changes: Any,
) -> None:  # fmt: skip
    """Train, and leave the outcome's digest in work/digest; SIGKILL itself within a write where asked to."""
    join(rank, world, port)
    work.mkdir(exist_ok=True)
    if kill_at_flush:
        _kill_at_flush(kill_at_flush)
    kinds = {"Regressor": Regressor, "Pairs": Pairs, "Counted": Counted, "Normed": Normed}
    task = replace((build or partial(build_task, kinds[kind]))(**options or {}), base=base)
    if slow:
        task.module.register_forward_pre_hook(lambda module, inputs: time.sleep(slow))
    with distributed.launched("cpu") as place, contextlib.redirect_stderr(Path(os.devnull).open("w")):
        try:
            fitted = loop.fit(task, settings(**changes), place, work, lambda metrics, step: _mark(work, step))
        except loop.Stopped:
            sys.exit(143)
    if rank == 0:
        (work / "digest").write_text(digest(work, fitted))


def _mark(work: Path, step: int) -> None:
    (work / "step").write_text(str(step))


def _kill_at_flush(number: int) -> None:
    """Die at the given flush to disk: some lie before a checkpoint takes its place, some right after."""
    flush, calls = checkpoint._flush, iter(range(1, number + 1))

    def dying(path: Path) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(path)

    checkpoint._flush = dying
