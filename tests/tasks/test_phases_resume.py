"""Every phase of every family, trained by its real command, ends with the same bytes when it was killed on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import models
from tasks import params
from tasks.checkout import edit_params
from tasks.engine import loop
from tests.tasks import stage_process

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PHASES = [(family, phase) for family in models.names() for phase in models.load(family).phases]
EPOCHS, BATCH = 2, 4
# About the fewest (and shortest) clips that a demo dataset of a format can make.
FEWEST: dict[str, dict[str, float]] = {"activitynet": {"clips": 24, "seconds": 30.0}, "taglists": {"clips": 60}}


def shrink(dataset: str) -> dict[str, object]:
    """What makes a demo dataset small enough for a test."""
    demo = FEWEST.get(params.value("download", dataset, "format"), {"clips": 84})
    return {f"download.{dataset}.demo.{key}": value for key, value in demo.items()} | {
        f"subset.{dataset}.num_train": 3,
        f"subset.{dataset}.num_test": 1,
        f"clean.{dataset}.val_share": 0.25,
        f"clean.{dataset}.max_quarantine": 0.5,
        f"clean.{dataset}.workers": 1,
        f"stores.{dataset}.workers": 1,
        f"stores.{dataset}.short_side": 32,
    }


def tiny(family: str) -> dict[str, dict[str, Any]]:
    """The smallest configs of a family's phases, as sections of params.yaml."""
    phases = models.load(family).phases
    settings = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 1e-4}  # small beside the tolerance of the last test
    return {name: dataclasses.asdict(phases[name].tiny) | settings for name in phases}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose phases have all been trained without interruption."""
    project = tmp_path_factory.mktemp("whole") / "project"
    project.mkdir()
    shutil.copy(ROOT / "params.yaml", project)
    datasets = sorted({params.value(family, "dataset") for family in models.names()})
    sizes = {key: value for dataset in datasets for key, value in shrink(dataset).items()}
    sections = {family: tiny(family) for family in models.names()} | {"train": {"checkpoint_interval": 1}}
    edit_params(project / "params.yaml", sizes, sections)
    stages: list[tuple[str, ...]] = [
        (stage, dataset) for dataset in datasets for stage in ("download", "subset", "clean", "stores")
    ]
    for family, name in PHASES:
        phase = models.load(family).phases[name]
        stages += [("features", family)] if phase.clip(phase.tiny).features else []
        stages.append(("train", family, name))
    for stage, *arguments in stages:
        outcome = stage_process.run(project, stage, *arguments)
        assert outcome.code == 0, outcome.errors
    return project


def kill_at(number: int) -> None:
    """SIGKILL in the middle of this process's step `number`: gradients are there, the weights are not yet updated."""
    gradients, calls = loop.forward_backward, iter(range(1, number + 1))

    def last(*arguments: object, **named: object) -> object:
        result = gradients(*arguments, **named)  # type: ignore[arg-type]
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    loop.forward_backward = last  # type: ignore[assignment]


@pytest.mark.parametrize(("family", "phase"), PHASES)
def test_killed_at_three_random_steps(trained: Path, tmp_path: Path, family: str, phase: str) -> None:
    project, out = tmp_path / "project", Path("artifacts") / family / phase
    shutil.copytree(trained, project)
    shutil.rmtree(project / out)
    draw = random.Random(f"{family} {phase}")
    for _ in range(3):  # each 1 to 3 steps after the start of that attempt
        outcome = stage_process.run(project, "train", family, phase, prepare=partial(kill_at, draw.randrange(1, 4)))
        assert outcome.code == -signal.SIGKILL, outcome.errors
        assert not (project / out).exists(), "a killed run leaves no bundle"
    assert stage_process.run(project, "train", family, phase).code == 0
    assert stage_process.contents(project / out) == stage_process.contents(trained / out)


def ask_for_two() -> None:
    os.environ["DUET_PROCESSES"] = "2"


def test_as_many_processes_as_asked_for_end_where_one_does(trained: Path, tmp_path: Path) -> None:
    family, phase = PHASES[0]
    project, out = tmp_path / "project", Path("artifacts") / family / phase
    shutil.copytree(trained, project)
    shutil.rmtree(project / out)
    outcome = stage_process.run(project, "train", family, phase, prepare=ask_for_two)
    assert outcome.code == 0, outcome.errors
    ours, theirs = (load_file(place / out / "weights.safetensors") for place in (project, trained))
    for name, value in theirs.items():
        # Adam makes whole steps of rounding where a gradient is zero by nature, as of the biases of attention's keys.
        torch.testing.assert_close(ours[name], value, atol=1e-3, rtol=0)
    assert json.loads((project / out / "bundle.json").read_text())["step"] > 0
