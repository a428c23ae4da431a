"""Choosing clips: counts, whole classes, everything; the seed decides; what is missing is passed over and counted."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from models.family import InputError
from tasks.datasets import vggsound, wildlife
from tasks.subset import Subset, choose_classes, select, subset

LABELS = ["bee, wasp, etc. buzzing", "dog barking", "people marching", "rain", "zebra braying"]
COUNTS = Subset(mode="counts", num_classes=3, num_train=4, num_test=2, media="none", seed=42)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five classes with 10 train and 4 test clips each, of which one train clip of each has no file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("download: {sounds: {format: vggsound}}\n")
    rows = [
        vggsound.row(f"{'-' if k % 2 else 'x'}{number}_{k}", k, label, "train" if k < 10 else "test")
        for k in range(14)
        for number, label in enumerate(LABELS)
    ]
    raw = tmp_path / "data/sounds/raw"
    vggsound.write(pd.DataFrame(rows), raw)
    (raw / "video").mkdir()
    for row in rows:
        if not str(row["id"]).endswith("_000003"):
            (raw / str(row["path"])).write_text(str(row["id"]))
    return tmp_path


def chosen(project: Path) -> pd.DataFrame:
    table = vggsound.read(project / "data/sounds/subset")
    return table.assign(label=table["annotation"].map(vggsound.class_of))


def test_so_many_of_each_class(project: Path) -> None:
    assert subset("sounds", COUNTS) == "sounds: 18 of 70 clips chosen (5 passed over, their files are missing)"
    table = chosen(project)
    counts = Counter(zip(table["label"], table["split"], strict=True))
    assert len(set(table["label"])) == 3
    assert {split: {n for (_, s), n in counts.items() if s == split} for split in ("train", "test")} == {
        "train": {4},
        "test": {2},
    }
    assert all((project / "data/sounds/raw" / path).exists() for path in table["path"])
    # Class after class, train before test, as the original script writes them.
    assert [*dict.fromkeys(zip(table["label"], table["split"], strict=True))] == [
        (label, split) for label in dict.fromkeys(table["label"]) for split in ("train", "test")
    ]


def test_the_original_form_is_written(project: Path) -> None:
    subset("sounds", replace(COUNTS, num_classes=5))
    with (project / "data/sounds/subset/vggsound.csv").open(newline="") as handle:
        rows = list(csv.reader(handle))
    with (project / "data/sounds/raw/vggsound.csv").open(newline="") as handle:
        known = list(csv.reader(handle))
    assert all(row in known for row in rows)
    assert '"bee, wasp, etc. buzzing"' in (project / "data/sounds/subset/vggsound.csv").read_text()
    assert [path.name for path in (project / "data/sounds/subset").iterdir()] == ["vggsound.csv"]


@pytest.mark.parametrize("mode", ["counts", "classes"])
def test_the_seed_decides(project: Path, mode: str) -> None:
    file, texts = project / "data/sounds/subset/vggsound.csv", []
    for seed in (42, 42, 43, 44, 45):
        subset("sounds", replace(COUNTS, mode=mode, seed=seed))
        texts.append(file.read_bytes())
    assert texts[0] == texts[1]
    assert len(set(texts)) > 2


def test_all_samples_of_some_classes(project: Path) -> None:
    subset("sounds", replace(COUNTS, mode="classes", num_classes=2))
    assert list(Counter(chosen(project)["label"]).values()) == [13, 13]


def test_everything_stays_in_order_with_missing_files_listed(project: Path) -> None:
    assert subset("sounds", replace(COUNTS, mode="all")) == "sounds: 70 of 70 clips chosen"
    raw, copy = (project / "data/sounds" / stage / "vggsound.csv" for stage in ("raw", "subset"))
    assert raw.read_bytes() == copy.read_bytes()


def test_a_class_with_fewer_gives_all_it_has(project: Path) -> None:
    subset("sounds", replace(COUNTS, num_classes=5, num_train=100, num_test=0))
    assert Counter(chosen(project)["split"]) == {"train": 45}


def test_310_asked_309_taken(capsys: pytest.CaptureFixture[str]) -> None:
    known = [f"class {k:03d}" for k in range(309)]
    assert choose_classes(known, replace(COUNTS, num_classes=310)) == known
    assert capsys.readouterr().out == "warning: 310 classes asked for, 309 there are; all of them are taken\n"
    assert choose_classes(known, replace(COUNTS, num_classes=309)) == known
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("gone", [("test",), ("train", "test")])
def test_a_class_left_without_a_clip_is_named(
    project: Path, gone: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    table = vggsound.read(project / "data/sounds/raw")
    for path in table.loc[table["annotation"].str.contains('rain"') & table["split"].isin(gone), "path"]:
        (project / "data/sounds/raw" / path).unlink(missing_ok=True)
    with pytest.raises(InputError, match=f"class 'rain' has no {gone[-1] if len(gone) == 1 else 'train'} clip"):
        subset("sounds", replace(COUNTS, num_classes=5))
    assert not (project / "data/sounds/subset").exists()
    subset("sounds", replace(COUNTS, num_classes=5, mode="classes"))
    assert ("class 'rain' has no clip" in capsys.readouterr().out) == (len(gone) == 2)


@pytest.mark.parametrize("media", ["link", "copy"])
def test_the_chosen_videos_come_along(project: Path, media: str) -> None:
    line = subset("sounds", replace(COUNTS, mode="all", media=media))
    assert line == f"sounds: 70 of 70 clips chosen, 65 files brought by {media}, 5 skipped"
    made = list((project / "data/sounds/subset/video").iterdir())
    assert len(made) == 65
    for path in made:
        original = project / "data/sounds/raw/video" / path.name
        assert path.read_text() == original.read_text()
        assert path.samefile(original) == (media == "link")


@pytest.mark.parametrize("change", [{"num_classes": 0}, {"num_train": -1}, {"num_test": -1}])
def test_impossible_numbers_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"params\.yaml: subset"):
        choose_classes(["a"], replace(COUNTS, **change))


def test_annotations_without_a_class_only_go_through_whole(project: Path) -> None:
    table = vggsound.read(project / "data/sounds/raw")
    exists = pd.Series(True, index=table.index)
    assert select(table, exists, lambda _: None, replace(COUNTS, mode="all")) is table
    with pytest.raises(InputError, match="no single label"):
        select(table, exists, lambda _: None, COUNTS)


@pytest.mark.parametrize(
    ("mode", "expected"), [("counts", {"train": 8, "test": 4}), ("classes", {"train": 20, "val": 8, "test": 8})]
)
def test_classes_of_two_labels_are_pairs(mode: str, expected: dict[str, int]) -> None:
    """Species and behaviour together; clips without either are in no class, and val comes along with whole classes."""
    labels = [("fox", "resting"), ("fox", None), (None, "resting"), (None, None)]
    splits = ["train"] * 10 + ["val"] * 4 + ["test"] * 4
    rows = [
        wildlife.row(f"{number}/{k}.mp4", *pair, split)
        for number, pair in enumerate(labels)
        for k, split in enumerate(splits)
    ]
    table = pd.DataFrame(rows)
    settings = replace(COUNTS, num_classes=2, mode=mode)
    chosen = select(table, pd.Series(True, index=table.index), wildlife.class_of, settings)
    assert Counter(chosen["split"]) == expected
    classes = chosen["annotation"].map(wildlife.class_of)
    assert classes.nunique() == 2 and set(classes) < {"fox, resting", "fox, not annotated", "not annotated, resting"}
