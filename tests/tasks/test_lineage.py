from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ruamel.yaml import YAML

from models.family import InputError
from tasks import journal, lineage, tracking, versions

if TYPE_CHECKING:
    from mlflow import MlflowClient

RAW, CLEAN, PRETRAIN, FINETUNE = "data/s/raw", "data/s/clean", "artifacts/t3av/pretrain", "artifacts/t3av/finetune"
PARAMS = {
    "clean": {"s": {"share": 0.15, "seed": 1}},
    "train": {"seed": 42, "lr": 0.5},
    "t3av": {"model": {"dim": 8}, "pretrain": {"lr": 0.001}, "finetune": {"lr": 0.1, "augment": {"gain": 6.0}}},
}
SHA = {"pretrain@t3av": "1" * 64, "finetune@t3av": "2" * 64}


def entry(out: str, md5: str, deps: dict[str, str], **params: Any) -> dict[str, Any]:
    return {
        "cmd": "x",
        "deps": [{"path": path, "md5": value} for path, value in {**deps, "tasks/train.py": "code"}.items()],
        "params": {"params.yaml": params},
        "outs": [{"path": out, "md5": md5}],
    }


def lock(gain: float = 6.0) -> dict[str, Any]:
    """What DVC writes: stage by stage what it read, with what, and what came out; params in alphabetical order."""
    model, shared = {"t3av.model": {"dim": 8}}, {"train": {"seed": 42, "lr": 0.5}}
    tuned = {"t3av.finetune": {"lr": 0.1, "augment": {"gain": gain}}}
    return {
        "download@s": entry(RAW, "raw.dir", {}),
        "clean@s": entry(CLEAN, "clean.dir", {RAW: "raw.dir"}, **{"clean.s": {"share": 0.15, "seed": 1}}),
        "pretrain@t3av": entry(
            PRETRAIN, "pre.dir", {CLEAN: "clean.dir"}, **{"t3av.pretrain": {"lr": 0.001}}, **model, **shared
        ),
        "finetune@t3av": entry(
            FINETUNE, "fine.dir", {CLEAN: "clean.dir", PRETRAIN: "pre.dir"}, **tuned, **model, **shared
        ),
    }


def write_yaml(path: Path, content: Any) -> Path:
    with path.open("w") as file:
        YAML().dump(content, file)
    return path


