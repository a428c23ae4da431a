"""When a batch does not fit: smaller pieces of it, with the same gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models.family import Batch, InputError
from tasks.command import say
from tasks.engine import checkpoint, distributed
from tasks.engine.distributed import Place

T = TypeVar("T")


def split(batch: Batch, size: int) -> list[Batch]:
    """A batch in micro-batches of `size` clips; the last one may be smaller. What is a single number goes into each."""
    return [
        {key: value[i : i + size] if value.ndim else value for key, value in batch.items()}
        for i in range(0, len(batch["row"]), size)
    ]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device. A GPU copies it from pinned memory beside the computation that it was given before.

    Nothing waits for the GPU within a step, so that the next batch is asked for, and copied, while this one's is going on.
    """
    copying = _copying(device) if device.type == "cuda" else None
    with torch.cuda.stream(copying) if copying else nullcontext():
        there = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    if copying:
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        for value in there.values():
            value.record_stream(computing)  # else the next batch could take its place before it was read
    return there


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The one stream on which batches go to a GPU; each stream has memory of its own."""
    return torch.cuda.Stream(device)


def cached_gradients(
    wrapper: nn.Module, module: nn.Module, micros: Sequence[Batch], device: torch.device, amp: bool
) -> Batch:
    """Losses, and gradients in place, of a loss that compares all clips of a batch of which only pieces fit.

    Gradient caching (Gao et al. 2021): first all embeddings, without a graph; then the loss on them and its gradient
    there; then each micro-batch again with that gradient flowing into it. Dropout draws the same numbers both times.
    """
    sizes = [len(micro["row"]) for micro in micros]
    states, parts = [], []
    for micro in micros:
        states.append(checkpoint.random_state(device))
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
            parts.append(wrapper(to_device(micro, device), part="embeddings"))
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    joined = {key: value.requires_grad_(value.is_floating_point()) for key, value in joined.items()}
    with distributed.synchronising(wrapper, last=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            losses: Batch = wrapper(joined, part="loss")
        losses["loss"].backward()
    # DDP waits for every parameter in the last backward pass: those of the loss itself take part with a zero.
    own = [parameter for parameter in module.parameters() if parameter.grad is not None]
    gradients = {key: value.grad.split(sizes) for key, value in joined.items() if value.grad is not None}
    for i, micro in enumerate(micros):
        checkpoint.set_random_state(states[i], device)
        last = i == len(micros) - 1
        with distributed.synchronising(wrapper, last):
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                part = wrapper(to_device(micro, device), part="embeddings")
            terms = [(part[key] * gradients[key][i]).sum() for key in gradients]
            terms += [0 * parameter.sum() for parameter in own if last]
            torch.stack(terms).sum().backward()
    return {key: value.detach() for key, value in losses.items()}


def within_memory(attempt: Callable[[int], T], size: int, module: nn.Module, place: Place) -> tuple[T, int]:
    """attempt(size), with half of it where that ran out of memory, from the same random numbers; and the size.

    Every rank decides alike, so `attempt` must not wait for other ranks where it can run out of memory.
    """
    rewind = rewinder(module, place)
    while True:
        result = _try(attempt, size)
        if not distributed.any_rank(result is None, place) and result is not None:
            return result[0], size
        if size == 1:
            raise InputError("out of memory with a single clip; make the model or its input smaller in params.yaml")
        size = (size + 1) // 2
        rewind()
        if place.leader:
            say(f"out of memory: going on with micro-batches of {size}; the batch stays what it is")


def _try(attempt: Callable[[int], T], size: int) -> tuple[T] | None:
    """A result, or None where memory ran out; the exception ends here because its traceback holds the activations."""
    try:
        return (attempt(size),)
    except torch.OutOfMemoryError:
        return None


def rewinder(module: nn.Module, place: Place) -> Callable[[], None]:
    """A function that undoes a forward and backward pass made after this call: random numbers, buffers, gradients."""
    random = checkpoint.random_state(place.device)
    buffers = [buffer.clone() for buffer in module.buffers()]

    @torch.no_grad()
    def rewind() -> None:
        checkpoint.set_random_state(random, place.device)
        for buffer, before in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(before)
        for parameter in module.parameters():
            parameter.grad = None
        if place.device.type == "cuda":
            torch.cuda.empty_cache()

    return rewind


def rehearse(attempt: Callable[[int], T], size: int, wrapper: nn.Module, module: nn.Module, place: Place) -> int:
    """The micro-batch that fits, found by a pass without consequences.

    With DDP, gradients stay at home meanwhile: a rank that runs out of memory amid an exchange would leave the others
    waiting. After this, running out of memory on several GPUs ends the run.
    """
    rewind = rewinder(module, place)
    with wrapper.no_sync() if isinstance(wrapper, DistributedDataParallel) else nullcontext():
        size = within_memory(attempt, size, module, place)[1]
    rewind()
    return size
