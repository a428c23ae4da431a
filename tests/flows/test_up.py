"""`make up` for real: servers and workers on loopback, deployments started over the API, faults, and nothing left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows import up
from models.family import InputError

ROOT = Path(__file__).parents[2]
GPU = """
  hard:
    cmd: echo ${first.value} > hard.txt
    deps: [first.txt]
    outs: [hard.txt]
"""
SLOW = """
  slow:
    cmd: python slow.py
    deps: [slow.py, first.txt]
    outs: [out.txt]
"""


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "example.org"])
def test_other_hosts_need_passwords(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING", raising=False)
    with pytest.raises(InputError, match="reachable from elsewhere"):
        up.check(up.Settings(host, 4200, 5000))
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "duet:secret")
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "a-long-secret")
    with pytest.raises(InputError, match="MLFLOW_FLASK_SERVER_SECRET_KEY"):
        up.check(up.Settings(host, 4200, 5000))
    monkeypatch.setenv("MLFLOW_FLASK_SERVER_SECRET_KEY", "x" * 40)
    assert up.check(up.Settings(host, 4200, 5000))


def test_loopback_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING", raising=False)
    assert not up.check(up.Settings("127.0.0.1", 4200, 5000))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Running:
    def __init__(self, toy: Any) -> None:
        self.toy = toy
        ports = [free_port(), free_port()]
        env = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "MLFLOW"))}
        line = [sys.executable, "-m", "flows.up", "--prefect-port", str(ports[0]), "--mlflow-port", str(ports[1])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process: Any = subprocess.Popen(line, cwd=ROOT, env=env, **pipes)
        lines = []
        while not any("Ctrl-C stops" in line for line in lines):
            lines.append(self.process.stdout.readline())
            assert lines[-1], "".join(lines)
        self.mlflow = f"http://127.0.0.1:{ports[1]}"
        self.api = httpx.Client(base_url=f"http://127.0.0.1:{ports[0]}/api", timeout=30)
        self.descendants = psutil.Process(self.process.pid).children(recursive=True)

    def post(self, path: str, **body: Any) -> Any:
        answer = self.api.post(path, json=body)
        answer.raise_for_status()
        return answer.json()

    def trigger(self, name: str, **parameters: Any) -> str:
        deployment = self.api.get(f"/deployments/name/{name}").json()["id"]
        return self.post(f"/deployments/{deployment}/create_flow_run", parameters=parameters)["id"]

    def state(self, run: str) -> dict[str, Any]:
        return self.api.get(f"/flow_runs/{run}").json()["state"]

    def wait(self, run: str, seconds: float = 400) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while (state := self.state(run))["type"] not in ("COMPLETED", "FAILED", "CANCELLED", "CRASHED"):
            assert time.monotonic() < deadline, f"still {state}"
            time.sleep(0.5)
        return state

    def tasks(self, run: str) -> dict[str, str]:
        found = self.post("/task_runs/filter", flow_runs={"id": {"any_": [run]}})
        return {task["name"]: task["state_name"] for task in found}

    def log(self, run: str) -> str:
        logs = self.post("/logs/filter", logs={"flow_run_id": {"any_": [run]}}, sort="TIMESTAMP_ASC")
        return "\n".join(line["message"] for line in logs)

    def stop(self) -> None:
        below = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        out, _ = self.process.communicate(timeout=240)
        assert "nothing is left running" in out
        assert not [process for process in below if process.is_running()]


@pytest.fixture
def running(toy: Any) -> Iterator[Running]:
    toy.graph((toy.root / "dvc.yaml").read_text() + GPU + SLOW)
    params = (toy.root / "params.yaml").read_text()
    (toy.root / "params.yaml").write_text(params.replace("stages: {}", "stages: {hard: {pool: gpu, devices: 1}}"))
    toy.slow_script(chatty=False)
    toy.commit()
    servers = Running(toy)
    try:
        yield servers
    finally:
        if servers.process.poll() is None:
            servers.stop()
        toy.wait_until_idle()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_runs_from_the_interface(running: Running) -> None:
    toy = running.toy
    assert httpx.get(running.mlflow).status_code == 200
    # A form with a wrong value is refused before anything starts.
    with pytest.raises(httpx.HTTPStatusError, match=r"409|422"):
        running.trigger("t3av/t3av", pretrain={"epochs": -1})

    run = running.trigger("pipeline/pipeline", targets=["score", "hard"], params={"first.value": 7})
    state = running.wait(run)
    assert state["type"] == "COMPLETED", running.log(run)
    assert running.tasks(run)["hard"] == running.tasks(run)["score"] == "Completed"
    artifacts = running.post("/artifacts/filter", flow_runs={"id": {"any_": [run]}})
    assert {"score-metrics"} <= {artifact["key"] for artifact in artifacts}
    assert "Running stage 'score'" in running.log(run)
    children = running.post("/flow_runs/filter", deployments={"name": {"any_": ["gpu"]}})
    assert [child["state"]["type"] for child in children] == ["COMPLETED"]
    assert any(",7" in line for line in toy.dvc("exp", "show", "--csv").splitlines())

    # Cancel: the stage saves, the run ends as Cancelled, no process and no lock stays.
    run = running.trigger("pipeline/pipeline", targets=["slow"])
    toy.wait_for("started.bin", 400)
    running.post(f"/flow_runs/{run}/set_state", state={"type": "CANCELLING"}, force=True)
    assert running.wait(run)["type"] == "CANCELLED"
    assert list(toy.root.rglob("saved.bin"))
    assert not [process for process in toy.processes() if "slow.py" in process.cmdline()]
    assert toy.is_unlocked()

    # The worker is killed: what it ran ends too, and another worker takes its place.
    for file in toy.root.rglob("started.bin"):
        file.unlink()
    run = running.trigger("pipeline/pipeline", targets=["slow"])
    toy.wait_for("started.bin", 400)
    workers = [p for p in psutil.Process(running.process.pid).children(recursive=True) if "worker" in p.cmdline()]
    next(p for p in workers if "cpu" in p.cmdline() and "guard.py" not in " ".join(p.cmdline())).kill()
    assert running.wait(run)["type"] in ("CANCELLED", "CRASHED")
    assert not [process for process in toy.processes() if "slow.py" in process.cmdline()]
    run = running.trigger("pipeline/pipeline", targets=["first"])
    assert running.wait(run)["type"] == "COMPLETED"
    running.stop()