@pytest.fixture
def store(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A git repository with params.yaml and dvc.lock, whose stages' runs are in MLflow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DUET_TRACKING")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(journal, "_start_delivery", lambda: None)
    shutil.copyfile(migrated, tmp_path / "mlflow.db")
    write_yaml(tmp_path / "params.yaml", PARAMS)
    for command in (["init", "-q"], ["add", "params.yaml"], ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit"]):
        subprocess.run(["git", *command, *(["-qm", "first"] if command[-1] == "commit" else [])], check=True)
    write_yaml(tmp_path / "dvc.lock", {"stages": lock()})
    return tracking.client()


def make_run(stage: str, params: dict[str, Any], *inputs: str) -> str:
    with tracking.run(stage, params, inputs) as run:
        if stage in SHA:
            run.tag({"duet.sha256": SHA[stage]})
    tracking.flush()
    found = tracking._search(tracking.client(), "duet.run", run.id)
    assert found
    return found


def add_version(store: MlflowClient, entries: dict[str, Any], kept: str = "dvc.lock") -> versions.Version:
    run = store.create_run(tracking.experiment(store, "t3av")).info.run_id
    store.log_artifact(run, str(write_yaml(Path(kept), {"stages": entries})), tracking.SOURCE)
    tags = {
        "duet.sha256": SHA["finetune@t3av"], "duet.family": "t3av", "duet.phase": "finetune", "duet.dataset": "s",
        "duet.evaluation_data": "e" * 64, f"dvc.out.{FINETUNE}": "fine.dir", "prefect.flow_run_id": "flow-9",
        "git.commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }  # fmt: skip
    store.create_registered_model("duet-t3av")
    number = store.create_model_version("duet-t3av", "x", run, tags).version
    tracking.set_alias("duet-t3av", "champion", int(number))
    return versions.find("models:/duet-t3av@champion")


def test_the_tree_of_a_champion(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "flow-1")
    runs = {"clean@s": make_run("clean@s", {"share": 0.15, "seed": 1}, RAW)}
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID")
    make_run("clean@s", {"share": 0.2, "seed": 1}, RAW)  # other params
    make_run("clean@s", {"share": 0.15, "seed": 1})  # other inputs
    pretrain = {"model": {"dim": 8}, "lr": 1e-3, "seed": 42.0}
    runs["pretrain@t3av"] = make_run("pretrain@t3av", pretrain, CLEAN)
    make_run("pretrain@t3av", pretrain, CLEAN)  # the same again
    tuned = {"model": {"dim": 8}, "lr": 0.1, "augment": {"gain": 3.0}}
    runs["finetune@t3av"] = make_run("finetune@t3av", tuned, CLEAN, PRETRAIN)
    version = add_version(store, lock(gain=3.0))

    monkeypatch.setattr(sys, "argv", ["lineage", "models:/duet-t3av@champion"])
    lineage.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "duet-t3av 1 @champion"
    assert SHA["finetune@t3av"] in lines[1]
    assert version.tags["git.commit"][:12] in lines[3]
    assert "flow run flow-9" in lines[3]
    stages = [line.partition("── ")[2] for line in lines if "── " in line]
    assert stages == [
        f"finetune@t3av   {FINETUNE} fine.dir",
        f"clean@s   {CLEAN} clean.dir",
        f"download@s   {RAW} raw.dir",
        f"pretrain@t3av   {PRETRAIN} pre.dir",
        f"clean@s   {CLEAN} clean.dir (above)",
    ]
    text = "\n".join(lines)
    for run in runs.values():
        assert text.count(f"MLflow run {run}") == 1
    assert f"MLflow run {runs['clean@s']}   flow run flow-1" in text
    assert f"weights   sha256 {SHA['pretrain@t3av']}" in text
    assert "and 1 later runs with the same inputs and params" in text
    assert "no MLflow run" in text  # of download
    assert [line.split("params")[1].strip() for line in lines if " params  " in line] == [
        "t3av.finetune.augment.gain: 6.0 → 3.0"
    ]
    assert lineage.read(version).order() == ["download@s", "clean@s", "pretrain@t3av", "finetune@t3av"]


def test_an_input_of_unknown_origin_is_said(store: MlflowClient) -> None:
    entries = lock()
    entries["clean@s"]["outs"][0]["md5"] = "newer.dir"  # made again after training
    told = "\n".join(lineage.describe(lineage.read(add_version(store, entries)), None))
    assert f"{CLEAN} clean.dir   made by no stage that dvc.lock knows" in told
    assert "is not in this clone" in told


def test_what_dvc_lock_does_not_tell_is_refused(store: MlflowClient) -> None:
    version = add_version(store, {"clean@s": lock()["clean@s"]})
    with pytest.raises(InputError, match=r"duet-t3av 1: its dvc\.lock has no finetune@t3av"):
        lineage.read(version)
    store.create_model_version("duet-t3av", "x", store.create_run("0").info.run_id)
    with pytest.raises(InputError, match=r"duet-t3av 2: its run .* keeps no source/"):
        lineage.read(versions.find("models:/duet-t3av/2"))
    assert lineage.committed_params("0" * 40) is None


@pytest.mark.parametrize(
    ("first", "second", "equal"), [("1", "1.0", True), ("1e-3", "0.002", False), ("a", "b", False)]
)
def test_numbers_are_compared_as_numbers(first: str, second: str, equal: bool) -> None:
    assert lineage.same(first, second) == equal
