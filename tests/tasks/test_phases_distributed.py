"""Two processes are one on the joined batch, by DDP and by FSDP: every phase of every family, because it exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.data.batches import GlobalBatches, stack
from tasks.engine import checkpoint
from tasks.engine.distributed import Place
from tests import toy_phases
from tests.tasks import toy_training as toy
from tests.toy_phases import BATCH, NUM_TRAIN, PHASES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work folders of all phases, trained by two processes."""
    work = tmp_path_factory.mktemp("two")
    codes = toy.in_two(partial(toy_phases.train_all, work))
    assert codes == [0, 0], f"after {sorted(str(path.relative_to(work)) for path in work.glob('*/*/last'))}"
    return work


@dataclass(frozen=True)
class Alone:
    """A phase trained by one process."""

    case: tuple[str, str]
    work: Path
    start: dict[str, Tensor]
    batch_norm: bool  # it then sees what each of two processes would hold of the batch


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As each of the two processes has: with more, convolutions take other kernels, and batch norm enlarges the rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=PHASES, ids="-".join, scope="module")
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Alone:
    case, work = request.param, tmp_path_factory.mktemp("one")
    task = toy_phases.task_of(*case)
    start, batch_norm = (
        {key: value.clone() for key, value in task.module.state_dict().items()},
        toy_phases.has_batch_norm(task.module),
    )
    toy_phases.train(task, work, Place(torch.device("cpu")), micro_batch=BATCH // 2 if batch_norm else None)
    return Alone(case, work, start, batch_norm)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_one_on_the_joined_batch(trained: Path, alone: Alone, strategy: str) -> None:
    for name in ("last", "best"):
        found, expected = both(trained / strategy / "-".join(alone.case), alone.work, name)
        assert found[1]["step"] == expected[1]["step"] == NUM_TRAIN // BATCH
        assert found[0].keys() == expected[0].keys() == alone.start.keys()
        for key, value in expected[0].items():
            # Running statistics are the mean over both halves of a batch, not one half after the other.
            if not (alone.batch_norm and key.endswith(("running_mean", "running_var", "num_batches_tracked"))):
                torch.testing.assert_close(
                    found[0][key], value, atol=1e-6, rtol=1e-5, msg=partial("{}: {}".format, key)
                )
        assert max((value - alone.start[key]).abs().max() for key, value in expected[0].items()) > 1e-4


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_both_tell_the_same_of_the_run(trained: Path, alone: Alone, strategy: str) -> None:
    if alone.batch_norm:
        pytest.skip("evaluated with other running statistics")
    found, expected = both(trained / strategy / "-".join(alone.case), alone.work, "last")
    assert found[1]["history"] == [pytest.approx(row, rel=1e-4, abs=1e-6) for row in expected[1]["history"]]


def both(found: Path, expected: Path, name: checkpoint.Name) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    return [saved for saved in (checkpoint.read(work, name) for work in (found, expected)) if saved]


def test_texts_are_longer_in_one_process_than_in_the_other() -> None:
    """What the phases with texts are tried with above: else a mean of the processes' means would pass as well."""
    clips = toy_phases.task_of("avlformer", "finetune").train
    halves = [GlobalBatches(NUM_TRAIN, BATCH, 5, 0, 2, rank, 2) for rank in range(2)]
    lengths = [[stack([clips[key] for key in keys])["text"].shape[1] for keys in half] for half in halves]
    assert lengths[0] != lengths[1]
