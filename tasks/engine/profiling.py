"""Where the time of a few training steps goes: PyTorch's profiler, a trace to look at and a page that sums it up."""

from __future__ import annotations

import resource
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from models.family import Batch
from tasks.command import say
from tasks.storage import atomic_folder

WARM_UP = 3  # steps that are not recorded: the first ones compile, allocate and start the loader's workers
OPERATORS = 20  # lines of the summary
FOLDER = "profile"  # within a work folder, and among the run's artifacts
TRACE, SUMMARY = "trace.json.gz", "summary.md"


@dataclass
class Recorded:
    """The recorded steps as a whole."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # seconds, for data


def recorded(
    batches: Iterator[Batch], num_steps: int, device: torch.device, folder: Path
) -> Generator[Batch, None, None]:
    """The same batches; the steps made of `num_steps` of them, after WARM_UP others, are recorded into `folder`.

    Fewer where the run ends before: it must close this iterator. 0 records nothing. The result of a step stays the same.
    """
    if not num_steps:
        yield from batches
        return
    yield from islice(batches, WARM_UP)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    profiler, total = profile(activities=kinds, acc_events=True), Recorded()
    profiler.start()
    began = time.perf_counter()
    try:
        for _ in range(num_steps):
            asked = time.perf_counter()
            batch = next(batches, None)
            total.waited += time.perf_counter() - asked
            if batch is None:
                break
            total.steps += 1
            yield batch
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        total.seconds = time.perf_counter() - began
        profiler.stop()
        if total.steps:
            write(profiler, total, device, folder)
    yield from batches


def write(profiler: profile, total: Recorded, device: torch.device, folder: Path) -> None:
    """The trace, for Perfetto or chrome://tracing, and the page; what `folder` held before is replaced."""
    with atomic_folder(folder) as fresh:
        profiler.export_chrome_trace(str(fresh / TRACE))
        (fresh / SUMMARY).write_text(summary(profiler, total, device))
    say(f"profile of {total.steps} steps: {folder / SUMMARY}")


def summary(profiler: profile, total: Recorded, device: torch.device) -> str:
    """One page of Markdown."""
    on_gpu = device.type == "cuda"

    def own(operator: Any) -> float:  # microseconds in the operator itself, without those that it calls
        return operator.self_device_time_total if on_gpu else operator.self_cpu_time_total

    operators = sorted(profiler.key_averages(), key=own, reverse=True)
    whole = sum(map(own, operators)) or 1.0
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else _resident()
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    lines = [
        "# Where the time of a training step goes",
        "",
        f"- {total.steps} steps on {name}, after {WARM_UP} to warm up; evaluation and checkpoints count where they fall",
        f"- {total.steps / total.seconds:.3g} steps/s, {1000 * total.seconds / total.steps:.4g} ms a step; recording slows them",
        f"- {total.waited / total.seconds:.1%} of the time spent waiting for data",
        f"- {peak / 1e9:.3g} GB of memory at the most, since the process began",
        "",
        f"The {OPERATORS} operators with the most time of their own; the trace beside this page opens in Perfetto.",
        "",
        "| operator | calls a step | ms a step | share |",
        "|---|---:|---:|---:|",
    ]
    for operator in operators[:OPERATORS]:
        key = operator.key.replace("|", "\\|")
        calls, milliseconds = operator.count / total.steps, own(operator) / 1000 / total.steps
        lines.append(f"| {key} | {calls:.4g} | {milliseconds:.4g} | {own(operator) / whole:.1%} |")
    return "\n".join(lines) + "\n"


def _resident() -> int:
    """Bytes of this process in memory at the most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
