"""The training loop. It knows that a module in training mode turns a batch into {"loss": …}, and nothing else of it.

`fit` runs the steps, `step` makes one, `forward_backward` its gradients; below them is what happens between steps.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from models.family import Batch, InputError
from tasks.data.batches import GlobalBatches, InOrder, build_loader, read_batches
from tasks.engine import checkpoint, distributed, memory, optim, profiling
from tasks.engine.distributed import Place
from tasks.engine.predictions import SMALL
from tasks.engine.run import Fitted, Run, Task, Training, build_run, check_finite, outcome, resume, save, save_best
from tasks.engine.speed import Speed

__all__ = ["Fitted", "Log", "Stopped", "Task", "Training", "fit"]

Log = Callable[[dict[str, float], int], None]


class Stopped(Exception):
    """SIGTERM came; everything is saved and the same command goes on from here."""


# --- the steps --------------------------------------------------------------------------------------------------------


def fit(task: Task, settings: Training, place: Place, work: Path, log: Log) -> Fitted:
    """Train to the end, from wherever `work` says an earlier attempt had got to when it was killed.

    Raises Stopped after SIGTERM, InputError for settings that cannot work and for a loss that is no number.
    """
    with _sigterm() as stopping:
        run = build_run(task, settings, place, work, stopping)
        resume(run)
        stopped = False
        try:
            _train(run, log if place.leader else _unheard)
        except Stopped:
            stopped = True  # raised anew below: with this exception go the frames that hold the loaders' workers
        except torch.OutOfMemoryError:
            raise InputError(f"out of memory at step {run.step + 1}; set micro_batch below {run.micro_batch}") from None
        if stopped:
            save(run)
            raise Stopped
    return distributed.from_leader(outcome(run) if place.leader else None, place)


def _unheard(metrics: dict[str, float], step: int) -> None:
    """The log of every rank but the first."""


def _train(run: Run, log: Log) -> None:
    settings, place = run.settings, run.place
    num, rank, world = len(run.task.train), place.rank, place.world
    share = {"rank": rank, "world": world, "frequencies": run.task.frequencies}
    order = GlobalBatches(num, settings.batch_size, settings.seed, run.step, run.steps, **share)
    in_order = InOrder(len(run.task.val), settings.batch_size, rank, world)
    val = build_loader(run.task.val, in_order, settings.num_workers, place.device)
    speed = Speed(place.device)
    batches = _totalled(run, read_batches(build_loader(run.task.train, order, settings.num_workers, place.device)))
    batches = speed.waiting(_rehearsed(run, batches, speed))
    profiled = settings.profile if place.leader else 0
    recorded = profiling.recorded(batches, profiled, place.device, run.work / profiling.FOLDER)
    with closing(recorded) as batches:
        _epochs(run, batches, val, speed, log)


def _epochs(run: Run, batches: Iterator[Batch], val: DataLoader[Batch], speed: Speed, log: Log) -> None:
    settings, place, length = run.settings, run.place, run.steps_per_epoch
    end_epoch(run, val, log)  # where the kill came between an epoch's last step and its row
    for epoch in range(run.step // length, settings.epochs):
        title = f"epoch {epoch + 1}/{settings.epochs}"
        with tqdm(desc=title, initial=run.step % length, total=length, unit="step", disable=not place.leader) as bar:
            for batch in islice(batches, length - run.step % length):
                losses = step(run, batch)
                speed.count(settings.batch_size)
                bar.update()
                if run.step % settings.log_interval == 0:
                    figures = _figures(run, losses) | speed.report()
                    bar.set_postfix(loss=f"{figures['loss']:.4g}", refresh=False)
                    log({f"train/{key}": value for key, value in figures.items()}, run.step)
                if distributed.any_rank(run.stopping(), place):
                    raise Stopped
                if run.step % settings.checkpoint_interval == 0:
                    save(run)
        end_epoch(run, val, log)
        speed.restart()


def step(run: Run, batch: Batch) -> Batch:
    """One update of the weights from this rank's share of a global batch; its losses, on the device."""
    optim.set_rate(run.optimizer, run.rate(run.step))
    gradients = partial(forward_backward, run, batch)
    if run.place.world == 1:
        losses, run.micro_batch = memory.within_memory(gradients, run.micro_batch, run.task.module, run.place)
    else:
        losses = gradients(run.micro_batch)
    losses["grad_norm"] = optim.clip(run.task.module.parameters(), run.settings.clip_grad)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if end_step := getattr(run.task.module, "end_step", None):
        end_step(batch)
    distributed.average_statistics(run.task.module, run.place)
    if run.average:
        run.average.update()
    run.step += 1
    _account(run, losses)
    return losses


def forward_backward(run: Run, batch: Batch, micro_batch: int) -> Batch:
    """The losses of a batch, their mean's gradient left in the parameters; micro-batches change neither."""
    module, device, amp = run.task.module, run.place.device, run.settings.amp
    micros = memory.split(batch, micro_batch)
    if len(micros) > 1 and hasattr(module, "joint_loss"):
        return memory.cached_gradients(run.wrapper, module, micros, device, amp)
    mean: Batch = {}
    for micro in micros:
        share = len(micro["row"]) / len(batch["row"])
        with distributed.synchronising(run.wrapper, last=micro is micros[-1]):
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                losses: Batch = run.wrapper(run.task.teach(memory.to_device(micro, device)))
            (losses["loss"] * share).backward()
        for key, value in losses.items():
            mean[key] = mean.get(key, 0) + value.detach() * share
    return mean


