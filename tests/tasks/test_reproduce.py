"""Versions trained again by DVC in a worktree of their commit. The stages are shell lines: no family is needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from models.family import InputError
from tasks import graph, reproduce, storage, tracking, versions

if TYPE_CHECKING:
    from mlflow import MlflowClient

FINETUNE = Path("artifacts/t3av/finetune")
DVC_YAML = """
stages:
  clean:
    foreach: [s]
    do:
      cmd: mkdir -p data/s/clean; cat source.csv > data/s/clean/manifest.csv
      deps: [source.csv]
      outs: [data/s/clean]
  pretrain:
    foreach: [t3av]
    do:
      cmd: mkdir -p artifacts/t3av/pretrain;
        cat data/s/clean/* code.txt > artifacts/t3av/pretrain/weights.safetensors
      deps: [data/s/clean, code.txt]
      outs: [artifacts/t3av/pretrain]
  finetune:
    foreach: [t3av]
    do:
      cmd: mkdir -p artifacts/t3av/finetune;
        (cat artifacts/t3av/pretrain/*; echo ${lr}; RANDOM_PART) > artifacts/t3av/finetune/weights.safetensors
      deps: [data/s/clean, artifacts/t3av/pretrain]
      params: [lr]
      outs: [artifacts/t3av/finetune]
"""


def shell(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def git(*arguments: str) -> str:
    return shell("git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments)


def dvc(*arguments: str) -> str:
    return shell(str(Path(sys.executable).with_name("dvc")), *arguments)


@pytest.fixture
def store(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.chdir(root)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    shutil.copyfile(migrated, root / "mlflow.db")
    git("init", "-q")
    dvc("init", "-q")
    (root / ".gitignore").write_text("/data/\n/artifacts/\n/.duet/\n/mlruns/\n/mlflow.db\n")
    (root / ".dvcignore").write_text("/.duet\n")
    (root / "params.yaml").write_text("lr: 1\n")
    (root / "source.csv").write_text("a\n")
    (root / "code.txt").write_text("first code\n")
    return tracking.client()


def add_version(store: MlflowClient, random: str = "true") -> versions.Version:
    """Commit, then train with a param that no commit holds, and register as `register` does."""
    Path("dvc.yaml").write_text(DVC_YAML.replace("RANDOM_PART", random))
    git("add", ".")
    git("commit", "-qm", "first")
    Path("params.yaml").write_text("lr: 2\n")
    dvc("repro", "-q")
    run = store.create_run(tracking.experiment(store, "t3av")).info.run_id
    for name in ("params.yaml", "dvc.lock"):
        store.log_artifact(run, name, tracking.SOURCE)
    made = {
        "duet.sha256": storage.file_digest(FINETUNE / "weights.safetensors"), "duet.family": "t3av",
        "duet.phase": "finetune", "git.commit": graph.commit(), "git.dirty": str(graph.dirty()).lower(),
        f"dvc.out.{FINETUNE}": graph.hashes("finetune@t3av")["outs"][str(FINETUNE)],
    }  # fmt: skip
    store.create_registered_model("duet-t3av")
    store.create_model_version("duet-t3av", "x", run, made)
    return versions.find("models:/duet-t3av/1")


def worktrees() -> list[str]:
    return git("worktree", "list").splitlines()[1:]


@pytest.mark.slow
def test_identical_though_everything_has_moved_on(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[Any]
) -> None:
    add_version(store)
    Path("code.txt").write_text("second code\n")
    Path("source.csv").write_text("b\n")
    Path("params.yaml").write_text("lr: 3\n")
    git("commit", "-qam", "second")
    dvc("repro", "-q")
    before = (FINETUNE / "weights.safetensors").read_bytes()
    monkeypatch.setattr(sys, "argv", ["reproduce", "models:/duet-t3av/1"])
    reproduce.main()
    out = capsys.readouterr().out
    assert "reproduce: duet-t3av 1 is reproduced: its weights are identical" in out
    assert [line for line in out.splitlines() if line.startswith("Running stage")] == [
        "Running stage 'pretrain@t3av':",
        "Running stage 'finetune@t3av':",
    ]
    assert (FINETUNE / "weights.safetensors").read_bytes() == before
    assert not worktrees()


@pytest.mark.slow
def test_other_weights_fail_and_stay(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[Any]
) -> None:
    version = add_version(store, random="date +%s%N")
    monkeypatch.setattr(sys, "argv", ["reproduce", version.address])
    with pytest.raises(SystemExit) as ended:
        reproduce.main()
    assert ended.value.code == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"NOT reproduced: SHA-256 {storage.file_digest(Path(line.split()[-1]) / 'weights.safetensors')}" in line


@pytest.mark.slow
def test_data_come_from_the_remote_or_are_named(store: MlflowClient, tmp_path: Path) -> None:
    dvc("remote", "add", "-d", "store", str(tmp_path / "remote"))
    version = add_version(store)
    dvc("push", "-q")
    shutil.rmtree(".dvc/cache")
    assert reproduce.reproduce(Path.cwd(), version)[0]
    shutil.rmtree(".dvc/cache")
    shutil.rmtree(tmp_path / "remote")
    with pytest.raises(InputError, match=r"data/s/clean .*\.dir is not in the cache or the remote"):
        reproduce.reproduce(Path.cwd(), version)


def test_code_that_no_commit_holds_is_refused(store: MlflowClient) -> None:
    def named(**tags: str) -> versions.Version:
        return versions.Version("duet-t3av", 1, (), {key.replace("_", "."): value for key, value in tags.items()}, "x")

    git("add", ".")
    git("commit", "-qm", "first")
    with pytest.raises(InputError, match="made by code that no commit holds"):
        reproduce.commit_of(Path.cwd(), named(git_commit=graph.commit(), git_dirty="true"))
    for commit in ("0" * 40, "unknown"):
        with pytest.raises(InputError, match=f"its commit {commit} is not in this clone"):
            reproduce.commit_of(Path.cwd(), named(git_commit=commit, git_dirty="false"))
    assert reproduce.commit_of(Path.cwd(), named(git_commit="HEAD", git_dirty="false")) == graph.commit()
