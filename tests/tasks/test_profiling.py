"""`train.profile` leaves a trace and a page of some steps beside the run, and the run as it would have been."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from models.family import InputError
from tasks.engine.profiling import FOLDER, SUMMARY, TRACE, WARM_UP
from tests.tasks import toy_training as toy

STEPS = 15  # of a toy run of three epochs


def spans(folder: Path, name: str) -> int:
    """How often a trace has an event of this name."""
    events = json.loads(gzip.decompress((folder / TRACE).read_bytes()))["traceEvents"]
    return sum(event.get("name") == name for event in events)


def told(folder: Path) -> str:
    return (folder / SUMMARY).read_text()


def test_as_many_steps_as_asked_for_are_recorded(tmp_path: Path) -> None:
    toy.train_here(tmp_path, profile=2, log_interval=100)
    assert spans(tmp_path / FOLDER, "Optimizer.step#AdamW.step") == 2
    page = told(tmp_path / FOLDER)
    assert f"2 steps on CPU, after {WARM_UP} to warm up" in page
    assert re.search(r"- [\d.e+]+ steps/s, ", page)
    assert re.search(r"- \d+\.\d% of the time spent waiting for data", page)
    assert re.search(r"- [\d.]+ GB of memory at the most", page)


def test_the_operators_with_the_most_time_of_their_own_come_first(tmp_path: Path) -> None:
    toy.train_here(tmp_path, profile=2)
    rows = [line.split(" | ") for line in told(tmp_path / FOLDER).splitlines() if line.endswith("% |")]
    milliseconds, shares = ([float(row[i].rstrip("% |")) for row in rows] for i in (2, 3))
    assert len(rows) == 20
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert 50 < sum(shares) <= 100.5
    assert any("aten::addmm" in row[0] or "Optimizer.step" in row[0] for row in rows)


def test_a_recorded_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    options = {"dropout": 0.3}
    plain = toy.train_here(tmp_path / "plain", options=options)
    found = toy.train_here(tmp_path / "profiled", options=options, profile=4)
    assert toy.digest(tmp_path / "profiled", found) == toy.digest(tmp_path / "plain", plain)
    assert not (tmp_path / "plain" / FOLDER).exists()


@pytest.mark.parametrize(("asked", "recorded"), [(STEPS - WARM_UP, STEPS - WARM_UP), (100, STEPS - WARM_UP)])
def test_a_run_that_ends_before_has_what_there_was(tmp_path: Path, asked: int, recorded: int) -> None:
    toy.train_here(tmp_path, profile=asked)
    assert f"- {recorded} steps on" in told(tmp_path / FOLDER)


def test_one_of_two_processes_records(tmp_path: Path) -> None:
    assert toy.train_in_two(tmp_path, epochs=1, profile=2) == [0, 0]
    assert spans(tmp_path / FOLDER, "Optimizer.step#AdamW.step") == 2


def test_fewer_than_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="profile is -1; it must be at least 0"):
        toy.train_here(tmp_path, profile=-1)
