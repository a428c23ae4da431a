"""The optimizers beside AdamW and the schedule in steps, against traces and closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.family import InputError, ParameterGroup
from tasks.engine import distributed, optim
from tasks.engine.run import build_run
from tests.tasks import toy_training as toy

HERE = distributed.Place(torch.device("cpu"))


def trace(kind: optim.Kind, lr: float, decay: float, gradients: tuple[float, ...]) -> list[float]:
    """A weight of 2 after each of these gradients."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 2.0)
    optimizer = optim.build_optimizer(module, lr, decay, 0.95, {}, kind)
    seen = []
    for gradient in gradients:
        module.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        seen.append(module.weight.item())
    return seen


def test_rmsprop_is_paddles() -> None:
    assert trace("rmsprop", 0.1, 0.01, (1.0, -0.5, 2.0)) == pytest.approx([1.5411732, 1.7380649, 1.3315271], abs=1e-6)


def test_sgd_with_momentum_and_coupled_decay() -> None:
    weight, velocity, expected = 2.0, 0.0, []
    for gradient in (1.0, -0.5, 2.0):
        velocity = 0.9 * velocity + gradient + 0.01 * weight
        weight -= 0.1 * velocity
        expected.append(weight)
    assert trace("sgd", 0.1, 0.01, (1.0, -0.5, 2.0)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["rmsprop", "sgd"])
def test_groups_are_those_of_adamw(kind: optim.Kind) -> None:
    rules = {"layers.1": ParameterGroup(2.0, decay_all=True)}
    wanted, found = (optim.build_optimizer(toy.Regressor(), 1e-3, 0.3, 0.9, rules, each) for each in ("adamw", kind))
    keys = ("lr", "factor", "weight_decay")
    assert [[g[key] for key in keys] for g in found.param_groups] == [
        [g[key] for key in keys] for g in wanted.param_groups
    ]


@pytest.mark.parametrize("kind", ["rmsprop", "sgd"])
def test_a_stopped_run_goes_on_to_the_same_end(tmp_path: Path, kind: optim.Kind) -> None:
    changes = {"optimizer": kind, "decay_epochs": [1.0, 2.0], "decay_gamma": 0.5, "lr": 1e-3}
    toy.train_here(tmp_path / "whole", epochs=3, **changes)
    toy.train_here(tmp_path / "parts", epochs=2, **changes)
    toy.train_here(tmp_path / "parts", epochs=3, **changes)
    whole, parts = toy.last_weights(tmp_path / "whole"), toy.last_weights(tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_the_rate_falls_in_steps(tmp_path: Path) -> None:
    """Five steps an epoch; half an epoch of warm-up, rounded to 2 steps."""
    changes = {"epochs": 4, "lr": 1.0, "decay_epochs": [1.0, 2.6], "decay_gamma": 0.1, "warmup_epochs": 0.5}
    run = build_run(toy.build_task(), toy.settings(**changes), HERE, tmp_path, lambda: False)
    assert run.steps == 20
    expected = [0.5, *[1.0] * 4, *[0.1] * 8, *[0.01] * 7]
    assert [run.rate(step) for step in range(20)] == pytest.approx(expected)


@pytest.mark.parametrize("changes", [{"decay_epochs": [0.0]}, {"decay_epochs": [2.0], "schedule_epochs": 9}])
def test_two_schedules_are_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"decay_epochs is .* null"):
        toy.train_here(tmp_path, **changes)
