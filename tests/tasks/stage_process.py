"""`python -m tasks.<stage> …` in a process of its own, without loading torch anew for each."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

STAGES = ["tasks.download", "tasks.subset", "tasks.clean", "tasks.stores", "tasks.train"]
LATER = ["models.t3av", "torch._dynamo", "pyarrow.dataset"]  # what these import when they run
BAR = re.compile(r".*\[\d\d:\d\d<?.*\]")  # as tqdm ends each state of a bar


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what a person would have seen."""

    code: int | None
    out: str
    errors: list[str]  # lines on stderr that are no progress bar


@dataclass(frozen=True)
class Command:
    """A stage that runs in `project`."""

    process: multiprocessing.Process
    shown: Path

    def go_on(self) -> None:
        """Continue what was stopped."""
        os.kill(self.process.pid or 0, signal.SIGCONT)

    def wait(self) -> Outcome:
        """Let it end."""
        self.process.join(120)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError("the command hangs")
        lines = re.split(r"[\r\n]+", (self.shown / "stderr").read_text())
        errors = [line for line in map(str.strip, lines) if line and not BAR.fullmatch(line)]
        return Outcome(self.process.exitcode, (self.shown / "stdout").read_text(), errors)


def start(project: Path, stage: str, *arguments: str, prepare: Callable[[], object] | None = None) -> Command:
    """Start `python -m tasks.<stage> <arguments>` in `project`; `prepare` is called in the new process before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(STAGES + LATER)
    shown = project.with_name(f"shown-{len(list(project.parent.glob('shown-*')))}")
    shown.mkdir()
    process = context.Process(target=_run, args=(project, shown, f"tasks.{stage}", arguments, prepare))
    process.start()
    return Command(process, shown)  # pyright: ignore[reportArgumentType]


def run(project: Path, stage: str, *arguments: str, prepare: Callable[[], object] | None = None) -> Outcome:
    """The same, to its end."""
    return start(project, stage, *arguments, prepare=prepare).wait()


def _run(
    project: Path, shown: Path, module: str, arguments: tuple[str, ...], prepare: Callable[[], object] | None
) -> None:
    os.chdir(project)
    for number, name in ((1, "stdout"), (2, "stderr")):
        with (shown / name).open("w") as file:
            os.dup2(file.fileno(), number)
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # preloaded for what it imports
    if prepare:
        prepare()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def stop_at(event: str, after: str = "", number: int = signal.SIGSTOP) -> None:
    """Send this process a signal at the first audit event of that name that comes after one called `after`."""
    awaited = [event, after] if after else [event]

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        if awaited and name == awaited[-1]:
            awaited.pop()
            if not awaited:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def contents(project: Path) -> dict[str, str]:
    """SHA-256 of each file below `project` but for `.duet`, "" for each folder."""
    found = {}
    for path in sorted(project.rglob("*")):
        name = path.relative_to(project).as_posix()
        if not name.startswith(".duet"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found
