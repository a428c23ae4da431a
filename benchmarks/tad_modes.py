"""What each of adatad's modes costs: time and memory of a training step.

    python benchmarks/tad_modes.py

A window of the preset's own size, or of 96 frames on a CPU, batch 1, with the preset's checkpointing, averaged weights and
augmentation, on random weights and frames; the step is the engine's. Each mode runs in a process of its own: on a GPU if
there is one, in bf16, else on the CPU in fp32, as few CPUs have bf16; there the time is CPU time, which other programs change
little. Memory is the most that PyTorch held at once in the whole process: on a GPU its allocator's own figure, on a CPU the
sum of what the allocator reports to the profiler.

`counted` is analytic: the same steps without their arithmetic, of which the sizes of all tensors that are alive at once are
added up. That needs no memory, so it is told for the preset's own size too, in bf16; kernels' scratch space is not in it, and
which operations keep to fp32 is as PyTorch has it for CPUs.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks import table
from benchmarks.table import Row
from models.adatad import FAMILY
from models.adatad.config import FinetuneConfig
from models.family import Batch, Facts, Sample, Window
from tasks import params
from tasks.data.batches import TensorClips, stack
from tasks.engine import loop
from tasks.engine.distributed import Place
from tasks.engine.run import Run, Task, Training, build_run
from tasks.preset import load_preset

SIZE, FRAMES, STEPS = "thumos_videomae_s", 96, 3  # preset; window on a CPU; steps, the first not timed
PHASE = FAMILY.phases["finetune"]
FACTS = Facts({"label": [f"action {i}" for i in range(20)]}, 0.0, 1.0)
STEP = 4 / 30  # seconds from one stored frame to the next
MODES = [("adapter", True), ("adapter", False), ("frozen", True), ("side", True), ("full", True)]  # checkpointing?


@dataclass(frozen=True)
class Case:
    """A mode of a preset at a number of frames."""

    size: str
    mode: str
    checkpointing: bool
    frames: int  # 0 = the preset's
    amp: bool

    def read(self) -> tuple[FinetuneConfig, Training]:
        """Its values: the preset's, and those of params.yaml that a preset leaves alone."""
        sections = load_preset("adatad", self.size)["adatad"]
        values = params.section("train") | sections["finetune"] | {"model": sections["model"], "start_from": "none"}
        parts = [
            params.typed(kind, {key: values[key] for key in kind.__dataclass_fields__}, "adatad.finetune")
            for kind in (FinetuneConfig, Training)
        ]
        config, settings = cast(tuple[FinetuneConfig, Training], tuple(parts))
        settings = replace(settings, batch_size=1, micro_batch=1, deterministic=False, amp=self.amp)
        model = config.model
        backbone = replace(model.backbone, mode=self.mode, checkpointing=self.checkpointing)
        model = replace(model, backbone=backbone, window=self.frames // model.scale_factor or model.window)
        return replace(config, model=model), settings


@dataclass(frozen=True)
class Cost:
    """What a case was found to cost."""

    trained: int  # parameters
    total: int
    seconds: float  # of a step: on a CPU of all cores together
    memory: int  # bytes


def build_batch(config: FinetuneConfig) -> Batch:
    """A window of noise in which an action begins every ten seconds, as the loader hands it over."""
    rng = np.random.default_rng(0)
    num = config.model.window * config.model.scale_factor
    starts = np.arange(0.0, num * STEP, 10.0)
    annotation = {"segments": [(start, start + 4.0, "action 0") for start in starts]}
    pictures = rng.integers(0, 256, (num, 182, 324, 3), dtype=np.uint8)
    sample = Sample("noise", pictures, None, annotation, rng, window=Window(0, STEP, num * STEP, 0))
    batch = stack([{**PHASE.transform(config, FACTS, True)(sample), "row": torch.tensor(0)}])
    return batch | {"total_positive": batch["num_positive"].sum().float(), "total_clips": torch.tensor(1.0)}


def begin(case: Case, batch: Batch, place: Place) -> Run:
    """A run of the case at its first step."""
    config, settings = case.read()
    torch.manual_seed(0)
    module, clips = PHASE.build(config, FACTS), TensorClips({"row": batch["row"]})
    task = Task(
        module, clips, clips, lambda: PHASE.metrics(config, FACTS), PHASE.best,
        parameter_groups=PHASE.parameter_groups(config),
    )  # fmt: skip
    return build_run(task, settings, place, Path(), lambda: False)


# --- measured ------------------------------------------------------------------------------------------------------------


def measure(case: Case, steps: int, place: Place) -> Cost:
    """Run steps: the first one makes the optimizer's state, the median of the others is the time."""
    on_gpu = place.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    batch = build_batch(case.read()[0])
    with (
        nullcontext()
        if on_gpu
        else profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded
    ):
        batch = {key: value.to(place.device, copy=True) for key, value in batch.items()}
        run, times = begin(case, batch, place), []
        for _ in range(steps):
            began = clock()
            losses = loop.step(run, batch)
            assert losses["loss"].isfinite()  # waits for the device
            times.append(clock() - began)
    memory = torch.cuda.max_memory_allocated() if on_gpu else most_allocated(recorded)
    counts = [(p.numel(), p.requires_grad) for p in run.task.module.parameters()]
    return Cost(sum(n for n, own in counts if own), sum(n for n, _ in counts), statistics.median(times[1:]), memory)


def most_allocated(recorded: Any) -> int:
    """The largest sum of bytes that a profile's allocations and releases ever come to."""
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


# --- counted -------------------------------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """Adds up the storages of tensors as they come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What the operation gives, noted."""
        result = func(*args, **kwargs or {})
        tree_map_only(Tensor, self.note, result)
        return result

    def note(self, tensor: Tensor) -> None:
        """A storage counts from when it is first seen until the last tensor on it is gone."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.release, key, size)

    def release(self, key: int, size: int) -> None:
        """Its memory is free."""
        self.known.remove(key)
        self.now -= size


def count(case: Case) -> int:
    """Bytes alive at most in two steps of which only the tensors' shapes are worked out."""
    batch = build_batch(case.read()[0])
    stay = patch.object(
        nn.Module, "to", lambda module, device: module
    )  # its tensors cannot be exchanged, nor need they
    with FakeTensorMode(allow_non_fake_inputs=True), stay, Alive() as alive:
        batch = {key: torch.empty_like(value, device="cpu") for key, value in batch.items()}
        run = begin(case, batch, Place(torch.device("cpu")))
        for _ in range(2):
            loop.step(run, batch)
    return alive.most


# --- the rows ------------------------------------------------------------------------------------------------------------


def modes(quick: bool) -> Iterator[Row]:
    """Time and memory of a step of each mode."""
    on_gpu = torch.cuda.is_available()
    place, kind = Place(torch.device("cuda" if on_gpu else "cpu")), "bf16" if on_gpu else "fp32"
    whole = Case(SIZE, "adapter", True, 0, on_gpu).read()[0].model
    frames = whole.window * whole.scale_factor if on_gpu else 32 if quick else FRAMES
    for mode, checkpointing in MODES[: 1 if quick else None]:
        case = Case(SIZE, mode, checkpointing, frames, on_gpu)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            cost = pool.submit(measure, case, 2 if quick else STEPS, place).result()
        title = f"adatad step of {frames} frames, {kind}, mode {mode}" + ("" if checkpointing else ", no checkpointing")
        trained = f"trains {cost.trained / 1e6:.1f} of {cost.total / 1e6:.1f} M parameters"
        yield Row(title, "s" if on_gpu else "CPU s", cost.seconds, note=trained)
        same, large = (count(each) / 2**30 for each in (case, replace(case, frames=0, amp=True)))
        note = f"counted: {same:.2f}; of {whole.window * whole.scale_factor} frames in bf16 {large:.2f}"
        yield Row(f"{title}, memory", "GiB", cost.memory / 2**30, note=note)


PARTS = {"modes": modes}

if __name__ == "__main__":
    table.main(__doc__, PARTS)
