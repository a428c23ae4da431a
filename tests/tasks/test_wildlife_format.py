"""Species and behaviour in three CSV files, as they are and as people get them wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.family import InputError
from tasks.datasets import load_format, wildlife

HEADER = "video_path,species,activity\n"
TRACK = "S1_C3_E144_V0060_ID1_T1"


def write(folder: Path, place: str = "metadata", **texts: str) -> Path:
    (folder / place).mkdir(parents=True, exist_ok=True)
    for split, text in ({"train": HEADER, "test": HEADER} | texts).items():
        (folder / place / f"{split}.csv").write_text(text)
    return folder


@pytest.mark.parametrize("place", ["metadata", "."])
def test_the_three_files(tmp_path: Path, place: str) -> None:
    train = f"{HEADER}{TRACK}/{TRACK}_c0.mp4,red_deer,foraging\nmy films\\a b.mp4, fox ,-1\n"
    table = wildlife.read(write(tmp_path, place, train=train, val=f"{HEADER}x.mp4,,\n", test=f"{HEADER}y.MP4,wolf,\n"))
    assert table.columns.tolist() == wildlife.COLUMNS
    assert table["id"].tolist() == [f"{TRACK}_{TRACK}_c0", "my films_a b", "x", "y.MP4"]
    assert table["path"].tolist() == [f"{TRACK}/{TRACK}_c0.mp4", "my films/a b.mp4", "x.mp4", "y.MP4"]
    assert table["split"].tolist() == ["train", "train", "val", "test"]
    assert table["group"].tolist() == ["S1_E144", "my films_a b", "x", "y.MP4"]
    assert [tuple(json.loads(text).values()) for text in table["annotation"]] == [
        ("red_deer", "foraging"), ("fox", None), (None, None), ("wolf", None),
    ]  # fmt: skip
    assert [wildlife.class_of(text) for text in table["annotation"][1:3]] == ["fox, not annotated", None]


def test_columns_by_name_with_a_byte_order_mark(tmp_path: Path) -> None:
    train = "\ufeffcamera,activity,event,video_path,species\nC1,grooming,dawn,a/b.mp4,hare\nC2,grooming,,a/c.mp4,hare\n"
    table = wildlife.read(write(tmp_path, train=train))
    assert table["group"].tolist() == ["dawn", "a_c"]
    assert json.loads(table["annotation"][0]) == {"species": "hare", "activity": "grooming"}


def test_prepared_clips_are_found_by_the_file_name_rule(tmp_path: Path) -> None:
    table = wildlife.read(write(tmp_path, "raw/metadata", train=f"{HEADER}{TRACK}\\{TRACK}_c0.mp4,fox,playing\n"))
    assert table["path"][0] == f"processed/video_frames/{TRACK}_{TRACK}_c0.pt"
    assert table["group"][0] == "S1_E144"
    wildlife.write(table, tmp_path / "again")
    pd.testing.assert_frame_equal(wildlife.read(tmp_path / "again"), table)


# What a path, a label and an event may consist of in a CSV that people write.
text = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="/\\:"), min_size=1)
label = st.none() | text.filter(lambda value: value != "-1")
path = st.lists(text.filter(lambda part: part != ".."), min_size=1, max_size=3).map("/".join)
clip = st.tuples(path, label, label, st.sampled_from(["train", "val", "test"]), st.just("") | text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(clip, max_size=6, unique_by=lambda values: wildlife.clip_id(f"{values[0]}.mp4")), st.booleans())
def test_what_is_written_is_read_again(tmp_path: Path, clips: list[tuple], prepared: bool) -> None:
    folder = tmp_path / str(prepared)
    rows = [wildlife.row(f"{values[0]}.mp4", *values[1:], prepared=prepared) for values in clips]
    table = pd.DataFrame(rows, columns=wildlife.COLUMNS).sort_values("split", key=_rank, kind="stable")
    table = table.reset_index(drop=True)
    if table.empty:
        prepared = False  # nothing says that they are
        folder = tmp_path / "empty"
    wildlife.write(table, folder)
    pd.testing.assert_frame_equal(wildlife.read(folder), table, check_dtype=not table.empty)


def _rank(splits: pd.Series) -> pd.Series:
    return splits.map({split: k for k, split in enumerate(wildlife.SPLITS)})


def test_the_event_is_written_only_where_names_do_not_tell_it(tmp_path: Path) -> None:
    named = wildlife.row(f"{TRACK}/{TRACK}_c0.mp4", "fox", None, "train")
    wildlife.write(pd.DataFrame([named, wildlife.row("a, b.mp4", None, "playing", "train")]), tmp_path)
    lines = (tmp_path / "metadata/train.csv").read_text().splitlines()
    assert lines == ["video_path,species,activity", f"{TRACK}/{TRACK}_c0.mp4,fox,", '"a, b.mp4",,playing']
    wildlife.write(pd.DataFrame([named, wildlife.row("a.mp4", None, "playing", "test", "noon")]), tmp_path)
    assert (tmp_path / "metadata/test.csv").read_text() == "video_path,species,activity,event\na.mp4,,playing,noon\n"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"train": ""}, r"train\.csv row 1: no column video_path, species, activity"),
        ({"train": "a.mp4,fox,playing\n"}, r"train\.csv row 1: no column video_path"),
        ({"test": "video_path,species\n"}, r"test\.csv row 1: no column activity"),
        ({"train": f"{HEADER}a.mp4,fox\n"}, r"train\.csv row 2 has 2 columns, the header 3"),
        ({"train": f"{HEADER}/a.mp4,fox,playing\n"}, "row 2: video_path '/a.mp4' is no path below"),
        ({"train": f"{HEADER}a/../../b.mp4,fox,playing\n"}, "is no path below"),
        ({"train": f"{HEADER}C:\\a.mp4,fox,playing\n"}, "is no path below"),
        ({"train": f"{HEADER},fox,playing\n"}, "video_path '' is no path"),
        ({"train": f"{HEADER}a\tb.mp4,fox,playing\n"}, "is no path below"),
        (
            {"train": f"{HEADER}a.mp4,fox,-1\n", "test": f"{HEADER}a.mp4,fox,-1\n"},
            r"test\.csv row 2: .*train\.csv row 2",
        ),
        ({"train": f"{HEADER}a/b.mp4,fox,-1\nx.mp4,,\na_b.mp4,fox,-1\n"}, r"row 4: a_b\.mp4 is listed in .* row 2"),
        ({"train": f'{HEADER}"a.mp4,fox,playing\n'}, "no UTF-8 CSV"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_row(tmp_path: Path, texts: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        wildlife.read(write(tmp_path, **texts))
    assert "\n" not in str(raised.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metadata/train\.csv not found"):
        wildlife.read(tmp_path)
    write(tmp_path)
    (tmp_path / "metadata/test.csv").unlink()
    with pytest.raises(InputError, match=r"test\.csv not found"):
        wildlife.read(tmp_path)
    assert load_format("wildlife").read is wildlife.read
