from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from models.family import InputError
from tasks import storage
from tasks.data import manifest


def table(*ids: str) -> pd.DataFrame:
    splits = ["test", "train", "val"]
    rows = [
        {
            "id": clip, "path": f"raw/video/{clip}.mp4", "split": splits[k % 3], "group": clip, "start": 0.0,
            "duration": 3.0, "fps": 30.0, "frames": 90, "width": 96, "height": 64, "has_video": True,
            "has_audio": k % 2 == 0, "sample_rate": 44100, "silent": False, "still": False, "checksum": "0" * 64,
            "annotation": json.dumps({"label": "dog, barking"}),
        }
        for k, clip in enumerate(ids)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storage, "DATA", tmp_path)
    return tmp_path


def test_round_trip_in_a_fixed_order(data: Path) -> None:
    rows = table("d", "a", "c", "b", "NA", "007")
    manifest.write(rows, manifest.manifest_path("sounds"))
    first = manifest.manifest_path("sounds").read_bytes()
    manifest.write(rows.sample(frac=1, random_state=1), manifest.manifest_path("sounds"))
    assert manifest.manifest_path("sounds").read_bytes() == first
    back = manifest.read("sounds")
    assert back[["split", "id"]].apply(tuple, axis=1).is_monotonic_increasing
    assert set(back["id"]) == {"d", "a", "c", "b", "NA", "007"}
    assert manifest.annotations(back)[0] == {"label": "dog, barking"}
    assert back["has_audio"].dtype == bool and back["frames"].dtype == "int64"


def test_clips_that_no_store_holds_are_left_out(data: Path) -> None:
    manifest.write(table("a", "NA", "007"), manifest.manifest_path("sounds"))
    (data / "sounds" / "stores").mkdir()
    (data / "sounds" / "stores" / "quarantine.csv").write_text(
        "id,path,split,reason,detail\nNA,p,train,damaged,x\n007,p,val,damaged,x\n"
    )
    assert manifest.read("sounds")["id"].tolist() == ["a"]
    assert len(manifest.read_clean("sounds")) == 3


def test_a_manifest_that_is_not_there_or_is_none(data: Path) -> None:
    with pytest.raises(InputError, match=r"manifest.parquet not found; run `python -m tasks.clean sounds`"):
        manifest.read("sounds")
    path = manifest.manifest_path("sounds")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="run the clean stage again"):
        manifest.read("sounds")
