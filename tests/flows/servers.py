"""`make up` as a process, and the few calls of Prefect's API that its tests need."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Api:
    """A Prefect server."""

    def __init__(self, address: str) -> None:
        self.prefect = address
        self.api = httpx.Client(base_url=f"{address}/api", timeout=30)

    def post(self, path: str, **body: Any) -> Any:
        for pause in (1, 3, 9):  # a busy server asks to come back, as Prefect's own client does
            answer = self.api.post(path, json=body)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(pause)
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
        found = self.post(
            "/task_runs/filter", flow_runs={"id": {"any_": [run]}}, sort="EXPECTED_START_TIME_ASC"
        )  # those of a retried run last
        return {task["name"]: task["state_name"] for task in found}

    def log(self, run: str) -> str:
        logs = self.post("/logs/filter", logs={"flow_run_id": {"any_": [run]}}, sort="TIMESTAMP_ASC")
        return "\n".join(line["message"] for line in logs)


class Running(Api):
    """Servers and workers of the project that DUET_PROJECT names."""

    def __init__(self, toy: Any = None) -> None:
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
        super().__init__(f"http://127.0.0.1:{ports[0]}")

    def stop(self) -> None:
        below = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        out, _ = self.process.communicate(timeout=240)
        assert "nothing is left running" in out
        assert not [process for process in below if process.is_running()]
