"""A toy project: a git and DVC repository with short stages, so that orchestration is tested alone and for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

BIN = Path(sys.executable).parent
GRAPH = """
stages:
  first:
    cmd: echo first ${first.value} > first.txt
    params: [first.value]
    outs: [first.txt]
  fan:
    foreach: [a, b, c, d, e, f]
    do:
      cmd: cat first.txt > fan_${item}.txt; echo ${item} >> fan_${item}.txt
      deps: [first.txt]
      outs: ["fan_${item}.txt"]
  grid:
    matrix: {size: [s, l]}
    cmd: cat fan_a.txt fan_b.txt > grid_${item.size}.txt; echo ${item.size} >> grid_${item.size}.txt
    deps: [fan_a.txt, fan_b.txt]
    outs: ["grid_${item.size}.txt"]
  score:
    cmd: mkdir -p score; echo '{"accuracy":{"both":0.5}}' > score/metrics.json
    deps: [grid_s.txt]
    outs: [score]
"""
PARAMS = """
first:
  value: 1  # kept
orchestration:
  max_parallel: 6
  default: {pool: cpu, devices: 0, retries: 0, backoff: 0, timeout: null}
  stages: {}
"""

SLOW_STAGE = """
stages:
  slow:
    cmd: python slow.py
    outs: [out.txt]
"""
# Ends on SIGTERM only after it has saved, as training does, and has a child in a session of its own, as torchrun does.
SLOW = """
import signal, subprocess, sys, time
from pathlib import Path
from typing import Any
def save(*_):
    time.sleep(0.3); Path("saved.bin").touch(); sys.exit(1)
signal.signal(signal.SIGTERM, save)
subprocess.Popen(["sleep", "1234.5"], start_new_session=True)
Path("started.bin").touch()
while True:
    time.sleep(0.01)
    if {chatty}: print("step", flush=True)
"""


def shell(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


class Toy:
    def __init__(self, root: Path) -> None:
        self.root = root
        shell(root, "git", "init", "-q", "-b", "main")
        shell(root, "git", "config", "user.email", "toy@localhost")
        shell(root, "git", "config", "user.name", "Toy")
        (root / ".dvc").mkdir()
        (root / ".dvc/config").write_text("[core]\n    analytics = false\n    check_update = false\n")
        (root / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
        (root / ".dvcignore").write_text(".duet/\n")
        (root / ".gitignore").write_text("/.duet/\n*.txt\n/score\n")
        (root / "dvc.yaml").write_text(GRAPH)
        (root / "params.yaml").write_text(PARAMS)
        self.commit()

    def commit(self) -> None:
        shell(self.root, "git", "add", "-A")
        shell(self.root, "git", "commit", "-q", "--allow-empty", "-m", "toy")

    def graph(self, text: str) -> None:
        (self.root / "dvc.yaml").write_text(text)

    def git(self, *arguments: str) -> str:
        return shell(self.root, "git", *arguments)

    def dvc(self, *arguments: str) -> str:
        return shell(self.root, str(BIN / "dvc"), *arguments)

    def slow(self, chatty: bool) -> None:
        self.graph(SLOW_STAGE)
        self.slow_script(chatty)

    def slow_script(self, chatty: bool) -> None:
        (self.root / "slow.py").write_text(SLOW.replace("{chatty}", str(chatty)))

    def wait_for(self, name: str, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not list(self.root.rglob(name)):
            assert time.monotonic() < deadline, f"{name} did not appear"
            time.sleep(0.05)

    def wait_until_idle(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < deadline, f"still there: {[process.cmdline() for process in left]}"
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        """Every living process but this one that works in the toy's folder."""
        found = []
        for process in psutil.process_iter(["cwd", "status", "pid"]):
            cwd = process.info["cwd"]
            alive = process.info["status"] != psutil.STATUS_ZOMBIE and process.info["pid"] != os.getpid()
            if alive and cwd and Path(cwd).is_relative_to(self.root):
                found.append(process)
        return found

    def is_unlocked(self) -> bool:
        return not any(any(json.loads(lock.read_text()).values()) for lock in self.root.rglob(".dvc/tmp/rwlock"))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    for key in [key for key in os.environ if key.startswith("GIT_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("DUET_TRACKING", "off")
    root = tmp_path / "toy"
    root.mkdir()
    monkeypatch.setenv("DUET_PROJECT", str(root))
    return Toy(root)
