"""Datasets as they lie on the disks of those who have them, through download, subset and clean."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from models.family import InputError
from tasks.clean import Clean, clean
from tasks.download import Download, download
from tasks.subset import Subset, subset

FOLDER = Download(source="given", format="", sha256=None, endpoint=None, demo=None)
ALL = Subset(mode="all", num_classes=1, num_train=1, num_test=1, media="none", seed=1)
LENIENT = Clean(0.0, seed=1, require_audio=False, drop_silent=False, drop_still=False, workers=1, max_quarantine=0.0)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given").mkdir()
    return tmp_path


def usable(dataset: str, form: str, settings: Clean = LENIENT) -> pd.DataFrame:
    """The manifest, all three stages later."""
    Path("params.yaml").write_text(f"download: {{{dataset}: {{format: {form}}}}}\n")
    download(dataset, replace(FOLDER, format=form))
    subset(dataset, ALL)
    clean(dataset, settings)
    return pd.read_parquet(f"data/{dataset}/clean/manifest.parquet")


@pytest.mark.parametrize(
    "places", [("validation", "test"), ("videos", "videos"), ("TH14_validation_set_mp4", "TH14_test_set_mp4")]
)
@pytest.mark.parametrize("packed", [False, True])
def test_thumos(project: Path, write_clip: Callable[..., Path], places: tuple[str, str], packed: bool) -> None:
    names = {"video_validation_0000051": "training", "video_test_0000004": "validation"}
    for k, (name, place) in enumerate(zip(names, places, strict=True)):
        write_clip(project / "given" / place / f"{name}.mp4", pitch=200.0 + k)
    one = {"duration": 1.0, "frame": 10, "annotations": [{"segment": [0.2, 0.7], "label": "Diving"}]}
    database = {name: one | {"subset": subset} for name, subset in names.items()}
    (project / "given/annotations").mkdir()
    (project / "given/annotations/thumos_14_anno.json").write_text(json.dumps({"database": database}))
    (project / "given/annotations/category_idx.txt").write_text("Diving\n")
    if packed:
        for place in set(places):
            shutil.make_archive(f"given/{place}", "zip", "given", place)
            shutil.rmtree(f"given/{place}")
    table = usable("actions", "activitynet")
    assert dict(zip(table["id"], table["split"], strict=True)) == {
        "video_validation_0000051": "train", "video_test_0000004": "test",
    }  # fmt: skip


@pytest.mark.parametrize(("folder", "told"), [("", ""), ("clips/", ""), ("videos/", ""), ("clips/", "clips/")])
def test_mammalps(project: Path, write_clip: Callable[..., Path], folder: str, told: str) -> None:
    tracks = {"S1_C3_E144_V0060_ID1_T1": "train", "S1_C2_E144_V0061_ID1_T1": "train", "S2_C1_E7_V0002_ID1_T1": "test"}
    rows: dict[str, str] = {"train": "", "test": ""}
    for k, (track, split) in enumerate(tracks.items()):
        write_clip(project / f"given/{folder}{track}/{track}_c0.mp4", pitch=200.0 + k)
        rows[split] += f"{told}{track}/{track}_c0.mp4,red_deer,foraging\n"
    (project / "given/metadata").mkdir()
    for split, text in rows.items():
        (project / f"given/metadata/{split}.csv").write_text(f"video_path,species,activity\n{text}")
    table = usable("animals", "wildlife")
    assert sorted(table["group"]) == ["S1_E144", "S1_E144", "S2_E7"]
    assert sorted(table["split"]) == ["test", "train", "train"]


def test_dead_clips_are_tolerated_up_to_the_share_of_params(project: Path, write_clip: Callable[..., Path]) -> None:
    made = [write_clip(project / f"made/{k}.mp4", pitch=200.0 + 3 * k).read_bytes() for k in range(37)]
    (project / "given/video").mkdir()
    with (project / "given/vggsound.csv").open("w") as handle:
        for k in range(40):  # three of them, 7.5 %, are gone
            handle.write(f"{k:011d},30,rain,{'test' if k % 4 == 1 else 'train'}\n")
            if k < 37:
                (project / f"given/video/{k:011d}_000030.mp4").write_bytes(made[k])
    with pytest.raises(InputError) as raised:
        usable("sounds", "vggsound", replace(LENIENT, max_quarantine=0.05))
    assert "3 of 40 clips are unusable (3 missing), more than clean.sounds.max_quarantine = 0.05" in str(raised.value)
    listed = pd.read_csv(".duet/reports/sounds/clean-quarantine.csv", dtype=str)
    assert listed["id"].tolist() == [f"{k:011d}_000030" for k in (37, 38, 39)] and set(listed["reason"]) == {"missing"}
    assert clean("sounds", replace(LENIENT, max_quarantine=0.08)).startswith("sounds: 37 clips usable")
    assert subset("sounds", replace(ALL, mode="classes")).startswith(
        "sounds: 37 of 40 clips chosen (3 passed over, their files are missing)"
    )
