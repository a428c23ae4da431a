"""Lists of tagged clips of every form: what they mean, what is wrong with them, and that subsets are written alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from models.family import InputError
from tasks import subset
from tasks.data import picture_folder
from tasks.datasets import taglists

NAMES = ["cat", "dog", "running", "cat", "rain"]


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ({"label_txt": "\n".join(NAMES) + "\n"} | files).items():
        stem, _, ending = name.rpartition("_")
        (folder / f"{stem}.{ending}").write_text(text, encoding="utf-8")
    return folder


def told(table: pd.DataFrame) -> dict[str, tuple[str, list[int]]]:
    return {row["path"]: (row["split"], json.loads(row["annotation"])["tags"]) for row in table.to_dict("records")}


def test_videos_with_blank_lines_repeats_and_spaces(tmp_path: Path) -> None:
    lists = {
        "train_list": 'a.mp4 3 0 3\n\n  \n"my clips/b ""two"".mp4" 1\nmy clips/c.mp4\t2\t4\n',
        "test_list": "d.webm 4\n",
        "infer_list": "e.mp4\n",
    }
    table = taglists.read(write(tmp_path, **lists))
    assert list(table) == taglists.COLUMNS
    assert told(table) == {
        "a.mp4": ("train", [0, 3]),
        'my clips/b "two".mp4': ("train", [1]),
        "my clips/c.mp4": ("train", [2, 4]),
        "d.webm": ("test", [4]),
    }
    assert table["id"].tolist() == ["a", "my_clips_b__two_", "my_clips_c", "d"]
    assert [line.path for line in taglists.read_lines(tmp_path / "infer.list")] == ["e.mp4"]


def test_folders_of_pictures_and_features(tmp_path: Path) -> None:
    table = taglists.read(write(tmp_path / "frames", train_list="v_X_g01_c01 120 1\nv_X_g01_c02 90 1 2\n"))
    assert told(table) == {"v_X_g01_c01/img_00001.jpg": ("train", [1]), "v_X_g01_c02/img_00001.jpg": ("train", [1, 2])}
    assert json.loads(table["annotation"][0])["num_frames"] == 120
    assert taglists.FIRST == picture_folder.FIRST
    table = taglists.read(write(tmp_path / "features", train_list="tsn/a.npy 1 4\n", val_list="tsn/b.npy 0\n"))
    assert told(table) == {"tsn/a.npy": ("train", [1, 4]), "tsn/b.npy": ("val", [0])}


def test_json_lines_and_csv_say_the_same(tmp_path: Path) -> None:
    lines = [{"path": "my clips/a.mp4", "labels": [4, 1, 4]}, {"path": "b.mp4", "labels": [2]}]
    jsonl = write(tmp_path / "j", train_jsonl="\n\n".join(map(json.dumps, lines)) + "\n")
    csv = write(tmp_path / "c", train_csv='path,labels\n"my clips/a.mp4",4 1 4\nb.mp4,2\n')
    listed = write(tmp_path / "l", train_list='"my clips/a.mp4" 4 1 4\nb.mp4 2\n')
    tables = [taglists.read(folder) for folder in (jsonl, csv, listed)]
    assert told(tables[0]) == {"my clips/a.mp4": ("train", [1, 4]), "b.mp4": ("train", [2])}
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.mp4\n", r"train.list line 1: a.mp4 has no label"),
        ("a.mp4 1\n\nb.mp4 5\n", r"train.list line 3: label 5, but the label file ends with 4"),
        ("my clips/a.mp4 1\n", r"line 1: 'clips/a.mp4' is no id, .* quote a path"),
        ("a.mp4 1\na.mp4 2\n", r"line 2: a.mp4 stands in .*train.list line 1 already"),
        ("a.mp4 -1\n", r"line 1: '-1' is no id"),
        ('"a b.mp4 1\n', r"line 1: a quote that is not closed"),
        ("../a.mp4 1\n", r"line 1: '../a.mp4' is no path below"),
        ("/etc/a.mp4 1\n", r"line 1: '/etc/a.mp4' is no path below"),
        ("C:/a.mp4 1\n", r"line 1: 'C:/a.mp4' is no path below"),
        ("folder 0 1\n", r"line 1: 'folder': a folder of pictures has their number"),
        ("folder\n", r"line 1: 'folder' ends like no video or .npy"),
        ("a.mp4 1\nb.npy 1\n", r"line 2: features among videos"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        taglists.read(write(tmp_path, train_list=lines))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train_jsonl": '{"path": "a.mp4", "labels": 3}\n'}, r"train.jsonl line 1: labels is a int"),
        ({"train_jsonl": '{"path": "a.mp4", "tags": [3]}\n'}, r"train.jsonl line 1: write"),
        ({"train_jsonl": '{"path": "a.mp4", "labels": [true]}\n'}, r"line 1: 'true' is no id"),
        ({"train_jsonl": "{\n"}, r"train.jsonl line 1 is no JSON"),
        ({"train_csv": "a.mp4,3\n"}, r"train.csv line 1: the header is"),
        ({"train_csv": "path,labels\na.mp4,3,4\n"}, r"train.csv line 2: not as many columns"),
        ({"train_csv": "path,labels\n", "train_list": "a.mp4 1\n"}, "lists of the same split"),
        ({"test_txt": ""}, "train.list not found"),
        ({"train_list": "a.mp4 1\n", "label_txt": "cat\n\ndog\n"}, r"label.txt line 2: '' is no name"),
        ({"train_list": "a.mp4 1\n", "label_2_txt": "cat\n"}, r"one label\*.txt.*label.txt, label_2.txt"),
    ],
)
def test_errors_of_other_files(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        taglists.read(write(tmp_path, **files))
    assert "\n" not in str(error.value)


def test_lists_of_two_datasets_are_refused(tmp_path: Path) -> None:
    write(tmp_path, train_list="a.mp4 1\n")
    write(tmp_path / "data/dataset/tsn", train_list="b.mp4 1\n")
    with pytest.raises(InputError, match=r"lists in \. and in data/dataset/tsn"):
        taglists.read(tmp_path)


def test_lists_where_the_original_has_them(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "data/dataset/attention_lstm").mkdir(parents=True)
    (tmp_path / "data/dataset/attention_lstm/train.list").write_text("data/tsn_features/a.npy 1 2\n")
    assert told(taglists.read(tmp_path)) == {"data/tsn_features/a.npy": ("train", [1, 2])}


def test_label_file_with_as_many_lines_as_the_original(tmp_path: Path) -> None:
    names = [f"名{k % 3386}" for k in range(3396)]
    folder = write(tmp_path, train_list="a.mp4 3395 9\n", label_txt="\n".join(names) + "\n")
    assert taglists.classes(folder) == names
    table = taglists.read(folder).assign(reason="", frames=30)
    review = taglists.check(table, folder)
    twice = [finding.text for finding in review.findings if "same name" in finding.text]
    assert len(twice) == 10 and twice[9].startswith("the ids 9, 3395 have the same name '名9'")
    assert review.tables["Most frequent tags"].iloc[0].tolist() == [9, "名9", 1, 0, 0]


def test_names_that_files_could_not_have_or_share(tmp_path: Path) -> None:
    long = "x" * 250 + ".mp4"
    ids = taglists.clip_ids(["a/b.mp4", "a_b.mp4", "a b.webm", "c.mp4", long, "目/录.mp4"])
    assert ids["c.mp4"] == "c" and ids["目/录.mp4"] == "目_录"
    assert len(set(ids.values())) == 6 and all(len(name.encode()) <= 200 and "/" not in name for name in ids.values())


def test_folder_of_another_length_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path, train_list="f 12 1\n")
    review = taglists.check(taglists.read(folder).assign(reason="", frames=10), folder)
    assert [finding.text for finding in review.findings[1:]] == [
        "the list says 12 pictures, the folder has 10: all count"
    ]


@pytest.mark.parametrize(
    "lines",
    ['"my clips/a.mp4" 1 4\nb.mp4 2\n', "v_1 30 1\n\"v 2\" 40 2 3\n", "f/a.npy 0\nf/b.npy 3 4\n"],
    ids=["videos", "folders", "features"],
)  # fmt: skip
def test_subset_is_written_in_the_original_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(
        Path("data/tags/raw"),
        train_list=lines,
        test_list=lines.replace("a.", "y.").replace("b.", "z.").replace("v", "w"),
    )
    (tmp_path / "params.yaml").write_text("download: {tags: {format: taglists}}\n")
    subset.subset("tags", subset.Subset("all", 1, 1, 1, "none", 0))
    assert (tmp_path / "data/tags/subset/train.list").read_text() == lines
    assert (tmp_path / "data/tags/subset/label.txt").read_text().split() == NAMES
    assert taglists.read(Path("data/tags/subset")).equals(taglists.read(Path("data/tags/raw")))


def test_features_are_read_without_pickle(tmp_path: Path) -> None:
    from tasks.data import feature_files
    from tasks.data.clip_files import ClipError

    np.save(tmp_path / "good.npy", np.ones((5, 3), np.float16))
    assert feature_files.probe(tmp_path / "good.npy").frames == 5
    np.save(tmp_path / "objects.npy", np.array([{}, {}], object), allow_pickle=True)
    np.save(tmp_path / "ids.npy", np.ones((5, 3), np.int64))
    np.save(tmp_path / "flat.npy", np.ones(5, np.float32))
    np.save(tmp_path / "nan.npy", np.full((5, 3), np.nan, np.float32))
    (tmp_path / "none.npy").touch()
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-8])
    reasons = {"objects": "foreign", "ids": "wrong shape", "flat": "wrong shape", "nan": "wrong range", "none": "empty"}
    for name, reason in (reasons | {"cut": "foreign", "away": "missing"}).items():
        with pytest.raises(ClipError) as error:
            feature_files.probe(tmp_path / f"{name}.npy")
        assert error.value.reason == reason, name
