"""Typed params: each mistake a person can make in params.yaml is one line that names the key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.family import InputError
from tasks import params


@dataclass(frozen=True)
class Inner:
    width: int


@dataclass(frozen=True)
class Knobs:
    lr: float
    epochs: int
    amp: bool
    mode: Literal["tube", "random"]
    name: str | None
    sizes: tuple[int, ...]
    inner: Inner


GOOD = {"lr": 1, "epochs": 3, "amp": True, "mode": "tube", "name": None, "sizes": [1, 2], "inner": {"width": 4}}


def test_good_values_become_the_dataclass() -> None:
    knobs = params.typed(Knobs, GOOD, "x")
    assert knobs == Knobs(1.0, 3, True, "tube", None, (1, 2), Inner(4))
    assert isinstance(knobs.lr, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lrr": 1}, "x.lrr is not known"),
        ({"lr": "1e-4"}, "x.lr is '1e-4', a str; it must be a float"),
        ({"epochs": 1.5}, "x.epochs is 1.5"),
        ({"epochs": True}, "x.epochs is True"),
        ({"amp": 1}, "x.amp is 1"),
        ({"mode": "tubes"}, "choose 'tube', 'random'"),
        ({"sizes": ["a"]}, r"x.sizes\[0\] is 'a'"),
        ({"inner": {"width": 4, "depth": 1}}, "x.inner.depth is not known"),
        ({"inner": {}}, "x.inner.width is missing"),
    ],
)
def test_a_mistake_names_its_key(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        params.typed(Knobs, {**GOOD, **change}, "x")


@pytest.mark.parametrize("key", sorted(GOOD))
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(InputError, match=rf"x\.{key} is missing"):
        params.typed(Knobs, {k: v for k, v in GOOD.items() if k != key}, "x")


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_numbers_are_read_as_dvc_reads_them(tmp_path_factory: pytest.TempPathFactory, number: float) -> None:
    file = tmp_path_factory.getbasetemp() / "params.yaml"
    file.write_text(f"lr: {number:e}\n")
    assert params.read(file)["lr"] == pytest.approx(number, rel=1e-6)


def test_short_exponents_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("a: {lr: 1e-4}\n")
    assert params.section("a", path=file) == {"lr": 1e-4}


def test_a_missing_file_a_missing_section_and_broken_yaml(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    with pytest.raises(InputError, match="not found"):
        params.read(file)
    file.write_text("a: {b: 1}\n")
    with pytest.raises(InputError, match=r"no section 'a\.c'; there is b"):
        params.section("a", "c", path=file)
    with pytest.raises(InputError, match="single value"):
        params.section("a", "b", path=file)
    file.write_text("a: [\n")
    with pytest.raises(InputError, match="is not YAML"):
        params.read(file)
