"""What a stage tells about its run, written to disk at once and sent to MLflow by another process.

Importing MLflow and opening its store take longer than most data stages, and a tracking server can be away for an hour
of a three-day training. So a stage only appends lines to `.duet/tracking/<id>/journal.jsonl`; a background process for
all stages (`python -m tasks.tracking`) delivers them in seconds, and what could not be delivered waits for the next
stage. The stage holds a lock on its journal: one without an `end` line whose lock is free is of a run that was killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tasks import graph

OUTBOX = Path(".duet/tracking")
JOURNAL = "journal.jsonl"
ERROR = "error.txt"  # beside a journal: why it was not delivered

_SECRET_KEY = re.compile(r"passw|secret|credential|api_?key|access_?key|signature|token(?!s|i)", re.IGNORECASE)
_URL_USER = re.compile(r"(\b[\w+.-]+://)[^/\s@]+@")
_URL_QUERY = re.compile(r"([?&](?:[\w.-]*(?:passw|secret|credential|key|signature|token|sig))=)[^&\s]+", re.IGNORECASE)


class Run:
    """One run of a stage. `id` stands in MLflow as the tag `duet.run`; MLflow gives its own id on delivery."""

    def __init__(self, folder: Path | None) -> None:
        self.id = folder.name if folder else "off"
        self._folder = folder
        self._file: IO[str] | None = None
        self._artifacts = 0
        if folder:
            folder.mkdir(parents=True)
            self._file = (folder / "new").open("a")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            (folder / "new").rename(folder / JOURNAL)  # seen by the delivery only now that it is locked

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Metrics at a step; costs microseconds, so it may stand in a training loop."""
        self._write("metrics", values={key: float(value) for key, value in metrics.items()}, step=step or 0)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a file's present content with the run, below `folder` among its artifacts."""
        if self._folder:
            self._artifacts += 1  # each in a folder of its own: names may repeat
            kept = self._folder / str(self._artifacts) / path.name
            kept.parent.mkdir()
            shutil.copyfile(path, kept)
            self._write("artifact", path=f"{self._artifacts}/{path.name}", folder=folder)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Words by which the run is found again, such as `duet.sha256` of the weights it made."""
        self._write("tags", values=redact({key: str(value) for key, value in tags.items()}))

    def _write(self, kind: str, **fields: Any) -> None:
        if self._file:
            self._file.write(json.dumps({"kind": kind, "time": time.time_ns() // 1_000_000, **fields}) + "\n")
            self._file.flush()

    def _end(self, status: str) -> None:
        self._write("end", status=status)
        if self._file:
            self._file.close()


@contextmanager
def run(stage: str, params: Mapping[str, Any], inputs: Iterable[Path | str] = ()) -> Iterator[Run]:
    """Track one run of `stage`, named as in DVC: `clean@sounds`, `finetune@t3av`; what follows the @ is the experiment.

    `params` may be nested. `inputs` are paths the stage reads: their hashes in dvc.lock become tags. An exception marks
    the run FAILED, an exit or Ctrl-C KILLED, and goes on. DUET_TRACKING=off tracks nothing; nor does a distributed
    process that is not the first.
    """
    if os.environ.get("DUET_TRACKING") == "off" or os.environ.get("RANK", "0") != "0":
        yield Run(None)
        return
    _warn_of_undelivered()
    active = Run(OUTBOX / uuid.uuid4().hex)
    active._write(
        "start",
        experiment=stage.partition("@")[2] or stage,
        name=stage,
        params=params_of(params),
        tags=redact({"duet.run": active.id, **_tags(stage, inputs)}),
    )
    _start_delivery()
    status = "FINISHED"
    try:
        yield active
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"
        active.tag({"duet.error": f"{type(error).__name__}: {error}"[:500]})
        raise
    finally:
        active._end(status)


def params_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Nested values as MLflow's params: dotted keys, texts, no secrets."""
    return {key: _text(value) for key, value in redact(flatten(values)).items()}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys; lists stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def redact(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flat values with secrets as ***: under a telling key, within a URL, or equal to a secret of the environment."""
    hidden = [value for key, value in os.environ.items() if _SECRET_KEY.search(key) and len(value) >= 6]

    def clean(key: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [clean(key, item) for item in value]
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "" and _SECRET_KEY.search(key):
            return "***"
        if not isinstance(value, str):
            return value
        for secret in hidden:
            value = value.replace(secret, "***")
        return _URL_QUERY.sub(r"\1***", _URL_USER.sub(r"\1***@", value))

    return {key: clean(key, value) for key, value in values.items()}


def is_abandoned(folder: Path) -> bool:
    """Whether the process that wrote this journal is gone."""
    with (folder / JOURNAL).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _tags(stage: str, inputs: Iterable[Path | str]) -> dict[str, str]:
    tags = {"stage": stage, "git.commit": graph.commit(), "git.dirty": str(graph.dirty()).lower()}
    return tags | {f"dvc.dep.{path}": md5 for path, md5 in graph.out_hashes(inputs).items()} | flow_tags()


def flow_tags() -> dict[str, str]:
    """Which flow run of Prefect this process works for, and its page; none outside one."""
    tags = {}
    if flow_run := os.environ.get("PREFECT__FLOW_RUN_ID"):
        tags["prefect.flow_run_id"] = flow_run
        page = os.environ.get("PREFECT_UI_URL") or os.environ.get("PREFECT_API_URL", "").removesuffix("/api")
        if page:
            tags["prefect.flow_run_url"] = f"{page.rstrip('/')}/runs/flow-run/{flow_run}"
    return tags


def _warn_of_undelivered() -> None:
    errors = list(OUTBOX.glob(f"*/{ERROR}"))
    with suppress(FileNotFoundError):  # delivered in between
        if errors:
            reason = errors[0].read_text().strip()
            print(f"warning: {len(errors)} earlier runs wait in {OUTBOX} to reach MLflow: {reason}", file=sys.stderr)


def _start_delivery() -> None:
    """Start the background process; it leaves at once when another one is at work in this project.

    It works in the project itself, not in a run's checkout, which is gone when the run ends.
    """
    command, project = [sys.executable, "-m", "tasks.tracking"], OUTBOX.resolve().parents[1]
    with (OUTBOX / "delivery.log").open("a") as log:
        subprocess.Popen(command, cwd=project, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
