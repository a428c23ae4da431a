from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from models.family import InputError
from tasks import evaluate, journal, tracking
from tasks.journal import OUTBOX, flatten, redact
from tests.tasks.toy_evaluation import write_project

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where stages run; delivery happens on flush, not in the background."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DUET_TRACKING")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(journal, "_start_delivery", lambda: None)
    return tmp_path


@pytest.fixture
def store(project: Path, migrated: Path) -> MlflowClient:
    shutil.copyfile(migrated, project / "mlflow.db")
    return tracking.client()


def only_run(store: MlflowClient, name: str) -> Run:
    found = store.get_experiment_by_name(name)
    assert found is not None
    (run,) = store.search_runs([found.experiment_id])
    return run


def test_a_run_is_delivered_whole(store: MlflowClient, project: Path) -> None:
    (project / "dvc.lock").write_text("stages: {clean@s: {cmd: x, outs: [{path: data/s/clean, md5: abc.dir}]}}\n")
    (project / "report.csv").write_text("a,b\n")
    params = {"model": {"dim": 8, "ratios": [1, 2]}, "lr": 1e-4}
    with tracking.run("finetune@t3av", params, ["data/s/clean/manifest.parquet"]) as run:
        for step in range(3):
            run.log({"loss": 1.0 / (step + 1), "top1/audio (%)": step}, step)
        run.artifact(project / "report.csv", "tables")
        (project / "report.csv").write_text("changed later\n")
        run.tag({"duet.sha256": "f" * 64})
    tracking.flush()
    made = only_run(store, "t3av")
    assert made.info.status == "FINISHED"
    assert made.info.run_name == "finetune@t3av"
    assert made.data.params == {"model.dim": "8", "model.ratios": "[1, 2]", "lr": "0.0001"}
    assert [(m.step, m.value) for m in store.get_metric_history(made.info.run_id, "loss")] == [
        (0, 1),
        (1, 0.5),
        (2, 1 / 3),
    ]
    assert made.data.metrics["top1/audio ___"] == 2
    assert made.data.tags["stage"] == "finetune@t3av"
    assert made.data.tags["dvc.dep.data/s/clean"] == "abc.dir"
    assert made.data.tags["git.commit"]
    assert made.data.tags["duet.run"] == run.id
    kept = store.download_artifacts(made.info.run_id, "tables/report.csv")
    assert Path(kept).read_text() == "a,b\n"
    assert not list(OUTBOX.glob("*/*"))


def test_artifacts_of_one_name_stay_apart(store: MlflowClient, project: Path) -> None:
    """Also while the delivery puts notes of its own into the folder and takes them away again."""
    with tracking.run("evaluate@t3av", {}) as run:
        for number in range(4):
            note = OUTBOX / run.id / tracking.ERROR
            note.touch() if number % 2 else note.unlink(missing_ok=True)
            (project / "table.csv").write_text(f"{number}\n")
            run.artifact(project / "table.csv", f"part{number}")
    tracking.flush()
    run_id = only_run(store, "t3av").info.run_id
    kept = [Path(store.download_artifacts(run_id, f"part{number}/table.csv")).read_text() for number in range(4)]
    assert kept == ["0\n", "1\n", "2\n", "3\n"]


