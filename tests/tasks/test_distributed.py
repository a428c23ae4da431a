"""Several processes are one process on the joined batch."""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tasks.data.batches import GlobalBatches
from tasks.engine import checkpoint
from tests.tasks import toy_training as toy


def assert_same(found: Path, expected: Path) -> None:
    for name in ("last", "best"):
        ours, theirs = checkpoint.read(found, name), checkpoint.read(expected, name)
        assert ours is not None and theirs is not None
        assert ours[0].keys() == theirs[0].keys()
        for key, value in theirs[0].items():
            torch.testing.assert_close(ours[0][key], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("kind", "micro_batch"),
    [("Regressor", None), ("Regressor", 3), ("Pairs", None), ("Pairs", 3), ("Counted", None), ("Counted", 3)],
)
def test_two_processes_are_one_on_the_joined_batch(
    tmp_path: Path, strategy: str, kind: str, micro_batch: int | None
) -> None:
    settings = {"ema_decay": 0.8, "epochs": 2}
    toy.train_here(tmp_path / "one", kind=getattr(toy, kind), **settings)
    codes = toy.train_in_two(tmp_path / "two", kind=kind, strategy=strategy, micro_batch=micro_batch, **settings)
    assert codes == [0, 0]
    assert_same(tmp_path / "two", tmp_path / "one")
    one, two = (checkpoint.read(tmp_path / name, "last") for name in ("one", "two"))
    assert one and two
    for row, expected in zip(two[1]["history"], one[1]["history"], strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("optimizer", ["rmsprop", "sgd"])
def test_the_other_optimizers_take_shards(tmp_path: Path, optimizer: str) -> None:
    settings = {"optimizer": optimizer, "epochs": 1, "lr": 1e-3}
    toy.train_here(tmp_path / "one", **settings)
    assert toy.train_in_two(tmp_path / "two", strategy="fsdp", **settings) == [0, 0]
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_processes_go_on_to_the_same_bits(tmp_path: Path, strategy: str) -> None:
    settings = {"ema_decay": 0.8, "epochs": 2, "strategy": strategy, "checkpoint_interval": 3}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert toy.train_in_two(whole, options={"dropout": 0.3}, **settings) == [0, 0]
    codes = toy.train_in_two(killed, options={"dropout": 0.3, "kill_at": 6}, **settings)
    assert codes == [-signal.SIGKILL, -signal.SIGKILL]
    assert toy.train_in_two(killed, options={"dropout": 0.3}, **settings) == [0, 0]
    assert (killed / "digest").read_text() == (whole / "digest").read_text()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_several_processes_tell_of_batch_norm_is_true_of_what_they_save(tmp_path: Path, strategy: str) -> None:
    assert toy.train_in_two(tmp_path, kind="Normed", strategy=strategy, epochs=1) == [0, 0]
    saved = checkpoint.read(tmp_path, "best")
    assert saved
    module = toy.Normed()
    module.load_state_dict(saved[0])
    val = toy.clips(toy.NUM_VAL, 3).tensors
    with torch.no_grad():
        error = (module.eval()(val)["y"] - val["y"]).square().sum() / toy.NUM_VAL
    assert saved[1]["metrics"]["error"] == pytest.approx(float(error), rel=1e-5)


def test_running_statistics_are_the_mean_over_the_processes(tmp_path: Path) -> None:
    assert toy.train_in_two(tmp_path, kind="Normed", epochs=1) == [0, 0]
    x, halves = toy.clips(toy.NUM_TRAIN, 2).tensors["x"], []
    for rank in range(2):
        norm = torch.nn.BatchNorm1d(8)
        for keys in GlobalBatches(toy.NUM_TRAIN, 8, 5, 0, toy.NUM_TRAIN // 8, rank, 2):
            norm(x[[row for _, row in keys]])
        halves.append(norm.state_dict())
    found = toy.last_weights(tmp_path)
    for key in ("running_mean", "running_var"):
        torch.testing.assert_close(found[f"norm.{key}"], (halves[0][key] + halves[1][key]) / 2)


@pytest.mark.slow
def test_killed_processes_with_batch_norm_go_on_to_the_same_bits(tmp_path: Path) -> None:
    settings = {"kind": "Normed", "epochs": 2, "checkpoint_interval": 3}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert toy.train_in_two(whole, **settings) == [0, 0]
    assert toy.train_in_two(killed, options={"kill_at": 6}, **settings) == [-signal.SIGKILL, -signal.SIGKILL]
    assert toy.train_in_two(killed, **settings) == [0, 0]
    assert (killed / "digest").read_text() == (whole / "digest").read_text()


def test_out_of_memory_is_settled_before_the_first_exchange(tmp_path: Path) -> None:
    toy.train_here(tmp_path / "one", epochs=1)
    assert toy.train_in_two(tmp_path / "two", options={"fail_above": 1}, epochs=1) == [0, 0]
    assert_same(tmp_path / "two", tmp_path / "one")


def test_another_number_of_processes_goes_on_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.train_here(tmp_path / "one", epochs=2)
    assert toy.train_in_two(tmp_path / "two", options={"kill_at": 9}, epochs=2) == [-signal.SIGKILL] * 2
    toy.train_here(tmp_path / "two", epochs=2)
    assert "saved by 2 processes, going on with 1" in capsys.readouterr().out
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_memory_that_training_frees_is_not_asked_for_again() -> None:
    code = (
        "import resource\n"
        "from tasks.engine import distributed\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def use(times):\n"
        "    before = faults()\n"
        "    for _ in range(times):\n"
        "        b'x' * (40 << 20)\n"
        "    return faults() - before\n"
        "plain = use(5)\n"
        "with distributed.launched('cpu'):\n"
        "    use(1)\n"
        "    print(plain, use(5))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    plain, kept = map(int, done.stdout.split())
    pages = 40 << 20 >> 12
    assert kept < pages / 10
    assert plain == pytest.approx(5 * pages, rel=0.1), "else there is nothing to gain"
