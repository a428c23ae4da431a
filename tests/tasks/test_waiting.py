"""A training step of every phase leaves the device to itself: nothing in it waits for a value that a GPU would compute."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import transforms
from tasks.data.batches import stack
from tasks.engine import loop
from tasks.engine.distributed import Place
from tasks.engine.run import build_run
from tests import toy_phases
from tests.tasks import toy_training as toy
from tests.toy_phases import BATCH, PHASES, SETTINGS

# What Python asks of a tensor; on a CPU some of it never reaches an operator.
ASKED = {
    getattr(Tensor, name)
    for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__")
}
# Operators whose result, or the shape of it, the host must know; so it is with an index or a condition of bools, too.
KNOWN = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount", "is_nonzero"}


class Asked(TorchFunctionMode):
    """Notes where Python asks, or copies to the device and waits; of the tensors here only those in `host` lie elsewhere."""

    def __init__(self, found: list[str], host: Iterable[Tensor]) -> None:
        self.found, self.host = found, {tensor.untyped_storage().data_ptr() for tensor in host}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        blocking = any(isinstance(given, torch.device) for given in (*args[1:], *kwargs.values()))
        blocking = blocking and not kwargs.get("non_blocking")
        copies = func is Tensor.to and args[0].untyped_storage().data_ptr() in self.host
        if func in ASKED or (blocking and (copies or func in (torch.tensor, torch.as_tensor))):
            self.found.append(f"{func.__name__} in {place()}")
        return func(*args, **kwargs)


class Known(TorchDispatchMode):
    """Notes the operators that wait, those of backward passes and optimizers among them."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, _, overload = func.name().removeprefix("aten::").partition(".")
        by_bools = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        counted = name == "repeat_interleave" and overload == "Tensor" and not (kwargs or {}).get("output_size")
        if name in KNOWN or by_bools or counted:
            self.found.append(f"{func.name()} in {place()}")
        return func(*args, **(kwargs or {}))


def place() -> str:
    """The innermost line of ours."""
    ours = Path(__file__).parents[2]
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ours)]
    frame = next((frame for frame in reversed(frames) if frame.filename != __file__), frames[-1])
    return f"{frame.filename}:{frame.lineno} {frame.line}"


@contextmanager
def waits(host: Iterable[Tensor] = ()) -> Any:
    """What waits for the device within the block, filled as it happens."""
    found: list[str] = []
    with ExitStack() as modes:
        modes.enter_context(Asked(found, host))
        modes.enter_context(Known(found))
        yield found


@pytest.mark.parametrize("case", PHASES, ids="-".join)
def test_a_step_waits_for_nothing(case: tuple[str, str], tmp_path: Path) -> None:
    task = toy_phases.task_of(*case)
    settings = toy.settings(**SETTINGS | {"optimizer": "adamw"})
    run = build_run(task, settings, Place(torch.device("cpu")), tmp_path, lambda: False)
    (batch,) = loop._totalled(run, iter([stack([task.train[0, row] for row in range(BATCH)])]))
    with waits(batch.values()) as found:
        loop.step(run, batch)
    assert not found


def test_changed_pictures_wait_for_nothing() -> None:
    frames = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    changes = {"color": torch.full((2, 4), 0.9), "affine": torch.eye(3)[:2].expand(2, 2, 3), "solarize": torch.ones(2)}
    with waits() as found:
        transforms.change(frames, changes)
    assert not found


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.detach().numpy(),
        lambda x: bool((x > 0).any()),
        lambda x: int(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.unique(),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.to(torch.device("cpu")),
        lambda x: torch.autograd.grad((x[x > 0] ** 2).sum(), x),
    ],
)
def test_what_waits_is_noticed(ask: Callable[[Tensor], object]) -> None:
    x = torch.ones(3, requires_grad=True)
    with waits([x]) as found:
        ask(x)
    assert found


def test_what_goes_on_beside_the_device_is_not() -> None:
    x, y = torch.ones(3), torch.zeros(3)
    with waits([x]) as found:
        z = x.to(torch.device("cpu"), non_blocking=True) + y.to(torch.float64)
        torch.where(z > 0, z, 0.0).masked_fill(z > 1, 2.0)[:, None].sum()
    assert not found
