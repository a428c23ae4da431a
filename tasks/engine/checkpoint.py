"""What a killed run needs to end as if it had never been stopped, on disk in one piece.

A work folder holds `last` and `best`: links to folders that are complete before the link is turned to them, so that a
kill at any moment leaves the old checkpoint or the new one. Weights are safetensors; the rest is read with
torch.load(weights_only=True), which runs no code.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.family import InputError
from tasks.bundle import write_tensors
from tasks.engine import distributed
from tasks.storage import atomic_folder

Name = Literal["last", "best"]


def random_state(device: torch.device) -> dict[str, Any]:
    """Every generator a training step may draw from, as values that torch.load(weights_only=True) reads back."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of `random_state`."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever the block draws, training goes on with the random numbers it would have had."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


def write(work: Path, name: Name, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Make work/<name> the checkpoint of `step`: both files or neither; then the one before it is removed."""
    link = work / name
    target = f"{name}-{step:08d}"
    with atomic_folder(work / target) as folder:
        rest = io.BytesIO()
        torch.save(dict(state), rest)
        write_tensors(folder / "weights.safetensors", weights)
        (folder / "state.pt").write_bytes(rest.getvalue())
        for path in folder.iterdir():
            _flush(path)
    fresh = work / f".{name}.tmp"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)
    _flush(work)
    for old in work.glob(f"{name}-*"):
        if old.name != target:
            shutil.rmtree(old)


def _flush(path: Path) -> None:
    """Force a file or folder to the disk: a machine that loses power must not keep the link and lose the bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(work: Path, name: Name) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(weights, state) of a checkpoint; None when there is none; InputError when it is damaged."""
    folder = work / name
    if not folder.is_symlink():
        return None
    path = folder / "weights.safetensors"
    try:
        weights = load_file(path)
        path = folder / "state.pt"
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged ({reason}); delete {work} and run again to start over") from None
    return weights, state


@torch.no_grad()
def set_state(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], source: Path) -> None:
    """Copy saved tensors into live ones of the same names; the live ones may be sharded."""
    different = sorted(live.keys() ^ saved.keys()) + [k for k in live if k in saved and live[k].shape != saved[k].shape]
    if different:
        raise InputError(
            f"{source} is of another architecture ({different[0]} differs); delete it and run again to start over"
        )
    for key, value in live.items():
        value.copy_(distributed.shard_like(saved[key], value))


def set_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load a whole optimizer state; what is shaped like a parameter is sharded like it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, state in saved["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameters[index].shape and value.ndim:
                state[key] = distributed.shard_like(value, parameters[index])
    optimizer.load_state_dict(saved)
