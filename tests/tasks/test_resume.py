"""A run that is killed and started again ends like one that was not: same weights, same best, same history, to the bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from models.family import InputError
from tasks.engine import checkpoint, loop
from tasks.engine.distributed import Place
from tests.tasks import toy_training as toy

RUN: dict[str, Any] = {"ema_decay": 0.9, "micro_batch": 3, "num_workers": 0}
STEPS = toy.NUM_TRAIN // 8 * 3
MICROS = 3  # forward passes a step


def finish(work: Path, **given: Any) -> str:
    process = toy.start(work, **RUN | given)
    process.join(200)
    assert process.exitcode == 0
    return (work / "digest").read_text()


def die(work: Path, **given: Any) -> None:
    process = toy.start(work, **RUN | given)
    process.join(200)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    work = tmp_path_factory.mktemp("whole")
    return finish(work, options={"dropout": 0.3})


def test_killed_at_three_random_steps(tmp_path: Path, uninterrupted: str) -> None:
    draw = random.Random(11)
    for _ in range(3):
        die(tmp_path, options={"dropout": 0.3, "kill_at": draw.randrange(1, 4 * MICROS)})
    assert (tmp_path / "last").is_symlink(), "the kills came so early that nothing had to be resumed"
    assert finish(tmp_path, options={"dropout": 0.3}) == uninterrupted


def test_what_a_module_carries_from_step_to_step_comes_back(tmp_path: Path) -> None:
    whole = finish(tmp_path / "a", kind="Counted")
    die(tmp_path / "b", kind="Counted", options={"kill_at": 7 * MICROS - 1})
    assert finish(tmp_path / "b", kind="Counted") == whole


def test_checkpoints_without_what_is_frozen(tmp_path: Path) -> None:
    """They end as whole ones do, killed or not, and go on upon their own base alone."""
    whole, slim, killed = (tmp_path / name for name in ("whole", "slim", "killed"))
    finish(whole, options={"dropout": 0.3})
    expected = finish(slim, options={"dropout": 0.3}, base="a" * 64)
    die(killed, options={"dropout": 0.3, "kill_at": 7 * MICROS}, base="a" * 64)
    with pytest.raises(InputError, match=r"was trained on other frozen weights \(SHA-256 aaaaaaaaaaaa\)"):
        loop.fit(toy.build_task(), toy.settings(**RUN), Place(torch.device("cpu")), killed, lambda metrics, step: None)
    assert finish(killed, options={"dropout": 0.3}, base="a" * 64) == expected
    frozen = {"frozen.0.weight", "frozen.0.bias", "frozen.1.weight", "frozen.1.bias"}
    for name in ("last", "best"):
        (every, _), (kept, state) = (checkpoint.read(work, name) or ({}, {}) for work in (whole, killed))  # pyright: ignore
        assert every.keys() - kept.keys() == frozen
        assert all(torch.equal(every[key], value) for key, value in kept.items())
        assert not frozen & state.get("average", {}).keys()


@pytest.mark.parametrize("number", range(4, 13, 2))
def test_killed_while_writing(tmp_path: Path, uninterrupted: str, number: int) -> None:
    die(tmp_path, options={"dropout": 0.3}, kill_at_flush=number)
    assert finish(tmp_path, options={"dropout": 0.3}) == uninterrupted


def test_other_workers_and_intervals_change_nothing(tmp_path: Path, uninterrupted: str) -> None:
    changed = {"num_workers": 1, "log_interval": 1, "checkpoint_interval": 1}
    die(tmp_path, options={"dropout": 0.3, "kill_at": 3 * MICROS}, **changed)
    assert finish(tmp_path, options={"dropout": 0.3}, checkpoint_interval=5) == uninterrupted


@pytest.mark.parametrize("num_workers", [0, 1])
def test_sigterm_saves_and_exits_with_143(tmp_path: Path, uninterrupted: str, num_workers: int) -> None:
    options = {"dropout": 0.3}
    process = toy.start(
        tmp_path, **RUN | {"num_workers": num_workers, "checkpoint_interval": 1000}, options=options, slow=0.1
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "step").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.pid
    os.kill(process.pid, signal.SIGTERM)
    asked = time.monotonic()
    process.join(30)
    assert process.exitcode == 143
    assert time.monotonic() - asked < 20
    saved = checkpoint.read(tmp_path, "last")
    assert saved is not None and 0 < saved[1]["step"] < STEPS
    assert finish(tmp_path, options=options) == uninterrupted


def test_a_finished_run_hands_over_again_without_training(tmp_path: Path) -> None:
    first = toy.train_here(tmp_path)
    again = toy.train_here(tmp_path, options={"kill_at": 1})
    assert again.history == first.history
    assert all(torch.equal(again.weights[key], value) for key, value in first.weights.items())


@pytest.mark.parametrize("file", ["weights.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "gone", "foreign"])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, file: str, damage: str) -> None:
    toy.train_here(tmp_path, epochs=1)
    path = tmp_path / "last" / file
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "foreign": b"hello " * 99}[damage])
    with pytest.raises(InputError) as error:
        toy.train_here(tmp_path, epochs=1)
    assert file in str(error.value) and "delete" in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_of_another_architecture_is_one_line(tmp_path: Path) -> None:
    toy.train_here(tmp_path, epochs=1)
    with pytest.raises(InputError, match="another architecture") as error:
        toy.train_here(tmp_path, kind=toy.Pairs, epochs=1)
    assert "\n" not in str(error.value)


def test_resume_state_runs_no_code(tmp_path: Path) -> None:
    toy.train_here(tmp_path, epochs=1)
    torch.save({"step": 1, "evil": Path("x")}, tmp_path / "last" / "state.pt")
    with pytest.raises(InputError, match="damaged"):
        toy.train_here(tmp_path, epochs=1)


def test_random_numbers_continue_after_a_round_trip(tmp_path: Path) -> None:
    import numpy as np

    device = torch.device("cpu")
    np.random.randn(3)
    random.gauss(0, 1)
    torch.save(checkpoint.random_state(device), tmp_path / "state.pt")
    expected = (torch.rand(3), np.random.randn(3), random.gauss(0, 1), random.random())
    checkpoint.set_random_state(torch.load(tmp_path / "state.pt", weights_only=True), device)
    found = (torch.rand(3), np.random.randn(3), random.gauss(0, 1), random.random())
    assert torch.equal(found[0], expected[0]) and (found[1] == expected[1]).all() and found[2:] == expected[2:]
