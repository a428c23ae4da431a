"""Smaller versions of a tiny wildlife model: their size, their scores, and that the registry gives them back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from models.weights import Int8Linear
from tasks import bundle, compact, journal, predict, register, storage, tracking
from tasks.compact import Compact
from tests.tasks import toy_animals

SETTINGS = Compact(batch_size=5, num_workers=0, warmup=1, repeats=3)
OUT = Path("artifacts/wildlife/compact")
CLIP = Path("data/animals/raw/test_00.mp4")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything before `compact` done."""
    root = tmp_path_factory.mktemp("compact")
    toy_animals.write_project(root)
    return root


@pytest.fixture
def made(project: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, compact.Variant]:
    monkeypatch.chdir(project)
    return {variant.name: variant for variant in compact.make("wildlife")}


def size(variant: compact.Variant) -> int:
    return (variant.folder / bundle.WEIGHTS).stat().st_size


def test_int8_files_are_a_quarter(made: dict[str, compact.Variant]) -> None:
    assert list(made) == ["full", "student", "int8", "student-int8"]
    assert size(made["int8"]) < 0.27 * size(made["full"])
    assert size(made["student-int8"]) < 0.27 * size(made["student"])
    assert size(made["student"]) < 0.5 * size(made["full"])
    before = {name: storage.file_digest(variant.trained.path) for name, variant in made.items()}
    again = {variant.name: storage.file_digest(variant.trained.path) for variant in compact.make("wildlife")}
    assert again == before
    assert made["int8"].trained.meta["quantised_from"] == before["full"]


def test_int8_bundles_answer_nearly_alike(made: dict[str, compact.Variant]) -> None:
    for small, large in (("int8", "full"), ("student-int8", "student")):
        ours, theirs = made[small].trained.module(), made[large].trained.module()
        assert any(isinstance(part, Int8Linear) for part in ours.modules())
        batch = compact.stack([made[large].clips[0, row] for row in range(6)])
        with torch.no_grad():
            found, expected = ours(batch), theirs(batch)
        for key in ("species_logits", "activity_logits"):
            assert (found[key] - expected[key]).norm() < 0.1 * expected[key].norm(), (small, key)


def test_the_table_has_scores_and_their_drops(made: dict[str, compact.Variant]) -> None:
    table, judged = compact.compare(list(made.values()), SETTINGS)
    assert table["model"].tolist() == list(made)
    full = table.iloc[0]
    for head in ("species", "activity", "mean"):
        drops = full[f"{head}_macro_f1"] - table[f"{head}_macro_f1"]
        np.testing.assert_allclose(table[f"{head}_macro_f1_drop"], drops, atol=1e-12)
    assert (table["latency_p95_ms"] >= table["latency_p50_ms"]).all()
    assert (table["latency_p50_ms"] > 0).all()
    assert table["size_mb"].tolist() == [size(variant) / 1e6 for variant in made.values()]
    assert "latency_p50_ms" not in judged["int8"], "a version is known by what does not change from run to run"
    text = compact.markdown(table, "note")
    assert text.count("\n") == 6 and text.endswith("note")


@pytest.mark.slow
def test_versions_come_once_and_load_from_the_registry(
    project: Path, tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch, write_clip: Callable[..., Path]
) -> None:
    root = tmp_path / "project"
    shutil.copytree(project, root)
    monkeypatch.chdir(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    monkeypatch.setattr(journal, "_start_delivery", lambda: None)
    shutil.copyfile(migrated, root / "mlflow.db")
    write_clip(CLIP)
    table, versions = compact.compact("wildlife", SETTINGS, OUT)
    assert versions == json.loads((OUT / "versions.json").read_text()) == {"student": 1, "int8": 2, "student-int8": 3}
    assert compact.compact("wildlife", SETTINGS, OUT)[1] == versions
    pd.testing.assert_series_equal(pd.read_csv(OUT / "table.csv")["model"], table["model"])
    aliases = tracking.client().get_registered_model("duet-wildlife").aliases
    assert {key: int(value) for key, value in aliases.items()} == versions

    import mlflow

    for alias, folder in (("student", "distill"), ("int8", "int8"), ("student-int8", "student-int8")):
        expected = predict.load_predictor("wildlife", f"artifacts/wildlife/{folder}").predict([CLIP])
        assert predict.load_predictor("wildlife", f"models:/duet-wildlife@{alias}").predict([CLIP]) == expected
        answers = mlflow.pyfunc.load_model(f"models:/duet-wildlife@{alias}").predict(
            pd.DataFrame({"path": [str(CLIP)]})
        )
        assert answers["species"].tolist() == [expected[0]["species"]]
        assert answers["activity_score"].tolist() == [expected[0]["activity_score"]]

    scored = root / "evaluation"
    scored.mkdir()
    (scored / "metrics.json").write_text("{}")
    register.register("wildlife", Path("artifacts/wildlife/finetune"), scored, root / "registered")
    aliases = tracking.client().get_registered_model("duet-wildlife").aliases
    assert {int(aliases["candidate"]), int(aliases["champion"])} == {4}, "a smaller version never takes their place"
