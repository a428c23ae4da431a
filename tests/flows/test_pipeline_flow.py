"""The graph as a flow, under a real Prefect server in a process of its own: what runs, what is shown, what is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings
from prefect.testing.utilities import prefect_test_harness

from flows.pipeline import pipeline, select
from models.family import InputError
from tasks import graph

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SETTLED = ("Completed", "Cached", "Failed", "Cancelled", "NotReady")
NEEDS = {"a": [], "b@x": ["a"], "b@y": ["a"], "c": ["b@x"], "d": ["c"]}


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


def run(*targets: str, **options: Any) -> tuple[State[Any], dict[str, str]]:
    """The flow's state, and the state's name of each task."""
    state = pipeline(list(targets), **options, return_state=True)
    return state, task_states(state)


def task_states(state: State[Any]) -> dict[str, str]:
    """Name -> state. The server learns of tasks through events, so it may be a little behind."""
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        for _ in range(60):
            tasks = client.read_task_runs(flow_run_filter=wanted)
            if all(task.state_name in SETTLED for task in tasks):
                break
            time.sleep(0.5)
    return {task.name: task.state_name for task in tasks}


@pytest.mark.parametrize(
    ("targets", "extent", "expected"),
    [
        ([], "upstream", "a b@x b@y c d"),
        (["c"], "upstream", "a b@x c"),
        (["b"], "upstream", "a b@x b@y"),
        (["b@x"], "downstream", "b@x c d"),
        (["c"], "alone", "c"),
        (["b@y", "d"], "upstream", "a b@x b@y c d"),
    ],
)
def test_select(targets: list[str], extent: Any, expected: str) -> None:
    assert select(NEEDS, targets, extent) == expected.split()


def test_select_refuses_what_does_not_exist() -> None:
    with pytest.raises(InputError, match="no stage 'z'; there is a, b@x"):
        select(NEEDS, ["z"])


def test_current_workspace_runs_then_everything_is_cached(toy: Any) -> None:
    state, tasks = run(workspace="current")
    assert state.is_completed(), state.message
    assert set(tasks) == {line.split()[0] for line in toy.dvc("stage", "list", "--name-only").splitlines()}
    assert set(tasks.values()) == {"Completed"}
    assert graph.stages(toy.root / "dvc.lock").keys() == tasks.keys()
    with get_client(sync_client=True) as client:
        artifacts = {a.key: a for a in client.read_artifacts() if a.flow_run_id == state.state_details.flow_run_id}
    assert json.loads(artifacts["score-metrics"].data) == [{"metric": "accuracy.both", "value": 0.5}]
    state, tasks = run(workspace="current")
    assert state.message == "0 stages ran, 10 cached"
    assert set(tasks.values()) == {"Cached"}
    state, tasks = run("fan@a", workspace="current", force=True)
    assert tasks == {"first": "Completed", "fan@a": "Completed"}


def test_mistakes_are_one_line_before_anything_starts(toy: Any) -> None:
    state, tasks = run("nonsense", workspace="current")
    assert state.is_failed()
    assert state.message.startswith("no stage 'nonsense'; there is first, fan@a")
    params = (toy.root / "params.yaml").read_text()
    (toy.root / "params.yaml").write_text(params.replace("stages: {}", "stages: {trian: {pool: gpu}}"))
    state, tasks = run(workspace="current")
    assert "orchestration.stages.trian: no such stage" in state.message
    assert not tasks
    state, _ = run(params={"first.valu": 2})
    assert "first.valu does not exist" in state.message


def test_a_failing_stage_holds_up_only_what_needs_it(toy: Any) -> None:
    bad = "cat first.txt > fan_${item}.txt; echo ${item} >> fan_${item}.txt; test ${item} != b"
    text = (toy.root / "dvc.yaml").read_text()
    toy.graph(text.replace("cat first.txt > fan_${item}.txt; echo ${item} >> fan_${item}.txt", bad))
    state, tasks = run(workspace="current")
    assert state.is_failed()
    assert state.message == "fan@b failed; not run: grid@s, grid@l, score"
    assert tasks["fan@b"] == "Failed"
    assert {tasks[f"fan@{item}"] for item in "acdef"} == {"Completed"}
    assert {f"fan@{item}" for item in "acdef"} <= graph.stages(toy.root / "dvc.lock").keys()
    assert not (toy.root / "grid_s.txt").exists()


def test_own_checkouts_do_not_touch_the_project_and_leave_experiments(toy: Any) -> None:
    before = {path.name for path in toy.root.iterdir()}
    state, _ = run("score", params={"first.value": 5})
    assert state.is_completed(), state.message
    assert state.message == "5 stages ran, 0 cached"
    assert {path.name for path in toy.root.iterdir()} - before <= {".duet"}
    assert "value: 1" in (toy.root / "params.yaml").read_text()
    shown = toy.dvc("exp", "show", "--csv").splitlines()
    assert "first.value" in shown[0]
    assert sum(",5," in line for line in shown[1:]) == 1
    assert not list((toy.root / ".duet/runs").glob("*/"))
    assert toy.root.name not in toy.git("worktree", "list").splitlines()[1:]
    state, _ = run("score", params={"first.value": 5})
    assert state.message == "0 stages ran, 5 cached"  # out of the run cache


def test_without_changes_of_the_result_there_is_no_experiment(toy: Any) -> None:
    toy.dvc("repro", "-q")
    toy.commit()
    state, _ = run()
    assert state.message == "0 stages ran, 10 cached"
    assert not toy.git("for-each-ref", "refs/exps")


@pytest.fixture
def start() -> Iterator[Any]:
    """Starts the flow in a process of its own, against the server of these tests."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "flows.pipeline", *arguments]
        env = {**os.environ, "PREFECT_API_URL": str(get_current_settings().api.url)}
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("chatty", [False, True])
def test_sigterm_cancels_saves_and_leaves_nothing(toy: Any, start: Any, chatty: bool) -> None:
    toy.slow(chatty)
    process = start("--workspace", "current")
    toy.wait_for("started.bin")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert "Cancelled: Cancelled; running it again" in out
    assert list(toy.root.rglob("saved.bin"))
    assert not toy.processes()
    assert toy.is_unlocked()


def test_sigkill_leaves_no_orphan(toy: Any, start: Any) -> None:
    toy.slow(chatty=False)
    toy.commit()
    process = start("--workspace", "own")
    toy.wait_for("started.bin")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    toy.wait_for("saved.bin")
    toy.wait_until_idle()
    assert toy.is_unlocked()
