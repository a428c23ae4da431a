"""A training run as a thing: what it is given, what changes as it goes on, and how that goes to disk and comes back."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from models.family import Batch, InputError, Metric, ParameterGroup
from models.weights import trained_state
from tasks.command import say
from tasks.data.batches import Clips
from tasks.engine import checkpoint, distributed, optim
from tasks.engine.distributed import Place


@dataclass(frozen=True)
class Training:
    """The engine's settings; batch sizes are global, over all processes and micro-batches."""

    start_from: str  # phase name | none | folder of a bundle
    epochs: int  # 0 = the weights it starts with, as they are
    batch_size: int
    micro_batch: int | None  # clips a process holds at once; None = its whole share of the batch
    optimizer: optim.Kind
    lr: float
    min_lr: float
    weight_decay: float
    beta2: float  # of the running mean of squared gradients, also rmsprop's
    warmup_epochs: float
    schedule: optim.Schedule  # how the rate falls after warm-up
    schedule_epochs: int | None  # it reaches min_lr after so many; None = epochs
    decay_epochs: list[float]  # after each of these the rate falls to decay_gamma of it; none = as schedule says
    decay_gamma: float
    clip_grad: float  # largest total norm; 0 = off
    ema_decay: float  # 0 = off
    amp: bool  # bf16 autocast
    compile: bool
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"]
    strategy: Literal["ddp", "fsdp"]
    device: Literal["auto", "cpu", "cuda"]
    num_workers: int
    seed: int
    deterministic: bool
    log_interval: int  # steps
    eval_interval: int  # epochs
    eval_from: int  # the first epoch, from 1, that is evaluated where eval_interval says so; the last one always is
    checkpoint_interval: int  # steps
    profile: int  # so many steps are recorded, 0 = none


# What changes nothing in the result (or, device, only its rounding): a killed run goes on after a change of these.
NOT_IN_RESULT = ("device", "num_workers", "log_interval", "checkpoint_interval", "profile")


@dataclass(frozen=True)
class Task:
    """What is trained on what, and how it is judged."""

    module: nn.Module  # on the CPU; the engine moves and wraps it
    train: Clips
    val: Clips
    metric: Callable[[], Metric]  # a fresh one for each evaluation
    best: tuple[str, Literal["max", "min"]]
    teach: Callable[[Batch], Batch] = lambda batch: batch  # adds to a training batch, on the device, what it is taught
    meta: dict[str, Any] = field(default_factory=dict)  # kept in the resume state: config, label map
    frequencies: np.ndarray | None = None  # how often each training clip is drawn; None = once an epoch
    parameter_groups: Mapping[str, ParameterGroup] = field(default_factory=dict)  # by prefix of the names
    base: str = ""  # SHA-256 of the frozen parameters, which no checkpoint holds then; "" = checkpoints hold everything

    def state(self) -> dict[str, Tensor]:
        """What checkpoints hold of the module; shares its memory."""
        return trained_state(self.module) if self.base else self.module.state_dict()


@dataclass(frozen=True)
class Fitted:
    """The outcome: the best weights (averaged ones with EMA), where they are from, and one row an epoch."""

    weights: dict[str, Tensor]
    step: int
    epoch: int
    metrics: dict[str, float]
    history: list[dict[str, Any]]


