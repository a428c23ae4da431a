"""VGGSound's CSV files, as they are and as people get them wrong."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.family import InputError
from tasks.datasets import load_format, vggsound

CSV = '---g-f_I2yQ,1,people marching,test\n0123456789a,30,"bee, wasp, etc. buzzing",train\nNA,007,"a ""quoted"" one",train\n'


def test_every_field_is_text(tmp_path: Path) -> None:
    (tmp_path / "vggsound.csv").write_text(CSV)
    table = vggsound.read(tmp_path)
    assert list(table.columns) == ["id", "path", "split", "start", "group", "annotation"]
    assert list(table["id"]) == ["---g-f_I2yQ_000001", "0123456789a_000030", "NA_000007"]
    assert table["path"][0] == "video/---g-f_I2yQ_000001.mp4"
    assert list(table["group"]) == ["---g-f_I2yQ", "0123456789a", "NA"]
    assert list(table["start"]) == [1.0, 30.0, 7.0]
    assert list(table["annotation"].map(vggsound.class_of)) == [
        "people marching",
        "bee, wasp, etc. buzzing",
        'a "quoted" one',
    ]


label = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1).filter(str.strip)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(label, st.integers(0, 999_999), st.sampled_from(["train", "test"])), min_size=1, max_size=5))
def test_what_is_written_is_read_again(tmp_path: Path, rows: list[tuple[str, int, str]]) -> None:
    table = pd.DataFrame(vggsound.row(f"-id{k}", start, text, split) for k, (text, start, split) in enumerate(rows))
    vggsound.write(table, tmp_path)
    pd.testing.assert_frame_equal(vggsound.read(tmp_path), table)
    with (tmp_path / "vggsound.csv").open(newline="", encoding="utf-8") as handle:  # as another tool would
        expected = [[f"-id{k}", str(start), text, split] for k, (text, start, split) in enumerate(rows)]
        assert list(csv.reader(handle)) == expected


def test_labels_are_quoted_only_where_they_hold_commas(tmp_path: Path) -> None:
    vggsound.write(pd.DataFrame([vggsound.row("a", 1, "x, y", "train"), vggsound.row("b", 2, "z", "test")]), tmp_path)
    assert (tmp_path / "vggsound.csv").read_bytes() == b'a,1,"x, y",train\nb,2,z,test\n'


def test_an_empty_choice_is_written_as_an_empty_file(tmp_path: Path) -> None:
    vggsound.write(pd.DataFrame(columns=vggsound.COLUMNS), tmp_path)
    assert (tmp_path / "vggsound.csv").read_bytes() == b""


def test_the_official_split_files(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('-a_b_000030.mp4,"bee, wasp, etc. buzzing"\n')
    (tmp_path / "test.csv").write_text("c_000001.mp4,rain\n")
    table = vggsound.read(tmp_path)
    assert list(table["group"]) == ["-a_b", "c"]
    assert list(table["split"]) == ["train", "test"]
    assert list(table["start"]) == [30.0, 1.0]
    assert table["path"][0] == "video/-a_b_000030.mp4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("ytid,start,label,split\na,1,rain,train\n", r"header \(ytid, start, label, split\)"),
        ("a,1,rain,train\nb,2,bee, wasp buzzing,train\n", "row 2 has 5 columns, 4 expected"),
        ("a,1,rain\n", "row 1 has 3 columns"),
        ("a,1,rain,train\nb,1,rain,valid\n", "row 2: split 'valid' is unknown"),
        ("a,1.5,rain,train\n", "row 1: start '1.5'"),
        ("a,,rain,train\n", "row 1: start ''"),
        ("a,-1,rain,train\n", "row 1: start '-1'"),
        ("a,1,rain,train\nb,1, ,train\n", "row 2: the label is empty"),
        ("../a,1,rain,train\n", "no YouTube id"),
        (",1,rain,train\n", "no YouTube id"),
        ("a,1,rain,train\na,1,rain,test\n", "a_000001 is listed twice"),
        ('a,1,"rain,train\n', "CSV"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_row(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "vggsound.csv").write_text(text)
    with pytest.raises(InputError, match=message) as raised:
        vggsound.read(tmp_path)
    assert "\n" not in str(raised.value)


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vggsound\.csv not found"):
        vggsound.read(tmp_path)
    (tmp_path / "train.csv").write_text("a_000001.mp4,rain\n")
    with pytest.raises(InputError, match=r"test\.csv not found"):
        vggsound.read(tmp_path)
    (tmp_path / "test.csv").write_text("a.mp4,rain\n")
    with pytest.raises(InputError, match=r"test\.csv row 1: 'a\.mp4'"):
        vggsound.read(tmp_path)
    (tmp_path / "vggsound.csv").write_bytes(b"a,1,\xff\xfe,train\n")
    with pytest.raises(InputError, match="UTF-8"):
        vggsound.read(tmp_path)


def test_formats_are_found_by_name() -> None:
    assert load_format("vggsound").read is vggsound.read
    with pytest.raises(InputError, match=r"'vgg' is unknown; known: .*vggsound, wildlife"):
        load_format("vgg")
    with pytest.raises(InputError, match="'demo' is unknown"):
        load_format("demo")
