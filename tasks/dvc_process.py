"""Runs DVC as a process that can be stopped: its graph, what changed, and one stage at a time.

`dvc --wait-for-lock repro -s` because without `-s` siblings block each other, and without waiting a stage whose work is
done is lost when a sibling is committing.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from models.family import InputError
from tasks import graph
from tasks.storage import atomic_file

GUARD = Path(__file__).with_name("guard.py")
GRACE = 25.0  # seconds from "please end" to SIGKILL: a checkpoint fits, and Prefect kills the flow's process at 30
PROGRESS_INTERVAL = 5.0  # seconds between two lines of one progress bar
MAX_LINES = 50  # a second; more only bury the interface
TAIL = 30  # lines kept for an error message

Emit = Callable[[str], None]
Result = Literal["ran", "cached", "unchanged"]

# What another try may mend: networks, stores, processes killed from outside. Everything else fails at once.
_TEMPORARY = re.compile(
    r"Connection(?:Error|Reset|Refused|Aborted)|EndpointConnectionError|Read ?timed? ?out|TimeoutError|ReadTimeout"
    r"|Temporary failure in name resolution|IncompleteRead|RemoteDisconnected|SlowDown|ServiceUnavailable|InternalError"
    r"|(?:HTTP|status)\D{0,12}(?:429|5\d\d)|Stale file handle|exited with (?:-9|137)$",
    re.IGNORECASE | re.MULTILINE,
)


class StageFailed(RuntimeError):
    """A stage ended badly; the message holds the end of what it printed."""


class StageUnlucky(StageFailed):
    """A stage failed for a reason outside it: trying again may help."""


class Stopped(Exception):
    """The stage was asked to end and did."""


class LineFeed:
    """Bytes of a terminal program to lines worth keeping: a progress bar's redraws thinned, floods cut and counted."""

    def __init__(self, emit: Emit) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL)
        self._emit, self._rest = emit, b""
        self._last_progress = self._second = 0.0
        self._in_second = self._skipped = 0

    def feed(self, data: bytes) -> None:
        """Take what was read; whole lines come out, the rest waits."""
        *pieces, self._rest = re.split(rb"(?<=\n)|(?<=\r)(?=[^\n])", self._rest + data)
        for piece in pieces:
            text = piece.decode(errors="replace").rstrip()
            if text and piece.endswith(b"\r"):
                self._progress(text)
            elif text:
                self._line(text)

    def close(self) -> None:
        """What was left without an end of line."""
        self.feed(b"\n")
        self._report_skipped()

    def _progress(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last_progress >= PROGRESS_INTERVAL:
            self._last_progress = now
            self._emit(text)

    def _line(self, text: str) -> None:
        self.tail.append(text)
        if time.monotonic() - self._second >= 1:
            self._report_skipped()
            self._second, self._in_second = time.monotonic(), 0
        self._in_second += 1
        if self._in_second <= MAX_LINES:
            self._emit(text)
        else:
            self._skipped += 1

    def _report_skipped(self) -> None:
        if self._skipped:
            self._emit(f"… {self._skipped} lines more, in the log file")
            self._skipped = 0


def guarded(command: Sequence[str], grace: float = GRACE, keep: Sequence[int] = (), **options: Any) -> Guarded:
    """Start a command under the guard, in its own session. `keep`: descriptors that stay open as long as it lives."""
    reading, writing = os.pipe()
    try:
        line = [sys.executable, "-P", str(GUARD), str(reading), str(grace), *command]
        process: Any = subprocess.Popen(line, start_new_session=True, pass_fds=[reading, *keep], **options)
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    return Guarded(process, writing)


@dataclass
class Guarded:
    """A command under the guard."""

    process: subprocess.Popen[bytes]
    lifeline: int  # open while the command is wanted; -1 after

    def stop(self) -> None:
        """Ask it and everything below it to end; returns at once."""
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1


def run(
    command: Sequence[str],
    folder: Path,
    emit: Emit,
    stop: Event,
    *,
    log: Path,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
    keep: Sequence[int] = (),
) -> tuple[int, list[str]]:
    """Run a command to its end: (exit code, its last lines). Stopped when `stop` is set, StageFailed past `timeout`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    env = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1", **(environment or {})}
    if stop.is_set():
        raise Stopped
    child = guarded(
        command, keep=keep, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )
    feed, deadline, late = LineFeed(emit), time.monotonic() + (timeout or float("inf")), False
    try:
        with log.open("ab") as file:
            for data in _output(child.process):
                file.write(data)
                feed.feed(data)
                late = late or time.monotonic() > deadline
                if late or stop.is_set():
                    child.stop()
    finally:
        child.stop()
        child.process.wait()
    feed.close()
    if stop.is_set() and child.process.returncode:
        raise Stopped
    if late:
        raise StageFailed(f"not finished after {timeout:.0f} s; raise its timeout in params.yaml's orchestration")
    return child.process.returncode, list(feed.tail)


def _output(process: subprocess.Popen[bytes]) -> Any:
    """What the process prints, in pieces; an empty one at least five times a second, so that the caller may look up."""
    assert process.stdout
    os.set_blocking(process.stdout.fileno(), False)
    with selectors.DefaultSelector() as selector, process.stdout as pipe:
        selector.register(pipe, selectors.EVENT_READ)
        ended = False
        while not ended:
            ended = process.poll() is not None  # then what is in the pipe is all: a leftover may hold it open
            while selector.select(0 if ended else 0.2):
                data = os.read(pipe.fileno(), 65536)
                yield data
                if not data:
                    process.wait()
                    return
            yield b""


def reproduce(
    stage: str,
    folder: Path,
    emit: Emit,
    stop: Event,
    *,
    log: Path,
    force: bool = False,
    pull: bool = False,
    push: bool = False,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
    keep: Sequence[int] = (),
) -> Result:
    """Bring one stage up to date in a checkout; StageUnlucky where another try may help, else StageFailed.

    `pull`: what it needs comes from DVC's remote where it is not here; `push`: what it made goes there.
    """
    before = _lock_entry(folder, stage)
    command = ["dvc", "--wait-for-lock", "repro", "-s", stage]
    command[3:3] = ["--pull", "--allow-missing"] if pull else []
    command += ["--force"] if force else []
    lines: list[str] = []

    def watch(line: str) -> None:
        lines.append(line) if line.startswith(("Running stage", f"Stage '{stage}'")) else None
        emit(line)

    if force and pull:  # `repro --force` does not pull what the stage needs
        run(["dvc", "--wait-for-lock", "pull", "--with-deps", stage], folder, emit, stop, log=log)
    _expect(stage, run(command, folder, watch, stop, log=log, timeout=timeout, environment=environment, keep=keep))
    if push:  # also what was there already: the remote may be newer than it
        _expect(stage, run(["dvc", "--wait-for-lock", "push", "--run-cache", stage], folder, emit, stop, log=log))
    # dvc.lock tells whether the result is another one. A command that ran and made the same bytes, and a result that
    # came out of the run cache, are told apart by DVC's own line.
    if any("is cached" in line for line in lines):
        return "cached"
    is_same = before is not None and before == _lock_entry(folder, stage)
    return "unchanged" if is_same and not any(line.startswith("Running") for line in lines) else "ran"


def _expect(stage: str, outcome: tuple[int, list[str]]) -> None:
    code, tail = outcome
    if code:
        text = "\n".join(tail)
        kind = StageUnlucky if _TEMPORARY.search(text) else StageFailed
        raise kind(f"{stage} failed:\n{text}")


def pull(stages: Sequence[str], folder: Path, emit: Emit, stop: Event, *, log: Path) -> None:
    """Lay out what dvc.lock says of these stages, from the cache or the remote, in place of what lies there.

    `repro --allow-missing` alone takes a dependency that is absent or old for unchanged when a single stage is run.
    """
    _expect(", ".join(stages), run(["dvc", "--wait-for-lock", "pull", "--force", *stages], folder, emit, stop, log=log))


def adopt(folder: Path, stage: str, entry: Mapping[str, Any]) -> None:
    """Enter in dvc.lock what a stage made on another machine, between the stages that are written there meanwhile."""
    from dvc.lock import make_lock  # takes a quarter of a second, which most runs need not spend

    path, temporary = folder / "dvc.lock", folder / ".dvc/tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    with make_lock(str(temporary / "lock"), tmp_dir=str(temporary), wait=True):
        content = (YAML().load(path.read_text()) if path.exists() else None) or {"schema": "2.0", "stages": {}}
        content["stages"][stage] = dict(entry)
        with atomic_file(path) as written, written.open("w") as file:
            YAML().dump(content, file)


def _lock_entry(folder: Path, stage: str) -> Any:
    for _ in range(20):  # a sibling may be writing the file just now
        try:
            return graph.stages(folder / "dvc.lock").get(stage)
        except (YAMLError, AttributeError):
            time.sleep(0.1)
    raise StageFailed(f"{folder / 'dvc.lock'} is not YAML; restore it with git checkout dvc.lock")


def ask(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a question to DVC; `answer` waits for it."""
    env = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    command = [str(Path(sys.executable).parent / "dvc"), "--wait-for-lock", *arguments]
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def answer(question: subprocess.Popen[str]) -> str:
    """What DVC said; InputError with its own words where it could not."""
    out, error = question.communicate()
    if question.returncode:
        raise InputError(f"dvc {' '.join(question.args[2:])}: {' '.join(error.split()) or 'failed'}")  # type: ignore[index]
    return out


# Both questions in one process: DVC's start takes as long as the answers.
_STATE = """
import sys
from dvc.cli import main
sys.exit(main(["--wait-for-lock", "dag", "--dot"]) or print() or main(["--wait-for-lock", "status", "--json"]))
"""


def read_state(folder: Path) -> tuple[dict[str, list[str]], set[str]]:
    """stage -> the stages it needs, as `parse_dot` gives them; and the stages that may change.

    Those are the ones that `dvc status` names, and all that come after them.
    """
    env = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run([sys.executable, "-c", _STATE], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"dvc status: {' '.join(done.stderr.split()) or 'failed'}")
    dot, _, status = done.stdout.rstrip().rpartition("\n")
    needs = parse_dot(dot)
    return needs, with_dependents(json.loads(status or "{}"), needs)


def parse_dot(text: str) -> dict[str, list[str]]:
    """`dvc dag --dot` -> stage: the stages it needs, those before it first. foreach and matrix are already expanded."""
    needs: dict[str, list[str]] = {}
    for line in text.splitlines():
        names = [name for name in re.findall(r'"([^"]+)"', line) if not name.endswith(".dvc")]
        for name in names:
            needs.setdefault(name, [])
        if "->" in line and len(names) == 2:
            needs[names[1]].append(names[0])
    ordered: dict[str, list[str]] = {}
    while len(ordered) < len(needs):
        ready = [name for name in needs if name not in ordered and all(need in ordered for need in needs[name])]
        if not ready:
            raise InputError(f"dvc.yaml: the stages {', '.join(sorted(needs.keys() - ordered))} wait for each other")
        ordered.update({name: needs[name] for name in ready})
    return ordered


def with_dependents(stages: Iterable[str], needs: Mapping[str, Sequence[str]]) -> set[str]:
    """The stages and all that need them; `needs` is in order, so those before a stage are decided before it."""
    found = set(stages)
    for stage, before in needs.items():
        if found.intersection(before):
            found.add(stage)
    return found
