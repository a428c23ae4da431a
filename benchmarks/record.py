"""Writes the table of speeds down: one file a machine, as JSON and as Markdown, and a history of all runs.

A benchmark that runs anew takes the place of its earlier rows; what else the file of this machine has stays.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import HEAD, Row
from tasks.storage import atomic_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
HISTORY = ["date", "commit", "machine", "benchmark", "name", "unit", "ours", "peer", "ratio"]


@dataclass(frozen=True)
class Measured:
    """A part of a benchmark: its rows, and when and beside what they were measured."""

    rows: list[Row]
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    commit: str = field(default_factory=lambda: commit())
    load: float = field(default_factory=lambda: round(os.getloadavg()[0], 1))  # average of the last minute
    torch: str = str(torch.__version__)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = found[1].strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu}


def commit() -> str:
    """The short hash of the code that runs, with a + where files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def slug(kind: dict[str, Any]) -> str:
    """A machine's file name."""
    words = f"{kind['gpu'] or kind['cpu']} {kind['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def read(path: Path) -> dict[str, Measured]:
    """`benchmark.part` -> what was measured, of a machine's JSON file; nothing of a file that is not there yet."""
    if not path.exists():
        return {}
    parts = json.loads(path.read_text())["benchmarks"]
    return {name: Measured(**part | {"rows": [Row(**row) for row in part["rows"]]}) for name, part in parts.items()}


def markdown(kind: dict[str, Any], parts: dict[str, Measured]) -> str:
    """The table, and below it what it was measured on."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(row.cells()) + " |" for part in parts.values() for row in part.rows]
    where = f"{kind['cpu']}, {kind['cores']} cores" + (f", {kind['gpu']}" if kind["gpu"] else "")
    dates = sorted({part.date[:10] for part in parts.values()})
    loads = [part.load for part in parts.values()]
    torches = sorted({part.torch for part in parts.values()})
    about = f"{where}; torch {', '.join(torches)}; {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}"
    return "\n".join(lines) + f"\n\n{about}; load average {min(loads)} to {max(loads)} when each began.\n"


def write(new: dict[str, Measured], order: Sequence[str]) -> Path:
    """Put `benchmark.part` -> what was measured into this machine's files and the history; the JSON file's path.

    Benchmarks follow one another as `order` has them, parts as they were measured.
    """
    kind = machine()
    path = RESULTS / f"{slug(kind)}.json"
    RESULTS.mkdir(exist_ok=True)
    known = read(path) | new
    parts = {name: known[name] for name in sorted(known, key=lambda name: order.index(name.split(".")[0]))}
    values = {"machine": kind, "benchmarks": {name: asdict(part) for name, part in parts.items()}}
    with atomic_file(path) as file:
        file.write_text(json.dumps(values, indent=1) + "\n")
    with atomic_file(path.with_suffix(".md")) as file:
        file.write_text(markdown(kind, parts))
    history = RESULTS / "history.csv"
    fresh = not history.exists()
    with history.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(HISTORY)
        for name, part in new.items():
            for row in part.rows:
                figures = [row.ours, row.peer, row.ratio]
                writer.writerow([part.date, part.commit, path.stem, name, row.title, row.unit, *figures])
    return path