# --- between the steps ------------------------------------------------------------------------------------------------


def _totalled(run: Run, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; those that count something (`num_x`) with its sum over the whole step's clips and their number."""
    for batch in batches:
        counts = {key.removeprefix("num_"): value for key, value in batch.items() if key.startswith("num_")}
        if counts:
            sums = distributed.total(torch.stack([value.double().sum() for value in counts.values()]), run.place)
            totals = dict(zip(counts, sums.float(), strict=True))
            totals["clips"] = torch.tensor(float(run.settings.batch_size))
            batch = batch | {f"total_{key}": value for key, value in totals.items()}
        yield batch


def _rehearsed(run: Run, batches: Iterator[Batch], speed: Speed) -> Iterator[Batch]:
    """The same batches; the first one is tried out where memory must be shared out or operations counted beforehand."""
    for index, batch in enumerate(batches):
        if index == 0 and (run.place.world > 1 or run.place.device.type == "cuda"):
            gradients = partial(forward_backward, run, batch)
            attempt = partial(speed.count_flops, gradients) if run.place.device.type == "cuda" else gradients
            run.micro_batch = memory.rehearse(attempt, run.micro_batch, run.wrapper, run.task.module, run.place)
            speed.restart()
        yield batch


def _account(run: Run, losses: Batch) -> None:
    """Add a step to the epoch's sums, and remember the first step whose loss is no number; nothing waits for a GPU."""
    for key, value in losses.items():
        run.sums[key] = run.sums.get(key, 0) + value.double()
    finite = torch.isfinite(losses["loss"]) & torch.isfinite(losses["grad_norm"])
    run.bad_step = torch.where(finite, run.bad_step, run.bad_step.clamp(max=run.step))


def _means(losses: Batch, steps: int, place: Place) -> dict[str, float]:
    """Means over steps and ranks, as numbers: here the device is waited for."""
    values = distributed.total(torch.stack([value.double() for value in losses.values()]), place)
    return dict(zip(losses, (values / steps / place.world).tolist(), strict=True))


def _figures(run: Run, losses: Batch) -> dict[str, float]:
    check_finite(run)
    return _means(losses, 1, run.place) | {"lr": run.rate(run.step - 1)}


def end_epoch(run: Run, val: DataLoader[Batch], log: Log) -> None:
    """The epoch's row in the history, an evaluation where one is due, `best` if it is, and `last`.

    A run of no epochs has one row, of the weights it starts with.
    """
    epoch, untrained = run.step // run.steps_per_epoch, run.settings.epochs == 0
    if len(run.history) >= max(epoch, untrained):
        return
    losses = {} if untrained else _means(run.sums, run.steps_per_epoch, run.place)
    row: dict[str, Any] = {"epoch": epoch, "step": run.step, "lr": 0.0 if untrained else run.rate(run.step - 1)}
    row |= {f"train_{key}": value for key, value in losses.items()}
    due = epoch >= run.settings.eval_from and epoch % run.settings.eval_interval == 0
    if due or epoch == run.settings.epochs:
        check_finite(run)
        metrics = evaluate(run, val)
        log({f"val/{key}": value for key, value in metrics.items()}, run.step)
        row |= {f"val_{key}": value for key, value in metrics.items()}
        if _is_best(run, metrics):
            save_best(run, epoch, metrics)
    run.history.append(row)
    run.sums = {}
    save(run)


def _is_best(run: Run, metrics: dict[str, float]) -> bool:
    """Strictly better than all before; a metric that is no number never is."""
    name, direction = run.task.best
    if name not in metrics:
        raise InputError(f"the phase selects by {name!r}, which is not among its metrics: {', '.join(metrics)}")
    sign = 1 if direction == "max" else -1
    before = [sign * row[f"val_{name}"] for row in run.history if not math.isnan(row.get(f"val_{name}", math.nan))]
    return sign * metrics[name] > max(before, default=-math.inf)


@torch.no_grad()
def evaluate(run: Run, val: DataLoader[Batch]) -> dict[str, float]:
    """Metrics of the validation clips, each counted once, the same on all ranks; averaged weights where there are any.

    A metric sees predictions and the batch's tensors of at most SMALL dimensions: pictures do not cross processes.
    """
    module, metric, newest = run.task.module, run.task.metric(), -1
    weights = run.average.in_place() if run.average else nullcontext()
    with checkpoint.undisturbed(run.place.device), weights:
        module.eval()
        for batch in read_batches(val):
            if distributed.any_rank(run.stopping(), run.place):
                raise Stopped
            known = {key: value for key, value in batch.items() if value.ndim <= SMALL}
            for predictions, seen in distributed.gather((predict(run, batch), known), run.place):
                if int(seen["row"][-1]) > newest:  # a rank without clips repeats the last one
                    metric.update(predictions, seen)
                    newest = int(seen["row"][-1])
        optim.rest_frozen_parts(module)
    return distributed.from_leader(metric.compute() if run.place.leader else None, run.place)


def predict(run: Run, batch: Batch) -> Batch:
    """Predictions for a batch, in float32 and on the CPU."""
    device, parts = run.place.device, []
    for micro in memory.split(batch, run.micro_batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=run.settings.amp):
            parts.append(run.wrapper(memory.to_device(micro, device)))
    whole = {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}
    return {key: value.float() if value.dtype == torch.bfloat16 else value for key, value in whole.items()}


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come, instead of dying of it in the middle of a step."""
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)
