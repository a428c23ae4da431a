"""Rows of the table of speeds, and how a benchmark is run by itself.

A benchmark is a module of this folder with a docstring that says what is compared, and `PARTS`: name -> a function that
measures and gives `Row`s, from less work when it is called with True. Each ends in

    if __name__ == "__main__":
        table.main(__doc__, PARTS)

so that `python benchmarks/<name>.py` prints all rows, each part measured in a process of its own, which keeps figures of
memory clean, and `python -m benchmarks` writes those of all modules down.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

Part = Callable[[bool], "Iterable[Row]"]  # quick? -> rows
ROOT = Path(__file__).resolve().parents[1]
COMPARISONS = {">=": operator.ge, "<=": operator.le, "<": operator.lt}
HEAD = ["", "unit", "ours", "peer", "ratio", "asked"]


@dataclass(frozen=True)
class Row:
    """A line of the table: what was measured of ours and, where there is one, of a peer in the same run."""

    name: str
    unit: str
    ours: float
    peer: float | None = None
    against: str = ""  # the peer's name
    ratio: float | None = None  # how many times better than the peer ours is, or of what `name` says
    asked: str = ""  # of the ratio, or of ours where there is no ratio, such as ">= 10"
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether what is asked was reached; where nothing is asked, it was."""
        if not self.asked:
            return True
        sign, value = self.asked.split()
        return bool(COMPARISONS[sign](self.ours if self.ratio is None else self.ratio, float(value)))

    @property
    def title(self) -> str:
        """What is compared with what."""
        return f"{self.name} / {self.against}" if self.against else self.name

    def cells(self) -> list[str]:
        """As HEAD names them."""
        asked = self.asked.replace(">=", "≥").replace("<=", "≤") + ("" if self.met else ", missed")
        notes = f" ({self.note})" if self.note else ""
        return [self.title + notes, self.unit, number(self.ours), number(self.peer), number(self.ratio), asked]


def rates(name: str, unit: str, ours: float, peer: float, against: str, asked: str = "", note: str = "") -> Row:
    """A row of which more is better."""
    return Row(name, unit, ours, peer, against, ours / peer, asked, note)


def costs(name: str, unit: str, ours: float, peer: float, against: str, asked: str = "", note: str = "") -> Row:
    """A row of which less is better."""
    return Row(name, unit, ours, peer, against, peer / ours, asked, note)


def number(value: float | None) -> str:
    """Three digits that count, thousands in groups; nothing of None."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(digits, 0)}f}"


def line(row: Row) -> str:
    """A row for the terminal."""
    name, unit, ours, peer, ratio, asked = row.cells()
    return f"{name:<88} {ours:>10} {peer:>10} {unit:<18} {ratio:>7}  {asked}".rstrip()


def main(doc: str | None, parts: Mapping[str, Part]) -> None:
    """Measure the parts asked for, or all. Rows are printed as they come, and appended to `--rows` as lines of JSON."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(parts)}; all unless told")
    parser.add_argument("--quick", action="store_true", help="less work: whether it runs, not what it costs")
    parser.add_argument("--rows", type=Path, help="a file")
    given = parser.parse_args()
    if unknown := [part for part in given.parts if part not in parts]:
        parser.error(f"there is no part {unknown[0]!r}: choose from {', '.join(parts)}")
    if len(given.parts) == 1 or len(parts) == 1:
        (part,) = given.parts or parts
        for row in parts[part](given.quick):
            print(line(row), flush=True)
            if given.rows:
                with given.rows.open("a") as file:
                    file.write(json.dumps({"part": part, **asdict(row)}) + "\n")
        return
    options = [argument for argument in sys.argv[1:] if argument not in parts]
    command = [sys.executable, "-m", f"benchmarks.{Path(sys.argv[0]).stem}"]
    codes = [
        subprocess.run([*command, part, *options], cwd=ROOT, check=False).returncode for part in given.parts or parts
    ]
    sys.exit(max(map(abs, codes)))