@dataclass
class Run:
    """Everything that changes as training goes on; `save` writes it and `resume` brings it back."""

    task: Task
    settings: Training
    place: Place
    work: Path
    wrapper: nn.Module  # forward passes go through this
    optimizer: torch.optim.Optimizer
    average: optim.MovingAverage | None
    micro_batch: int
    warmup: int  # steps
    stopping: Callable[[], bool]
    step: int = 0
    sums: Batch = field(default_factory=dict)  # of the epoch's losses, on the device
    bad_step: Tensor = field(default_factory=lambda: torch.tensor(math.inf))  # the first with a loss that is no number
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in the training clips."""
        return len(self.task.train) // self.settings.batch_size

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.steps_per_epoch * self.settings.epochs

    def rate(self, step: int) -> float:
        """The learning rate of a step counted from 0, before the factors of parameter groups."""
        settings = self.settings
        if settings.decay_epochs:
            falls = [round(epoch * self.steps_per_epoch) for epoch in settings.decay_epochs]
            return optim.stepped_rate(step, falls, settings.decay_gamma, self.warmup, settings.lr)
        steps = self.steps_per_epoch * (settings.schedule_epochs or settings.epochs)
        return optim.learning_rate(step, steps, self.warmup, settings.lr, settings.min_lr, settings.schedule)


def build_run(task: Task, settings: Training, place: Place, work: Path, stopping: Callable[[], bool]) -> Run:
    """A run at step 0: seeded, on its device, compiled and wrapped as the settings say. InputError for a dead start."""
    _check_sizes(task, settings, place)
    seed(settings, place)
    module = task.module.to(place.device)
    optim.rest_frozen_parts(module)
    if settings.compile:
        module.compile(mode=settings.compile_mode)
    wrapper = distributed.wrap(module, settings.strategy, place)
    steps_per_epoch = len(task.train) // settings.batch_size
    steps, warmup = steps_per_epoch * settings.epochs, round(steps_per_epoch * settings.warmup_epochs)
    if warmup > steps > 0 and place.leader:
        say(f"warning: a warm-up of {warmup} steps is longer than the run; it is cut to the run's {steps}")
    return Run(
        task=task,
        settings=settings,
        place=place,
        work=work,
        wrapper=wrapper,
        optimizer=optim.build_optimizer(
            module,
            settings.lr,
            settings.weight_decay,
            settings.beta2,
            task.parameter_groups,
            settings.optimizer,
        ),
        average=optim.MovingAverage(task.state(), settings.ema_decay) if settings.ema_decay else None,
        micro_batch=min(settings.micro_batch or settings.batch_size, settings.batch_size // place.world),
        warmup=min(warmup, steps),
        stopping=stopping,
        bad_step=torch.tensor(math.inf, device=place.device),
    )


def _check_sizes(task: Task, settings: Training, place: Place) -> None:
    """InputError for what could only run zero steps or divide unevenly."""
    sizes = ("epochs", "batch_size", "micro_batch")
    for name in (*sizes, "log_interval", "eval_interval", "eval_from", "checkpoint_interval", "profile"):
        least = 0 if name in ("epochs", "profile") else 1
        if (value := getattr(settings, name)) is not None and value < least:
            raise InputError(f"params.yaml: {name} is {value}; it must be at least {least}")
    if settings.schedule_epochs is not None and settings.schedule_epochs < settings.epochs:
        raise InputError(
            f"params.yaml: schedule_epochs is {settings.schedule_epochs}; it must be null or at least epochs "
            f"({settings.epochs})"
        )
    if settings.decay_epochs and (settings.schedule_epochs is not None or min(settings.decay_epochs) <= 0):
        raise InputError(
            f"params.yaml: decay_epochs is {list(settings.decay_epochs)}; its epochs must be above 0, and schedule_epochs, "
            "which belongs to the schedule, null"
        )
    if settings.batch_size % place.world:
        raise InputError(
            f"params.yaml: batch_size {settings.batch_size} is shared by {place.world} processes; make it a multiple"
        )
    if len(task.train) < settings.batch_size:
        raise InputError(
            f"the train split has {len(task.train)} clips, fewer than one batch of {settings.batch_size}; "
            "lower batch_size or bring more clips"
        )
    if not len(task.val):
        raise InputError("the val split is empty, nothing can choose the best weights; raise clean.<dataset>.val_share")


def seed(settings: Training, place: Place) -> None:
    """Start every generator from the seed, differently on each rank; only deterministic kernels where settings say so."""
    random.seed(settings.seed + place.rank)
    np.random.seed(settings.seed + place.rank)
    torch.manual_seed(settings.seed + place.rank)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(settings.deterministic)
    # Filling every new tensor with NaN finds reads of what was never written; on a CPU it costs a sixth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = not settings.deterministic


def check_finite(run: Run) -> None:
    """InputError naming the first step whose loss or gradient was no number, if there was one; waits for the device."""
    bad = distributed.total(run.bad_step, run.place, "min").item()
    if bad < math.inf:
        raise InputError(
            f"the loss or its gradient was no longer a number at step {bad:.0f}; lower lr, or raise warmup_epochs or "
            f"clip_grad, and run again; the state before that is kept in {run.work}"
        )


def save(run: Run) -> None:
    """Write `last`; every rank calls it. Weights that are no numbers are never written."""
    check_finite(run)
    weights = distributed.whole(run.task.state())
    state = {
        "step": run.step,
        "micro_batch": run.micro_batch,
        "optimizer": distributed.whole(run.optimizer.state_dict()),
        "average": distributed.whole(run.average.state) if run.average else None,
        "sums": distributed.gather(distributed.whole(run.sums), run.place),
        "random": distributed.gather(checkpoint.random_state(run.place.device), run.place),
        "history": run.history,
        "meta": run.task.meta,
    }
    if run.task.base:
        state["base"] = run.task.base
    if run.place.leader:
        checkpoint.write(run.work, "last", run.step, weights, state)


def save_best(run: Run, epoch: int, metrics: dict[str, float]) -> None:
    """Write `best`: the averaged weights where there are any."""
    live = run.average.state if run.average else run.task.state()
    weights = distributed.whole(live)
    if run.place.leader:
        checkpoint.write(run.work, "best", run.step, weights, {"step": run.step, "epoch": epoch, "metrics": metrics})


def resume(run: Run) -> None:
    """Put everything back as `last` has it; nothing happens where there is none."""
    place, path = run.place, run.work / "last"
    saved = distributed.from_leader(checkpoint.read(run.work, "last") if place.leader else None, place)
    if saved is None:
        return
    weights, state = saved
    if state.get("base", "") != run.task.base:
        raise InputError(
            f"{path} was trained on other frozen weights (SHA-256 {state.get('base', '')[:12] or 'unknown'}) than these "
            f"({run.task.base[:12] or 'unknown'}); bring those back, or delete {run.work} and run again to start over"
        )
    checkpoint.set_state(run.task.state(), weights, path)
    checkpoint.set_optimizer_state(run.optimizer, state["optimizer"])
    if run.average:
        checkpoint.set_state(run.average.state, state["average"], path)
    run.step, run.history = state["step"], state["history"]
    sums, before = state["sums"], len(state["sums"])
    if before == place.world:
        run.micro_batch = state["micro_batch"]
        run.sums = {key: value.to(place.device) for key, value in sums[place.rank].items()}
        checkpoint.set_random_state(state["random"][place.rank], place.device)
    else:
        run.sums = {key: torch.stack([s[key] for s in sums]).mean(0).to(place.device) for key in sums[0]}
        if place.leader:
            say(f"warning: saved by {before} processes, going on with {place.world}: other rounding, other dropout")
    if place.leader:
        say(f"going on from step {run.step} of {run.steps}")


def outcome(run: Run) -> Fitted:
    """What the finished run hands over."""
    saved = checkpoint.read(run.work, "best")
    if saved is None:
        raise InputError(f"validation {run.task.best[0]} was never a number, so that no weights could be chosen")
    weights, state = saved
    return Fitted(weights, state["step"], state["epoch"], state["metrics"], run.history)