def test_an_evaluation_leaves_numbers_plots_report_and_predictions(
    store: MlflowClient, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(project)
    monkeypatch.setattr(sys, "argv", ["evaluate", "t3av"])
    evaluate.main()
    tracking.flush()
    made = only_run(store, "t3av")
    out = project / "artifacts/t3av/evaluate"
    metrics = json.loads((out / "metrics.json").read_text())
    assert made.data.metrics.keys() == {f"test/{name}" for name in metrics}
    assert made.data.metrics["test/top1"] == pytest.approx(metrics["top1"], abs=1e-6)
    kept = Path(store.download_artifacts(made.info.run_id, ""))
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.*")}
    assert {"report.html", "predictions.csv", "plots/confusion.csv", "plots/confusion.png"} <= files.keys()
    assert {str(path.relative_to(kept)): path.read_bytes() for path in kept.rglob("*.*")} == files


def test_a_failure_marks_the_run_and_goes_on(store: MlflowClient) -> None:
    with pytest.raises(ZeroDivisionError), tracking.run("clean@sounds", {}) as run:
        run.log({"clips": 3})
        _ = 1 / 0
    tracking.flush()
    made = only_run(store, "sounds")
    assert made.info.status == "FAILED"
    assert made.data.metrics == {"clips": 3}
    assert made.data.tags["duet.error"].startswith("ZeroDivisionError")


def test_a_stopped_stage_counts_as_killed(store: MlflowClient) -> None:
    with pytest.raises(SystemExit), tracking.run("finetune@t3av", {}):
        sys.exit(143)
    tracking.flush()
    assert only_run(store, "t3av").info.status == "KILLED"


def test_a_killed_process_leaves_a_killed_run_with_its_metrics(store: MlflowClient, project: Path) -> None:
    code = """
import time
from tasks import journal, tracking
journal._start_delivery = lambda: None
with tracking.run("pretrain@t3av", {}) as run:
    run.log({"loss": 2.0}, 7)
    print("ready", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        tracking.flush()  # a run that goes on is nothing to wait for
        assert len(list(OUTBOX.glob("*/journal.jsonl"))) == 1
        child.send_signal(signal.SIGKILL)
    tracking.flush()
    made = only_run(store, "t3av")
    assert made.info.status == "KILLED"
    assert made.data.metrics == {"loss": 2.0}


def test_delivery_in_parts_and_after_a_crash_makes_one_run(store: MlflowClient) -> None:
    with tracking.run("finetune@t3av", {"lr": 1}) as run:
        run.log({"loss": 3.0}, 1)
        folder = OUTBOX / run.id
        assert tracking._deliver(store, folder) == ""
        assert only_run(store, "t3av").info.status == "RUNNING"
        run.log({"loss": 2.0}, 2)
        assert tracking._deliver(store, folder) == ""
        (folder / tracking.SENT).unlink()  # as if the delivering process died before it could note what it had sent
        run.log({"loss": 1.0}, 3)
    tracking.flush()
    made = only_run(store, "t3av")
    assert [m.value for m in store.get_metric_history(made.info.run_id, "loss")] == [3, 2, 1]


def test_a_server_that_is_away_costs_nothing(
    project: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with tracking.run("finetune@t3av", {}) as run:
        run.log({"loss": 1.0})
    with pytest.raises(InputError, match="did not take 1 runs"):
        tracking.flush()
    with tracking.run("evaluate@t3av", {}):
        assert "1 earlier runs wait" in capsys.readouterr().err
    shutil.copyfile(migrated, project / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", here)
    tracking.flush()
    experiment = tracking.client().get_experiment_by_name("t3av")
    assert experiment is not None
    assert len(tracking.client().search_runs([experiment.experiment_id])) == 2


def test_the_run_that_made_a_checkpoint_is_found(store: MlflowClient) -> None:
    assert tracking.find_run("a" * 64) is None
    for _ in range(2):
        with tracking.run("finetune@t3av", {}) as run:
            run.tag({"duet.sha256": "a" * 64})
        time.sleep(0.01)
    found = tracking.find_run("a" * 64)
    experiment = store.get_experiment_by_name("t3av")
    assert experiment is not None
    first = min(store.search_runs([experiment.experiment_id]), key=lambda item: item.info.start_time)
    assert found == first.info.run_id


def test_secrets_never_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter22")
    values = {
        "db": {"password": "abc", "PGPASSWORD": 12345},
        "hub": {"auth_token": "t0k", "num_tokens": 196, "mask_token": True},
        "source": "https://anna:pw@example.org/a.tar?X-Amz-Signature=99&part=1",
        "note": "run with hunter22 please",
        "api_keys": ["one", "two"],
        "lr": 1e-4,
    }
    assert redact(flatten(values)) == {
        "db.password": "***",
        "db.PGPASSWORD": "***",
        "hub.auth_token": "***",
        "hub.num_tokens": 196,
        "hub.mask_token": True,
        "source": "https://***@example.org/a.tar?X-Amz-Signature=***&part=1",
        "note": "run with *** please",
        "api_keys": ["***", "***"],
        "lr": 1e-4,
    }


def test_prefect_run_is_linked(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "1234")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    with tracking.run("clean@sounds", {}):
        pass
    tracking.flush()
    tags = only_run(store, "sounds").data.tags
    assert tags["prefect.flow_run_id"] == "1234"
    assert tags["prefect.flow_run_url"] == "http://127.0.0.1:4200/runs/flow-run/1234"


@pytest.mark.parametrize(("key", "value"), [("DUET_TRACKING", "off"), ("RANK", "1")])
def test_untracked(project: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str) -> None:
    monkeypatch.setenv(key, value)
    with tracking.run("clean@sounds", {}) as run:
        run.log({"clips": 1})
        run.artifact(project / "absent")
        run.tag({"a": "b"})
    assert not OUTBOX.exists()


def test_a_stage_does_not_load_mlflow(project: Path) -> None:
    code = """
import sys
from tasks import journal, tracking
journal._start_delivery = lambda: None
with tracking.run("clean@sounds", {}) as run:
    run.log({"a": 1})
sys.exit("mlflow" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def server(tmp_path: Path, migrated: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copyfile(migrated, folder / "mlflow.db")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.slow
def test_background_delivery_to_a_server(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DUET_TRACKING")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    (tmp_path / "table.csv").write_text("a\n")
    begin = time.monotonic()
    with tracking.run("clean@sounds", {"a": 1}) as run:
        run.log({"clips": 3})
        run.artifact(tmp_path / "table.csv")
    assert time.monotonic() - begin < 1
    for _ in range(240):
        if not list(OUTBOX.glob("*/journal.jsonl")):
            break
        time.sleep(0.5)
    store = tracking.client()
    made = only_run(store, "sounds")
    assert made.info.status == "FINISHED"
    assert Path(store.download_artifacts(made.info.run_id, "table.csv")).read_text() == "a\n"
    assert not (tmp_path / "mlflow.db").exists()
    for _ in range(240):  # the process ends by itself
        with tracking._sole_delivery() as free:
            if free:
                return
        time.sleep(0.5)
    pytest.fail("the delivering process did not end")
