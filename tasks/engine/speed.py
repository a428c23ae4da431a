"""How fast training goes: what is logged beside the losses, measured without making the device wait."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.family import Batch


class Speed:
    """Samples per second, the share of time spent waiting for data, memory, and model FLOP utilisation on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flops_per_step = 0  # of this process; 0 = unknown, then no utilisation is told
        self.ceiling = matmul_ceiling(device) if device.type == "cuda" else 0.0  # FLOP/s
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self.began, self.waited, self.steps, self.samples = time.perf_counter(), 0.0, 0, 0

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with the time each took to arrive added up."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def count(self, samples: int) -> None:
        """One step over so many clips (of all processes)."""
        self.steps += 1
        self.samples += samples

    def count_flops(self, gradients: Callable[[int], object], micro_batch: int) -> object:
        """Count the floating-point operations of a step's gradients, uncompiled: fused kernels would hide them."""
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            result = gradients(micro_batch)
        self.flops_per_step = counter.get_total_flops()
        return result

    def report(self) -> dict[str, float]:
        """The interval's figures; called where the losses were read, so that the device has caught up."""
        seconds = time.perf_counter() - self.began
        figures = {
            "samples_per_second": self.samples / seconds,
            "data_wait_share": self.waited / seconds,
            "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }
        if self.device.type == "cuda":
            figures["peak_cuda_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        if self.flops_per_step and self.ceiling:
            figures["mfu"] = self.flops_per_step * self.steps / seconds / self.ceiling
        self.restart()
        return figures


def matmul_ceiling(device: torch.device, size: int = 8192, repeats: int = 10) -> float:
    """FLOP/s of a large bf16 matrix product on this GPU, what utilisation is measured against."""
    matrix = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    torch.mm(matrix, matrix)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        torch.mm(matrix, matrix)
    end.record()
    end.synchronize()
    return 2 * size**3 * repeats / (start.elapsed_time(end) / 1000)
