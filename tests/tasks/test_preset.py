"""Presets change the values they name and nothing else, and every preset of every family is valid."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import models
from tasks import params, preset
from tasks.engine.loop import Training

ROOT = Path(__file__).parents[2]
PRESETS = [(name, path.stem) for name in models.names() for path in sorted((ROOT / "models" / name).glob("*.yaml"))]


@pytest.mark.parametrize(("family", "name"), PRESETS)
def test_a_preset_gives_valid_params(family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    before = (tmp_path / "params.yaml").read_text()
    out = subprocess.run(
        [sys.executable, "-m", "tasks.preset", family, name], cwd=tmp_path, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert "values of params.yaml changed" in out.stdout
    assert [line for line in before.splitlines() if line.startswith("# ---")] == [
        line for line in (tmp_path / "params.yaml").read_text().splitlines() if line.startswith("# ---")
    ]
    monkeypatch.chdir(tmp_path)
    for phase in models.load(family).phases:
        params.phase(family, phase, Training)
    again = subprocess.run(
        [sys.executable, "-m", "tasks.preset", family, name], cwd=tmp_path, capture_output=True, text=True
    )
    assert "0 values" in again.stdout


def test_unknown_presets_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="it has vggsound"):
        preset.load_preset("t3av", "audioset")
