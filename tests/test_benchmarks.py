"""The table of speeds: its rows, its files, and that the README quotes it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import __main__ as runner
from benchmarks import record
from benchmarks.record import Measured
from benchmarks.table import HEAD, Row, costs, line, number, rates

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("row", "ratio", "met"),
    [
        (rates("a", "clips/s", 6.0, 2.0, "b", ">= 3"), 3.0, True),
        (rates("a", "clips/s", 6.0, 2.0, "b", ">= 3.1"), 3.0, False),
        (costs("a", "s", 2.0, 6.0, "b", ">= 3"), 3.0, True),
        (costs("a", "s", 6.0, 2.0, "b"), 1 / 3, True),
        (Row("a", "s", 8.0, 4.0, "b", 2.0, "<= 3"), 2.0, True),
        (Row("a", "%", 5.0, asked="< 5"), None, False),
        (Row("a", "%", 4.9, asked="< 5"), None, True),
    ],
)
def test_what_is_asked_is_held_against_the_ratio_or_the_figure(row: Row, ratio: float | None, met: bool) -> None:
    assert row.ratio == (ratio if ratio is None else pytest.approx(ratio))
    assert row.met is met
    assert ("missed" in line(row)) is not met


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.0, "0"),
        (0.09994, "0.0999"),
        (1.005, "1.00"),
        (12.34, "12.3"),
        (400000, "400,000"),
        (1234.5, "1,230"),
    ],
)
def test_three_digits_count(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_part_measured_anew_takes_the_place_of_its_rows_and_the_history_keeps_both(results: Path) -> None:
    old = {"tad.a": Measured([Row("slow", "s", 3.0)]), "loader.b": Measured([rates("kept", "a s", 2.0, 1.0, "peer")])}
    path = record.write(old, ["loader", "tad"])
    assert record.write({"tad.a": Measured([Row("fast", "s", 1.0)])}, ["loader", "tad"]) == path
    rows = {name: [row.name for row in part.rows] for name, part in record.read(path).items()}
    assert rows == {"loader.b": ["kept"], "tad.a": ["fast"]}
    assert json.loads(path.read_text())["machine"]["cores"] >= 1
    told = path.with_suffix(".md").read_text()
    assert told.index("| kept / peer |") < told.index("| fast |")
    assert "slow" not in told
    history = pd.read_csv(results / "history.csv")
    assert history["name"].tolist() == ["slow", "kept / peer", "fast"]
    assert history["machine"].unique().tolist() == [path.stem]


def test_a_benchmark_that_fails_is_told_and_what_it_measured_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(
        "from benchmarks import table\n"
        "def part(quick):\n"
        "    yield table.Row('measured' if quick else 'whole', 's', 1.0)\n"
        "    raise SystemExit(3)\n"
        "table.main(__doc__, {'part': part})\n"
    )
    command = [sys.executable, str(tmp_path / "broken.py")]
    monkeypatch.setattr(runner, "command", lambda name: command)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    measured, ended = runner.run("broken", True)
    assert not ended
    assert [row.name for row in measured["broken.part"].rows] == ["measured"]


def test_an_unknown_part_is_named() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "from benchmarks import table; table.main('', {'one': None})", "two"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "no part 'two': choose from one" in ended.stderr


def test_every_benchmark_is_run() -> None:
    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert files - {"__main__", "table", "record"} == set(runner.NAMES)


def test_the_readme_quotes_the_results() -> None:
    quoted = re.search(r"<!-- from (benchmarks/results/\S+\.md) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert quoted is not None
    file = (ROOT / quoted[1]).read_text().splitlines()
    rows = [row for row in quoted[2].splitlines() if row.startswith("|")]
    assert rows[0] == "| " + " | ".join(HEAD) + " |"
    assert len(rows) > 2
    assert [row for row in rows if row not in file] == []


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.stem)
def test_a_results_table_is_made_of_its_json(path: Path) -> None:
    machine = json.loads(path.read_text())["machine"]
    assert path.stem == record.slug(machine)
    assert path.with_suffix(".md").read_text() == record.markdown(machine, record.read(path))
