from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest

from models.family import InputError
from tasks import bundle, graph, journal, predict, register, storage, summary, tracking, versions
from tasks.data import manifest

if TYPE_CHECKING:
    from mlflow import MlflowClient

Write = Callable[..., Path]
CHECKPOINT, EVALUATION, OUT = (Path("artifacts/t3av") / name for name in ("finetune", "evaluate", "register"))
METRICS = {"top1": 0.91, "top1_low": 0.85, "top1_high": 0.96, "num_clips": 96.0}
EVALUATED = {
    "report.html": "<h1>report</h1>",
    "predictions.csv": "clip,truth\n",
    "plots/shapley.csv": "part\n",
    "plots/shapley.png": "a",
}


@pytest.fixture
def project(
    tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch, write_clip: Write, write_bundle: Write
) -> Path:
    """A workspace in which everything before `register` is done, as DVC would restore it, and a new MLflow store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DUET_TRACKING")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(journal, "_start_delivery", lambda: None)
    shutil.copyfile(migrated, tmp_path / "mlflow.db")
    write_clip(Path("data/sounds/raw/video/x_000000.mp4"))
    row = dict.fromkeys(manifest.COLUMNS, 0) | {"id": "x_000000", "path": "raw/video/x_000000.mp4", "split": "test",
                                                "group": "x", "checksum": "ab", "annotation": "{}"}  # fmt: skip
    manifest.write(pd.DataFrame([row]), manifest.manifest_path("sounds"))
    write_bundle(CHECKPOINT)
    write_metrics(METRICS)
    lock = "stages: {clean@sounds: {cmd: x, outs: [{path: data/sounds/clean, md5: abc.dir}]}}\n"
    Path("dvc.lock").write_text(lock)
    Path("params.yaml").write_text("download: {sounds: {source: https://me:hidden@host/clips}}\n")
    return tmp_path


def write_metrics(metrics: dict[str, float]) -> None:
    EVALUATION.mkdir(parents=True, exist_ok=True)
    (EVALUATION / "metrics.json").write_text(json.dumps(metrics))
    for name, text in EVALUATED.items():
        (EVALUATION / name).parent.mkdir(exist_ok=True)
        (EVALUATION / name).write_text(text)


def run_register() -> dict:
    register.register("t3av", CHECKPOINT, EVALUATION, OUT)
    return json.loads((OUT / "version.json").read_text())


def numbers(store: MlflowClient) -> list[int]:
    return sorted(int(version.version) for version in store.search_model_versions("name = 'duet-t3av'"))


def test_versions_come_and_stay(project: Path, write_bundle: Write) -> None:
    store = tracking.client()
    with tracking.run("finetune@t3av", {}) as run:
        run.tag({"duet.sha256": storage.file_digest(CHECKPOINT / "weights.safetensors")})

    first = run_register()
    assert (first["name"], first["version"], first["aliases"]) == ("duet-t3av", 1, ["candidate", "champion"])
    version = store.get_model_version("duet-t3av", "1")
    assert version.tags["duet.sha256"] == storage.file_digest(CHECKPOINT / "weights.safetensors")
    assert version.tags["test.top1"] == "0.91"
    assert version.tags["dvc.dep.data/sounds/clean"] == "abc.dir"
    assert len(version.tags["duet.evaluation_data"]) == 64
    assert version.tags["git.commit"]
    assert store.get_run(version.tags["duet.train_run"]).data.tags["duet.run"] == run.id
    assert version.run_id is not None
    assert store.get_run(version.run_id).data.metrics == {f"test/{key}": value for key, value in METRICS.items()}
    for name, text in EVALUATED.items():
        kept = Path(store.download_artifacts(version.run_id, f"evaluation/{name}", str(project)))
        assert kept.read_text() == text
    assert store.get_run(version.run_id).info.status == "FINISHED"
    assert versions.lock(versions.find("models:/duet-t3av/1")) == graph.stages()
    source = Path(store.download_artifacts(version.run_id, "source/params.yaml", str(project))).read_text()
    assert source == "download: {sounds: {source: https://***@host/clips}}\n"

    written = (OUT / "version.json").read_bytes()
    assert run_register() == first  # the same again makes nothing new
    assert (OUT / "version.json").read_bytes() == written
    assert numbers(store) == [1]

    write_metrics(METRICS | {"top1": 0.5})  # another evaluation of the same weights
    assert run_register()["version"] == 2
    write_bundle(CHECKPOINT, seed=1)  # other weights
    third = run_register()
    assert (third["version"], third["aliases"]) == (3, ["candidate"])
    assert int(store.get_registered_model("duet-t3av").aliases["champion"]) == 1
    assert "0.500   [0.850, 0.960]" in "\n".join(summary.summary(Path("artifacts/t3av")))


def test_a_version_answers_like_its_bundle(project: Path) -> None:
    run_register()
    clip = Path("data/sounds/raw/video/x_000000.mp4")
    expected = predict.load_predictor("t3av", str(CHECKPOINT)).predict([clip])
    assert predict.load_predictor("t3av", "models:/duet-t3av@champion").predict([clip]) == expected

    import mlflow

    model = mlflow.pyfunc.load_model("models:/duet-t3av@candidate")
    answers = model.predict(pd.DataFrame({"video": [base64.b64encode(clip.read_bytes()).decode()]}), params={"top": 1})
    assert answers["label"].tolist() == [expected[0]["label"]]
    assert len(json.loads(answers["answer"][0])["top"]) == 1
    assert model.metadata.signature is not None
    assert not list((project / "mlruns").rglob("*.pkl"))


def test_unknown_version_is_one_line(project: Path) -> None:
    with pytest.raises(InputError, match="duet-t3av"):
        predict.load_predictor("t3av", "models:/duet-t3av@champion")


def test_a_failure_leaves_nothing_behind(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is logged but answers otherwise than the bundle: no version, no model, no run."""
    monkeypatch.setattr(register, "table", lambda answers: predict.table(answers).assign(score=2.0))
    with pytest.raises(ValueError, match="answers"):
        run_register()
    store = tracking.client()
    experiment = store.get_experiment_by_name("t3av")
    assert experiment is not None
    assert numbers(store) == []
    assert store.search_registered_models() == []
    assert list(store.search_logged_models([experiment.experiment_id])) == []
    assert list(store.search_runs([experiment.experiment_id])) == []
    assert not OUT.exists()
    monkeypatch.undo()


def test_what_is_missing_is_named(project: Path) -> None:
    (EVALUATION / "metrics.json").unlink()
    with pytest.raises(InputError, match=r"metrics\.json"):
        run_register()
    write_metrics(METRICS)
    Path("data/sounds/raw/video/x_000000.mp4").write_bytes(b"")
    with pytest.raises(InputError, match="x_000000"):
        run_register()


def test_mlflow_serves_a_version(project: Path) -> None:
    run_register()
    clip = Path("data/sounds/raw/video/x_000000.mp4")
    expected = predict.Predictor(bundle.load(CHECKPOINT)).predict([clip])[0]["label"]
    video = base64.b64encode(clip.read_bytes()).decode()
    (project / "input.json").write_text(json.dumps({"dataframe_records": [{"path": str(clip)}, {"video": video}]}))
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "predict",
        "-m",
        "models:/duet-t3av@champion",
        "-i",
        "input.json",
    ]
    command += ["--content-type", "json", "--env-manager", "local", "-o", "output.json"]
    done = subprocess.run(
        command, env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads((project / "output.json").read_text())["predictions"]
    assert [answer["label"] for answer in answers] == [expected, expected]
