from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tasks import graph

DVC_YAML = """
stages:
  clean:
    foreach: [sounds]
    do: {cmd: "mkdir -p data && cp raw.txt data/clean.txt", deps: [raw.txt], outs: [data/clean.txt]}
"""


def git(*arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    (tmp_path / "raw.txt").write_text("a clip\n")
    git("add", ".")
    git("commit", "-qm", "first")
    return tmp_path


def test_hashes_are_those_that_dvc_wrote(repository: Path) -> None:
    dvc = Path(sys.executable).with_name("dvc")
    subprocess.run([dvc, "init", "-q"], check=True)
    subprocess.run([dvc, "repro", "-q"], check=True)
    md5 = hashlib.md5(b"a clip\n").hexdigest()
    assert graph.hashes("clean@sounds") == {"deps": {"raw.txt": md5}, "outs": {"data/clean.txt": md5}}
    assert graph.hashes("never@ran") == {"deps": {}, "outs": {}}


def test_a_path_within_an_out_has_the_hash_of_the_out(repository: Path) -> None:
    entry = "schema: '2.0'\nstages: {clean@s: {cmd: x, outs: [{path: data/s/clean, md5: abc.dir}]}}\n"
    (repository / "dvc.lock").write_text(entry)
    assert graph.out_hashes(["data/s/clean/manifest.parquet", "data/s/raw"]) == {"data/s/clean": "abc.dir"}
    assert graph.out_hashes([Path("data/s/clean")]) == {"data/s/clean": "abc.dir"}


def test_nothing_ran_yet(repository: Path) -> None:
    assert graph.stages() == {}
    assert graph.out_hashes(["data"]) == {}


def test_commit_and_dirty(repository: Path) -> None:
    assert graph.commit() == git("rev-parse", "HEAD")
    assert not graph.dirty()
    (repository / "dvc.lock").write_text("stages: {}\n")  # every stage that runs changes it
    assert not graph.dirty()
    (repository / "models").mkdir()
    (repository / "models" / "new.py").touch()  # imported code counts before it is added
    assert graph.dirty()


def test_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert graph.commit() == "unknown"
    assert not graph.dirty()
