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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.journal import ERROR, JOURNAL, OUTBOX, Run, is_abandoned, params_of, redact, run

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient

__all__ = [
    "Run",
    "Submission",
    "add_version",
    "download_bundle",
    "find_run",
    "find_version",
    "flush",
    "run",
    "set_alias",
]

EVALUATION, SOURCE = "evaluation", "source"  # folders of a version's run: how it was judged, what it was made from
LINGER = 60.0  # seconds without work before the delivering process ends: the next stage finds MLflow loaded
SENT = "sent.json"  # beside a journal: MLflow's run id and how many bytes of the journal it has


def uri() -> str:
    """Where MLflow keeps runs and versions."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def client() -> MlflowClient:
    """A client of the configured store. The first call in a process takes seconds, the first in a project longer."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING"] = "false"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    import mlflow

    mlflow.set_tracking_uri(uri())
    mlflow.set_registry_uri(uri())
    return mlflow.MlflowClient()


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


# --- the registry -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
    """What becomes a registered version."""

    name: str  # of the registered model
    experiment: str
    stage: str  # the run's name
    params: Mapping[str, Any]
    metrics: Mapping[str, float]  # named after their split: test/top1
    evaluation: Path  # the folder with report, plots and predictions that the version was judged by
    sources: Sequence[Path]  # params.yaml and dvc.lock: with the commit, all that it was made from
    tags: Mapping[str, str]
    bundle: Path
    code: Path  # the file that MLflow executes to serve the version
    code_paths: Sequence[Path]  # packages that travel with the version
    requirements: Sequence[str]
    example: pd.DataFrame
    answer: pd.DataFrame  # what the version must answer to the example


def find_version(name: str, tags: Mapping[str, str]) -> int | None:
    """The first version of a registered model that has all these tags."""
    words = [f"name = '{name}'", *(f"tags.`{key}` = '{value}'" for key, value in tags.items())]
    found = client().search_model_versions(" and ".join(words))
    return min((int(item.version) for item in found), default=None)


def add_version(submission: Submission) -> int:
    """Log a run with its evaluation and model, prove that the model loads and answers, and only then register it.

    Whatever fails leaves neither a version nor a model nor a run behind.
    """
    store = client()
    run_tags = {**submission.tags, "stage": submission.stage}
    made = store.create_run(experiment(store, submission.experiment), tags=run_tags, run_name=submission.stage)
    run_id = made.info.run_id
    try:
        _log_values(store, run_id, submission)
        model_uri = _log_model(run_id, submission)
        return _register(store, model_uri, submission)
    except BaseException:
        for model in store.search_logged_models([made.info.experiment_id], f"source_run_id = '{run_id}'"):
            store.delete_logged_model(model.model_id)
        store.delete_run(run_id)
        raise


def _log_values(store: MlflowClient, run_id: str, submission: Submission) -> None:
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    _log_metrics(store, run_id, [Metric(_name(key), value, now, 0) for key, value in submission.metrics.items()])
    _log_params(store, run_id, params_of(submission.params))
    store.log_artifacts(run_id, str(submission.evaluation), EVALUATION)
    for path in submission.sources:
        store.log_text(run_id, redact({"text": path.read_text()})["text"], f"{SOURCE}/{path.name}")


def _log_model(run_id: str, submission: Submission) -> str:
    """The address of the logged model; ValueError when it does not answer as the bundle itself does."""
    import mlflow
    from mlflow.models import ModelSignature, infer_signature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    columns: list[Any] = [
        ColSpec(DataType.string, "path", required=False),
        ColSpec(DataType.string, "video", required=False),
    ]
    outputs = infer_signature(submission.example, submission.answer).outputs
    signature = ModelSignature(Schema(columns), outputs, ParamSchema([ParamSpec("top", DataType.long, 5)]))
    with mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name=submission.name,
            python_model=str(submission.code),
            code_paths=[str(path) for path in submission.code_paths],
            artifacts={"bundle": str(submission.bundle)},
            signature=signature,
            input_example=submission.example,
            pip_requirements=list(submission.requirements),
            metadata=dict(submission.tags),
        )
        answer = mlflow.pyfunc.load_model(logged.model_uri).predict(submission.example)
    if answer.to_dict("records") != submission.answer.to_dict("records"):
        raise ValueError(f"the logged model answers {answer.to_dict('records')} to its example")
    return logged.model_uri


def _register(store: MlflowClient, model_uri: str, submission: Submission) -> int:
    import mlflow

    try:
        return int(mlflow.register_model(model_uri, submission.name, tags=dict(submission.tags)).version)
    except BaseException:
        if not store.search_model_versions(f"name = '{submission.name}'"):
            store.delete_registered_model(submission.name)
        raise


def set_alias(name: str, alias: str, version: int, only_if_free: bool = False) -> list[str]:
    """Point an alias at a version, or leave it where it points already; returns all aliases of that version, sorted."""
    store = client()
    taken = {key: int(value) for key, value in store.get_registered_model(name).aliases.items()}
    if not (only_if_free and alias in taken) and taken.get(alias) != version:
        store.set_registered_model_alias(name, alias, str(version))
        taken[alias] = version
    return sorted(key for key, value in taken.items() if value == version)


def download_bundle(address: str) -> Path:
    """The bundle within a registered version, models:/NAME/VERSION or models:/NAME@ALIAS; InputError without one."""
    from models.family import InputError

    client()
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

    try:
        repository = ModelsArtifactRepository(address)
        described = Model.load(repository.download_artifacts("MLmodel"))
        bundle = described.flavors["python_function"]["artifacts"]["bundle"]["path"]
        return Path(repository.download_artifacts(bundle))
    except MlflowException as error:
        raise InputError(f"{address}: {error.message} (in {redact({'uri': uri()})['uri']})") from None


# --- delivery ---------------------------------------------------------------------------------------------------------


def flush(timeout: float = 120.0) -> None:
    """Return when MLflow has every run that has ended; InputError where it does not take one."""
    from models.family import InputError  # loads torch: not for every process that tracks

    deadline = time.monotonic() + timeout
    store = None
    while pending := [folder for folder in _journals() if _has_ended(folder)]:
        with _sole_delivery() as sole:
            if sole:
                store = store or client()
                errors = [error for folder in pending if (error := _deliver(store, folder))]
                if errors:
                    raise InputError(f"MLflow did not take {len(errors)} runs, kept in {OUTBOX}: {errors[0]}")
        if time.monotonic() > deadline:
            raise InputError(f"{len(pending)} runs in {OUTBOX} were not delivered within {timeout:.0f} s")
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
    made = store.create_run(experiment(store, entry["experiment"]), entry["time"], entry["tags"], entry["name"])
    _log_params(store, made.info.run_id, entry["params"])
    return made.info.run_id


def _log_params(store: MlflowClient, run_id: str, values: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    params = [Param(_name(key), value[:6000]) for key, value in values.items()]
    for start in range(0, len(params), 100):  # the most one call may carry
        store.log_batch(run_id, params=params[start : start + 100])


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
