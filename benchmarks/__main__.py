"""Runs all benchmarks, each in processes of its own, and writes one table of them.

    python -m benchmarks [name ...] [--quick]

The rows go to benchmarks/results/<machine>.json and .md, and to history.csv there. A benchmark that fails is told, the
others run on, and the exit code is 1. With --quick nothing is written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import record
from benchmarks.table import Row

# In the order of the table.
NAMES = ["preparation", "loader", "step", "steps", "caption", "tad", "tad_modes", "tagging", "scale", "overhead"]


def command(name: str) -> list[str]:
    """What runs a benchmark."""
    return [sys.executable, "-m", f"benchmarks.{name}"]


def run(name: str, quick: bool) -> tuple[dict[str, record.Measured], bool]:
    """What one benchmark measured, by part, and whether it came to its end."""
    measured: dict[str, record.Measured] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        options = ["--rows", str(path), *(["--quick"] if quick else [])]
        began = record.Measured([])
        ended = subprocess.run([*command(name), *options], cwd=record.ROOT, check=False).returncode == 0
        for line in path.read_text().splitlines() if path.exists() else []:
            values = json.loads(line)
            part = f"{name}.{values.pop('part')}"
            measured.setdefault(part, record.Measured([], began.date, began.commit, began.load)).rows.append(
                Row(**values)
            )
    return measured, ended


def main() -> None:
    """Run the benchmarks asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; all unless told")
    parser.add_argument("--quick", action="store_true", help="less work: whether they run, not what they cost")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in NAMES]:
        parser.error(f"there is no benchmark {unknown[0]!r}: choose from {', '.join(NAMES)}")
    names, failed, missed = given.names or NAMES, [], list[str]()
    for place, name in enumerate(names, 1):
        print(f"[{place}/{len(names)}] {name}", flush=True)
        began = time.monotonic()
        measured, ended = run(name, given.quick)
        if not ended:
            failed.append(name)
        missed += [row.name for part in measured.values() for row in part.rows if not row.met]
        if measured and not given.quick:
            print(f"  {record.write(measured, NAMES).relative_to(record.ROOT)}", end="")
        print(f"  {time.monotonic() - began:.0f} s" + ("" if ended else ", FAILED"), flush=True)
    print(f"{len(names) - len(failed)} of {len(names)} benchmarks came to their end")
    if missed:
        print("below what is asked: " + "; ".join(missed))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
