"""The demo end to end, made small: `dvc repro` from nothing to a registered version, twice, in two separate projects."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.checkout import edit_params

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SMALL = {
    "download.sounds.demo.clips": 72,
    "subset.sounds.num_train": 4,
    "subset.sounds.num_test": 2,
    "clean.sounds.val_share": 0.25,
    "clean.sounds.max_quarantine": 0.2,
    "t3av.model.dim": 32,
    "t3av.model.encoder_layers": 1,
    "t3av.pretrain.epochs": 1,
    "t3av.pretrain.batch_size": 8,
    "t3av.contrastive.epochs": 1,
    "t3av.contrastive.batch_size": 8,
    "t3av.finetune.epochs": 2,
    "t3av.finetune.batch_size": 8,
    "evaluate.num_bootstrap": 50,
}


def project(folder: Path) -> Path:
    """The tracked files as a repository of their own, with small numbers in params.yaml."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)
    edit_params(folder / "params.yaml", SMALL, {})
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run(["git", "add", "--all"], cwd=folder, check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "-m", "start"], cwd=folder, check=True)
    return folder


def dvc(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    environment |= {"GIT_AUTHOR_NAME": "test", "GIT_AUTHOR_EMAIL": "test@example.org"}
    environment |= {"GIT_COMMITTER_NAME": "test", "GIT_COMMITTER_EMAIL": "test@example.org"}
    done = subprocess.run([BIN / "dvc", *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that the stages leave and that must not differ from project to project."""
    files = [p for part in ("data", "artifacts") for p in (folder / part).rglob("*") if p.is_file()]
    kept = [p for p in files if "register" not in p.parts]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(kept)}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = project(tmp_path_factory.mktemp("first"))
    dvc(folder, "repro", "register@t3av")
    return folder


def test_one_command_ends_in_a_registered_version(first: Path) -> None:
    version = json.loads((first / "artifacts/t3av/register/version.json").read_text())
    assert version["name"] == "duet-t3av"
    assert set(version["aliases"]) == {"candidate", "champion"}
    metrics = json.loads((first / "artifacts/t3av/evaluate/metrics.json").read_text())
    assert {"top1", "audio_top1", "video_top1", "map", "r1_v2a", "probe_gain", "shapley_audio"} <= set(metrics)
    page = (first / "artifacts/t3av/evaluate/report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    environment = {**os.environ, "PYTHONPATH": str(first)}
    summary = subprocess.run(
        [sys.executable, "-m", "tasks.summary", "t3av"], cwd=first, env=environment, capture_output=True, text=True
    )
    assert summary.returncode == 0, summary.stderr
    assert "duet-t3av" in summary.stdout


def test_run_again_does_nothing(first: Path) -> None:
    assert "Running stage" not in dvc(first, "repro", "register@t3av")


@pytest.mark.slow
def test_a_second_project_makes_the_same_bytes(first: Path, tmp_path: Path) -> None:
    second = project(tmp_path)
    dvc(second, "repro", "evaluate@t3av")
    assert digests(second) == digests(first)


def test_an_experiment_runs_what_its_change_touches(first: Path) -> None:
    out = dvc(first, "exp", "run", "-S", "t3av.finetune.lr=5e-4", "register@t3av")
    ran = [line.split("'")[1] for line in out.splitlines() if line.startswith("Running stage")]
    assert ran == ["finetune@t3av", "evaluate@t3av", "register@t3av"]
    version = json.loads((first / "artifacts/t3av/register/version.json").read_text())
    assert str(version["version"]) == "2"
