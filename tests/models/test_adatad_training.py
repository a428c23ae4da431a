"""adatad in the engine: it learns, a killed run ends with the same bits, and two processes are one on the joined batch."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.engine import distributed, loop
from tasks.engine.run import Task
from tests.tasks import toy_training as toy
from tests.tasks import toy_windows

# Fifteen windows: three steps an epoch, of windows that show none to two segments.
RUN: dict[str, Any] = {"epochs": 3, "batch_size": 4, "ema_decay": 0.9}
APART: dict[str, Any] = RUN | {"build": toy_windows.build_task}  # in a process of its own
CHANGED = {"drop_path": 0.3}  # of the detector: branches are left out at random


def fit(task: Task, work: Path, **changes: Any) -> loop.Fitted:
    place = distributed.Place(torch.device("cpu"))
    return loop.fit(task, toy.settings(**changes), place, work, lambda metrics, step: None)


def test_three_videos_are_learned(tmp_path: Path) -> None:
    task = toy_windows.build_task(dim=64, mlp_dim=128)
    fitted = fit(
        task, tmp_path, epochs=16, batch_size=3, lr=1e-2, warmup_epochs=1.0, clip_grad=10.0, eval_interval=16,
        checkpoint_interval=1000,
    )  # fmt: skip
    assert fitted.metrics["map_average"] > 0.95


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for work, kill_at, code in (
        (whole, 0, 0),
        (killed, 4, -signal.SIGKILL),
        (killed, 2, -signal.SIGKILL),
        (killed, 0, 0),
    ):
        process = toy.start(work, **APART, checkpoint_interval=1, options=CHANGED | {"kill_at": kill_at})
        process.join(200)
        assert process.exitcode == code
    assert (killed / "digest").read_text() == (whole / "digest").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_two_processes_are_one_on_the_joined_batch(tmp_path: Path, micro_batch: int | None) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    fit(toy_windows.build_task(), one, **RUN)
    assert toy.train_in_two(two, **APART, micro_batch=micro_batch) == [0, 0]
    found, expected = changed_weights(two), changed_weights(one)
    assert expected["normalizer"] != toy_windows.build_config().normalizer
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def changed_weights(work: Path) -> dict[str, Tensor]:
    """The last weights, without those that change no attention: their gradient is rounding, which AdamW makes large."""
    weights = toy.last_weights(work)
    return {key: value for key, value in weights.items() if not key.endswith(("key.norm.bias", "key.project.bias"))}
