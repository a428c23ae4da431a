"""Presets change the values they name and nothing else, and every preset of every family is valid."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import models
from tasks import params, preset
from tasks.engine.loop import Training

ROOT = Path(__file__).parents[2]
PRESETS = [(name, path.stem) for name in models.names() for path in sorted((ROOT / "models" / name).glob("*.yaml"))]


@pytest.mark.parametrize(("family", "name"), PRESETS)
def test_a_preset_gives_valid_params(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    before = (tmp_path / "params.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tasks.preset", family, name])
    preset.main()
    assert "values of params.yaml changed" in capsys.readouterr().out
    assert [line for line in before.splitlines() if line.startswith("# ---")] == [
        line for line in (tmp_path / "params.yaml").read_text().splitlines() if line.startswith("# ---")
    ]
    for phase in models.load(family).phases:
        params.phase(family, phase, Training)
    preset.main()
    assert "0 values" in capsys.readouterr().out


def test_unknown_presets_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="it has vggsound"):
        preset.load_preset("t3av", "audioset")
