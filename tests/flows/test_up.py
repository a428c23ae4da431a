"""`make up` for real: servers and workers on loopback, deployments started over the API, faults, and nothing left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from flows import up
from models.family import InputError
from tests.flows.servers import Running

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
