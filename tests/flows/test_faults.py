"""What is killed under `make up` while a real training runs, and what is found after: state, processes, weights."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from flows.services import answers
from tasks.checkout import edit_params
from tests.flows.servers import Running
from tests.test_demo import dvc, project

STAGE = "pretrain@t3av"
STEPS = 160  # some twenty seconds of training: time to be killed in
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose HEAD knows what an uninterrupted training makes."""
    folder = tmp_path_factory.mktemp("faults") / "project"
    folder.mkdir()
    project(folder)
    longer = {"t3av.pretrain.epochs": STEPS // 4, "train.checkpoint_interval": 5, "train.eval_interval": 10}
    edit_params(folder / "params.yaml", longer, {})
    dvc(folder, "repro", STAGE)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "add", "dvc.lock", "params.yaml"], cwd=folder, check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "-m", "trained"], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def servers(whole: Path) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DUET_PROJECT", str(whole))
        running = Running()
    try:
        yield running
    finally:
        running.stop()


def processes(project: Path, *words: str) -> list[psutil.Process]:
    """Living processes with these words in their command that work below the project, guards left out."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "status"]):
        line, cwd = process.info["cmdline"] or [], process.info["cwd"]
        alive = cwd and Path(cwd).is_relative_to(project) and process.info["status"] != psutil.STATUS_ZOMBIE
        if alive and all(word in line for word in words) and not any(part.endswith("guard.py") for part in line):
            found.append(process)
    return found


def train(servers: Running, whole: Path) -> str:
    """A flow run that trains anew; returns when it has saved some checkpoints."""
    run = servers.trigger("t3av/t3av", until="pretrain", force=True)
    deadline = time.monotonic() + 300
    while not list((whole / ".duet/work").glob(f"{STAGE}-*/last")):
        assert time.monotonic() < deadline, servers.log(run)
        assert servers.state(run)["type"] in ("SCHEDULED", "PENDING", "RUNNING"), servers.log(run)
        time.sleep(0.2)
    return run


def log(servers: Running, run: str) -> str:
    """The lines of a run and of the runs that it started on other pools."""
    children = servers.post("/flow_runs/filter", deployments={"name": {"any_": ["gpu"]}})
    own = [child["id"] for child in children if child["parameters"]["parent"] == run]
    return "\n".join(servers.log(name) for name in [run, *own])


def nothing_left(whole: Path, seconds: float = 60) -> None:
    """No training and no lock survives; the checkpoint does."""
    deadline = time.monotonic() + seconds
    while left := processes(whole, "tasks.train"):
        assert time.monotonic() < deadline, [process.cmdline() for process in left]
        time.sleep(0.2)
    assert list((whole / ".duet/work").glob(f"{STAGE}-*/last/weights.safetensors"))


def ends_as_if_never_stopped(servers: Running, whole: Path, run: str, resumed: bool = True) -> None:
    """Its dvc.lock, which has the hash of the weights, is HEAD's, so that there is no experiment to keep."""
    state = servers.wait(run)
    assert state["type"] == "COMPLETED", log(servers, run)
    assert servers.tasks(run)[STAGE] == "Completed"
    assert not subprocess.check_output(["git", "for-each-ref", "refs/exps"], cwd=whole)
    deadline = time.monotonic() + 60  # Prefect sends logs some seconds later
    while resumed and "going on from step" not in log(servers, run):
        assert time.monotonic() < deadline, log(servers, run)
        time.sleep(1)


def kill_training(servers: Running, whole: Path) -> None:
    processes(whole, "tasks.train")[0].kill()


def kill_server(servers: Running, whole: Path) -> None:
    port = servers.prefect.rpartition(":")[2]
    for process in psutil.Process(servers.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if port in process.cmdline() or "prefect.server.api.server:create_app" in process.cmdline():
                process.kill()


@pytest.mark.parametrize("fault", [kill_training, kill_server])
def test_the_run_itself_survives(servers: Running, whole: Path, fault: Callable[[Running, Path], None]) -> None:
    run = train(servers, whole)
    fault(servers, whole)
    while not answers(f"{servers.prefect}/api/health"):
        time.sleep(1)
    ends_as_if_never_stopped(servers, whole, run, resumed=fault is kill_training)


def cancel(servers: Running, whole: Path, run: str) -> None:
    servers.post(f"/flow_runs/{run}/set_state", state={"type": "CANCELLING"}, force=True)


def kill_flow(servers: Running, whole: Path, run: str) -> None:
    """The process of the pipeline's flow run; the training is below that of another flow run."""
    one_of(psutil.process_iter(), lambda p: p.environ().get("PREFECT__FLOW_RUN_ID") == run, "prefect.engine").kill()


def kill_worker(servers: Running, whole: Path, run: str) -> None:
    below = psutil.Process(servers.process.pid).children(recursive=True)
    one_of(below, lambda p: "worker" in p.cmdline() and "gpu" in p.cmdline(), "prefect worker").kill()


def one_of(found: Iterable[psutil.Process], wanted: Callable[[psutil.Process], bool], words: str) -> psutil.Process:
    """The first process that is wanted and has these words in its command, which a guard's has not."""
    for process in found:
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if wanted(process) and words in line and "guard.py" not in line:
                return process
    raise AssertionError(f"no process of {words}")


@pytest.mark.parametrize(
    ("fault", "ends"),
    [(cancel, {"CANCELLED"}), (kill_flow, {"CRASHED"}), (kill_worker, {"CANCELLED", "CRASHED", "FAILED"})],
)
def test_run_again_goes_on(
    servers: Running, whole: Path, fault: Callable[[Running, Path, str], None], ends: set[str]
) -> None:
    run = train(servers, whole)
    fault(servers, whole, run)
    assert servers.wait(run)["type"] in ends, log(servers, run)
    nothing_left(whole)
    again = retry(servers, run) if fault is cancel else servers.trigger("t3av/t3av", until="pretrain", force=True)
    ends_as_if_never_stopped(servers, whole, again)


def retry(servers: Running, run: str) -> str:
    """The button Retry of the run's page: the same run once more."""
    deadline = time.monotonic() + 60
    while (
        "successfully" not in servers.state(run)["message"]
    ):  # the worker says it too, and later: not of the new attempt
        assert time.monotonic() < deadline, servers.state(run)
        time.sleep(0.5)
    servers.post(f"/flow_runs/{run}/set_state", state={"type": "SCHEDULED", "name": "AwaitingRetry"}, force=True)
    return run
