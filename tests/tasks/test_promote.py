from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from models.family import InputError
from tasks import promote, tracking, versions

if TYPE_CHECKING:
    from mlflow import MlflowClient

GATE = promote.Promote(min_gain=0.0, num_bootstrap=2000, seed=1)
PARAMS = "promote: {min_gain: 0.0, num_bootstrap: 2000, seed: 1}\n"
CLIPS = 400
Add = Callable[..., int]


@pytest.fixture
def store(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUET_PROJECT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    shutil.copyfile(migrated, tmp_path / "mlflow.db")
    Path("params.yaml").write_text(PARAMS)
    client = tracking.client()
    client.create_registered_model("duet-t3av")
    return client


@pytest.fixture
def add(store: MlflowClient, tmp_path: Path) -> Add:
    """add(right, data="d", size=1): a version whose predictions are right where `right` is; videos of `size` clips."""

    def make(right: np.ndarray, data: str = "d", size: int = 1, shift: int = 0) -> int:
        names = [f"{shift + i:04d}" for i in range(len(right))]
        rows = {"clip": names, "group": [f"{i // size:03d}" for i in range(len(right))], "truth": "None"}
        table = pd.DataFrame(rows | {"prediction_1": np.where(right, "None", "rain"), "score_1": 0.5})
        table.sample(frac=1, random_state=len(right)).to_csv(tmp_path / "predictions.csv", index=False)
        run = store.create_run(tracking.experiment(store, "t3av")).info.run_id
        store.log_artifact(run, str(tmp_path / "predictions.csv"), tracking.EVALUATION)
        tags = {"duet.evaluation_data": data}
        number = int(store.create_model_version("duet-t3av", f"runs:/{run}/model", run, tags).version)
        tracking.set_alias("duet-t3av", "candidate", number)
        tracking.set_alias("duet-t3av", "champion", number, only_if_free=True)
        return number

    return make


def answers(share: float, seed: int, num: int = CLIPS) -> np.ndarray:
    return np.random.default_rng(seed).random(num) < share


def champion(store: MlflowClient) -> int:
    return int(store.get_registered_model("duet-t3av").aliases["champion"])


def test_a_better_candidate_becomes_champion(
    store: MlflowClient, add: Add, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add(answers(0.6, 0))
    add(answers(0.8, 1))
    monkeypatch.setattr(sys, "argv", ["promote", "t3av"])
    promote.main()
    assert capsys.readouterr().out.startswith("promote: duet-t3av 2 is the champion now: top1 0.")
    assert champion(store) == 2
    tags = store.get_model_version("duet-t3av", "2").tags
    assert tags["promotion"] == "promoted"
    assert (tags["promotion.against"], tags["promotion.metric"], tags["promotion.by"]) == ("1", "top1", "command line")
    expected = answers(0.8, 1).mean() - answers(0.6, 0).mean()
    assert float(tags["promotion.difference"]) == pytest.approx(expected, abs=1e-6)
    assert 0 < float(tags["promotion.low"]) < expected < float(tags["promotion.high"])


def test_the_interval_is_that_of_paired_differences(add: Add) -> None:
    """Clips of their own: the normal approximation of a mean of differences. Videos of four copies: twice as wide."""
    for size in (1, 4):
        first, second = (answers(share, seed, CLIPS // size).repeat(size) for share, seed in ((0.7, 0), (0.75, 1)))
        pair = [add(right, data=f"of {size}", size=size) for right in (first, second)]
        old, new = (versions.find(f"models:/duet-t3av/{number}") for number in pair)
        found = promote.compare("t3av", new, old, GATE)
        gain = second.astype(float) - first
        half = float(norm.ppf(0.975)) * gain[::size].std() / np.sqrt(CLIPS / size)
        assert found.low == pytest.approx(gain.mean() - half, abs=0.1 * half + 0.003)
        assert found.high == pytest.approx(gain.mean() + half, abs=0.1 * half + 0.003)


@pytest.mark.parametrize(("min_gain", "moves"), [(0.0, False), (-0.2, True)])
def test_one_not_surely_better_needs_tolerance(store: MlflowClient, add: Add, min_gain: float, moves: bool) -> None:
    add(answers(0.7, 0))
    add(np.roll(answers(0.7, 0), 1))  # as often right, on other clips
    decision = promote.promote("t3av", 2, promote.Promote(min_gain, 2000, 1), "test")
    assert decision.promoted == moves
    assert champion(store) == (2 if moves else 1)
    tags = store.get_model_version("duet-t3av", "2").tags
    assert tags["promotion"] == ("promoted" if moves else "not promoted")


def test_the_same_answers_are_not_worse(store: MlflowClient, add: Add) -> None:
    add(answers(0.7, 0))
    add(answers(0.7, 0))
    decision = promote.promote("t3av", None, GATE, "test")
    assert (decision.difference.low, decision.difference.high) == (0, 0)
    assert champion(store) == 2


@pytest.mark.parametrize(
    ("second", "asked", "message"),
    [
        ({"data": "another"}, None, "scored on other evaluation data than duet-t3av 1 .another, d."),
        ({"shift": 7}, None, "not the same ones"),
        ({}, 1, "duet-t3av 1 is the champion already"),
        ({}, 9, "models:/duet-t3av/9: no such version; there is 1, 2, @candidate, @champion"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    store: MlflowClient, add: Add, second: dict[str, int], asked: int | None, message: str
) -> None:
    add(answers(0.5, 0))
    add(answers(0.9, 1), **second)
    with pytest.raises(InputError, match=message):
        promote.promote("t3av", asked, GATE, "test")
    assert champion(store) == 1
    assert not [key for key in store.get_model_version("duet-t3av", "2").tags if key.startswith("promotion")]


def test_nothing_registered_and_nothing_kept(store: MlflowClient) -> None:
    with pytest.raises(InputError, match="has no version of duet-t3av; register one"):
        promote.promote("t3av", None, GATE, "test")
    run = store.create_run(tracking.experiment(store, "t3av")).info.run_id
    for _ in range(2):
        store.create_model_version("duet-t3av", "x", run)
    with pytest.raises(InputError, match=r"models:/duet-t3av@candidate: no such version; there is 1, 2$"):
        promote.promote("t3av", None, GATE, "test")
    tracking.set_alias("duet-t3av", "champion", 1)
    with pytest.raises(InputError, match="keeps no evaluation/"):
        promote.promote("t3av", 2, GATE, "test")
    with pytest.raises(InputError, match="names no version"):
        versions.find("duet-t3av/1")
