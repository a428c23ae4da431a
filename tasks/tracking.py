"""MLflow: runs delivered from the stages' journals, lineage by content hash, and the registry.

Nothing here imports MLflow before it is needed: the import takes seconds. A local store (mlflow.db and
./mlruns of the project) serves by default, a server where MLFLOW_TRACKING_URI names one.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.journal import ERROR, JOURNAL, OUTBOX, Run, is_abandoned, run

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Run", "find_run", "flush", "run"]

LINGER = 10.0  # seconds without work before the delivering process ends: the next stage finds MLflow loaded
SENT = "sent.json"  # beside a journal: MLflow's run id and how many bytes of the journal it has


def uri() -> str:
    """Where MLflow keeps runs and versions."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def client() -> MlflowClient:
    """A client of the configured store. The first call in a process takes seconds, the first in a project longer."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    return MlflowClient(uri())


def experiment(store: MlflowClient, name: str) -> str:
    """The id of an experiment, made on first use."""
    found = store.get_experiment_by_name(name)
    if found:
        return found.experiment_id
    is_local = uri().startswith("sqlite:")
    return store.create_experiment(name, artifact_location="mlruns" if is_local else None)


def find_run(sha256: str) -> str | None:
    """MLflow's id of the run whose weights have this digest (its tag `duet.sha256`), the earliest if several."""
    flush()
    return _search(client(), "duet.sha256", sha256)


def _search(store: MlflowClient, tag: str, value: str) -> str | None:
    experiments = [item.experiment_id for item in store.search_experiments()]
    found = store.search_runs(experiments, f"tags.`{tag}` = '{value}'", order_by=["start_time ASC"], max_results=1)
    return found[0].info.run_id if found else None


# --- delivery ---------------------------------------------------------------------------------------------------------


def flush(timeout: float = 120.0) -> None:
    """Return when MLflow has every run that has ended; RuntimeError where it does not take one."""
    deadline = time.monotonic() + timeout
    store = None
    while pending := [folder for folder in _journals() if _has_ended(folder)]:
        with _sole_delivery() as sole:
            if sole:
                store = store or client()
                errors = [error for folder in pending if (error := _deliver(store, folder))]
                if errors:
                    raise RuntimeError(f"MLflow did not take {len(errors)} runs, kept in {OUTBOX}: {errors[0]}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(pending)} runs in {OUTBOX} were not delivered within {timeout:.0f} s")
        time.sleep(0 if sole else 0.2)


def main() -> None:
    """Deliver what stages write until none has written for a while."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the stage; what it still says is delivered
    os.nice(10)
    while _journals():  # asked again after the lock is free: a stage may have come in between and left the work to us
        with _sole_delivery() as sole:
            if not sole or not _deliver_all(client()):
                return


def _deliver_all(store: MlflowClient) -> bool:
    """Deliver until there was nothing to do for LINGER seconds; False when something could not be delivered."""
    quiet_since = time.monotonic()
    failed: set[Path] = set()
    while time.monotonic() - quiet_since < LINGER:
        for folder in set(_journals()) - failed:
            quiet_since = time.monotonic()
            if _deliver(store, folder):
                failed.add(folder)
        time.sleep(1)
    return not failed


@contextmanager
def _sole_delivery() -> Iterator[bool]:
    """Whether this process is the only one that delivers, for as long as the block lasts."""
    OUTBOX.mkdir(parents=True, exist_ok=True)
    with (OUTBOX / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _journals() -> list[Path]:
    return sorted(path.parent for path in OUTBOX.glob(f"*/{JOURNAL}"))


def _has_ended(folder: Path) -> bool:
    try:
        return is_abandoned(folder)
    except FileNotFoundError:  # delivered and removed in between
        return False


def _deliver(store: MlflowClient, folder: Path) -> str:
    """Send what is new of one journal; remove it once its end is sent. Returns what went wrong, "" when nothing did."""
    try:
        ended = is_abandoned(folder)  # asked before reading: what was written until then is complete
        state = json.loads((folder / SENT).read_text()) if (folder / SENT).exists() else {"run_id": "", "bytes": 0}
        with (folder / JOURNAL).open("rb") as file:
            file.seek(state["bytes"])
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        entries = [json.loads(line) for line in new.splitlines()]
        if entries:
            run_id = _send(store, folder, state["run_id"], entries)
            (folder / SENT).write_text(json.dumps({"run_id": run_id, "bytes": state["bytes"] + len(new)}))
        if ended:
            if not entries or entries[-1]["kind"] != "end":
                _end_killed(store, folder)
            shutil.rmtree(folder)
    except Exception as error:  # a run that MLflow refuses must hold up neither the stage nor the other runs
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        (folder / ERROR).write_text(reason + "\n")
        return reason
    (folder / ERROR).unlink(missing_ok=True)
    return ""


def _end_killed(store: MlflowClient, folder: Path) -> None:
    """Close a run whose process vanished without a word. One that did not even start has nothing to close."""
    if (folder / SENT).exists():
        run_id = json.loads((folder / SENT).read_text())["run_id"]
        if store.get_run(run_id).info.status == "RUNNING":
            store.set_terminated(run_id, "KILLED")


def _send(store: MlflowClient, folder: Path, run_id: str, entries: list[dict[str, Any]]) -> str:
    """Send journal entries in order, runs of metrics as one batch; returns MLflow's run id."""
    from mlflow.entities import Metric

    metrics: list[Metric] = []
    for entry in entries:
        match entry["kind"]:
            case "start":
                run_id = _search(store, "duet.run", entry["tags"]["duet.run"]) or _create(store, entry)
            case "metrics":
                items = entry["values"].items()
                metrics += [Metric(_name(key), value, entry["time"], entry["step"]) for key, value in items]
            case "artifact":
                store.log_artifact(run_id, str(folder / entry["path"]), entry["folder"] or None)
            case "tags":
                set_tags(store, run_id, entry["values"])
            case "end":
                _log_metrics(store, run_id, metrics)
                metrics = []
                store.set_terminated(run_id, entry["status"], entry["time"])
    _log_metrics(store, run_id, metrics)
    return run_id


def _create(store: MlflowClient, entry: dict[str, Any]) -> str:
    from mlflow.entities import Param

    made = store.create_run(experiment(store, entry["experiment"]), entry["time"], entry["tags"], entry["name"])
    params = [Param(_name(key), value[:6000]) for key, value in entry["params"].items()]
    for start in range(0, len(params), 100):  # the most one call may carry
        store.log_batch(made.info.run_id, params=params[start : start + 100])
    return made.info.run_id


def set_tags(store: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Put tags on a run."""
    from mlflow.entities import RunTag

    store.log_batch(run_id, tags=[RunTag(_name(key), value) for key, value in tags.items()])


def _log_metrics(store: MlflowClient, run_id: str, metrics: list[Any]) -> None:
    for start in range(0, len(metrics), 1000):  # the most one call may carry
        store.log_batch(run_id, metrics=metrics[start : start + 1000])


def _name(key: str) -> str:
    """A key as MLflow takes it: letters, digits, and _ - . / space."""
    return re.sub(r"[^\w\-./ ]", "_", key)


if __name__ == "__main__":
    main()
