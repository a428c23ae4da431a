"""FAVDBench's annotations: what the files mean in every form that they are met in, and what is wrong with them."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.family import InputError
from tasks.data import clip_files
from tasks.datasets import class_names, favd, favd_files, load_format, write_class_names
from tasks.download import Download, download

FIRST, SECOND = "-05wY41ht1s_123000_133000", "abc_DEF_12_x_0_5000"
TEXT = 'a man plays "la paloma" on a guitar. the guitar sounds.'


def table(*rows: dict[str, object]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=favd.COLUMNS)


def small() -> pd.DataFrame:
    return table(
        favd.row(FIRST, f"videos/train/{FIRST}.mp4", "train", TEXT),
        favd.row(SECOND, f"videos/train/{SECOND}.mp4", "train", "a cat purrs."),
        favd.row("y_0_1", "videos/test/y_0_1.mp4", "test", "rain falls.", ["it rains."], end=1.5, asr="rain"),
    )


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    favd.write(small(), tmp_path)
    found = favd.read(tmp_path)
    pd.testing.assert_frame_equal(found, small())
    assert found["group"].tolist() == ["-05wY41ht1s", "abc_DEF_12_x", "y"] and found["start"].tolist() == [123.0, 0, 0]
    assert favd.captions(found["annotation"][2]) == ["rain falls.", "it rains."]
    assert json.loads(found["annotation"][2])["end"] == 1.5 and favd.class_of(found["annotation"][0]) is None
    assert not (tmp_path / "metadata/val.caption.tsv").exists() and load_format("favd").read is favd.read


def test_the_files_are_those_of_the_benchmark(tmp_path: Path) -> None:
    favd.write(small(), tmp_path)
    folder, key = tmp_path / "metadata", f"videos/train/{FIRST}.mp4"
    rows = [line.split("\t") for line in (folder / "train.caption.tsv").read_text().split("\n")]
    assert rows[0][0] == key and json.loads(rows[0][1]) == [{"caption": TEXT}] and rows[2] == [""]
    assert (folder / "train.label.tsv").read_bytes() == (folder / "train.caption.tsv").read_bytes()
    assert (folder / "train.img.tsv").read_text().split("\n")[0] == f"{key}\t{key}"
    assert (folder / "test.caption.linelist.tsv").read_text() == "0\t0\n0\t1\n"
    coco = json.loads((folder / "test.caption_coco_format.json").read_text())
    assert [(a["image_id"], a["caption"], a["id"]) for a in coco["annotations"]] == [
        ("videos/test/y_0_1.mp4", "rain falls.", 0),
        ("videos/test/y_0_1.mp4", "it rains.", 1),
    ]
    assert coco["images"] == [{"id": "videos/test/y_0_1.mp4", "file_name": "videos/test/y_0_1.mp4"}]
    assert (coco["type"], coco["info"], coco["licenses"]) == ("captions", "dummy", "dummy")


fields = st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(rows=st.lists(st.tuples(fields, fields).filter(lambda row: bool("\t".join(row).strip())), max_size=6))
@settings(max_examples=80, deadline=None)
def test_rows_and_their_offsets_come_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("tsv") / "X.img.tsv"
    favd_files.write_tsv(path, rows)
    expected = list(rows)
    if expected and expected[0][0].startswith("\ufeff"):
        expected[0] = (expected[0][0][1:], expected[0][1])
    assert [tuple(row) for _, row in favd_files.read_rows(path, 2)] == expected
    offsets = [int(line) for line in path.with_suffix(".lineidx").read_text().split("\n")[:-1]]
    binary = path.with_suffix(".lineidx.8b").read_bytes()
    assert [value for (value,) in struct.iter_unpack("<Q", binary)] == offsets
    data = path.read_bytes()
    assert [data[at:].split(b"\n")[0].decode() for at in offsets] == ["\t".join(row) for row in rows]


@pytest.mark.parametrize("key", ["/data/favd/videos/train/{}.mp4", "train/{}.mp4", "{}", "{}.mp4", "C:\\favd\\{}.mp4"])
@pytest.mark.parametrize("place", ["metadata", "datasets/metadata", "."])
def test_every_style_of_keys_in_every_place(tmp_path: Path, key: str, place: str) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    lines = [f"{key.format(name)}\t{json.dumps([{'caption': TEXT}])}" for name in (FIRST, SECOND)]
    (tmp_path / place / "train.caption.tsv").write_text("\n".join(lines) + "\n")
    found = favd.read(tmp_path)
    assert found["id"].tolist() == [FIRST, SECOND] and favd.captions(found["annotation"][0]) == [TEXT]
    media = "datasets/videos" if place.startswith("datasets") else "videos"
    assert found["path"].tolist() == [f"{media}/train/{FIRST}.mp4", f"{media}/train/{SECOND}.mp4"]


def test_a_column_in_the_quotes_of_csv(tmp_path: Path) -> None:
    quoted = json.dumps([{"caption": TEXT}]).replace('"', '""')
    (tmp_path / "train.caption.tsv").write_bytes(f'\ufeff{FIRST}\t"{quoted}"\r\n'.encode())
    assert favd.captions(favd.read(tmp_path)["annotation"][0]) == [TEXT]


def test_a_subset_names_the_same_files_where_no_media_are(tmp_path: Path) -> None:
    paths = ["train/a.mp4", "b.webm", "clips/c.mp4", "datasets/frame_tsv/train_32frames.img.tsv/d.row"]
    clips = table(*(favd.row(clip_files.row_id(path), path, "train", TEXT) for path in paths))
    favd.write(clips, tmp_path)
    assert favd.read(tmp_path)["path"].tolist() == paths


def test_prepared_rows_stand_in_for_videos_that_are_not_there(tmp_path: Path) -> None:
    favd.write(small(), tmp_path)
    (tmp_path / "frame_tsv").mkdir()
    for name in ("train_8frames.img.tsv", "train_32frames.img.tsv", "train_xframes.img.tsv"):
        (tmp_path / "frame_tsv" / name).touch()
    (tmp_path / "videos/train").mkdir(parents=True)
    (tmp_path / f"videos/train/{SECOND}.mp4").touch()
    assert favd.read(tmp_path)["path"].tolist() == [
        f"frame_tsv/train_32frames.img.tsv/{FIRST}.row", f"videos/train/{SECOND}.mp4", "videos/test/y_0_1.mp4",
    ]  # fmt: skip


def test_a_plain_csv(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text(
        "id,path,caption,split\na_0_1000,,a dog barks.,train\na_0_1000,,a dog.,train\n"
        ',my clips/b.mov,"rain, rain.",test\nc,x/c.mp4,a bell.,val\n'
    )
    found = favd.read(tmp_path)
    assert found[["id", "path", "split"]].values.tolist() == [
        ["a_0_1000", "videos/train/a_0_1000.mp4", "train"], ["b", "my clips/b.mov", "test"], ["c", "x/c.mp4", "val"],
    ]  # fmt: skip
    assert favd.captions(found["annotation"][0]) == ["a dog barks.", "a dog."]
    favd.write(found, tmp_path / "again")
    pd.testing.assert_frame_equal(
        favd.read(tmp_path / "again").sort_values("id", ignore_index=True), found, check_like=True
    )


MUTATIONS = [
    ("train.caption.tsv", '[{"caption": "a cat', '[{"caption: "a cat', r"train\.caption\.tsv row 2: .*no JSON"),
    ("train.caption.tsv", '[{"caption": "a cat', '[{"text": "a cat', r"row 2: .*no list of captions"),
    ("train.caption.tsv", '\t[{"caption": "a cat', ' [{"caption": "a cat', r"row 2 has 1 columns, 2 expected"),
    ("train.img.tsv", FIRST, "other", r"train\.img\.tsv row 1: key .*other.*train\.caption\.tsv row 1"),
    ("train.label.tsv", SECOND, "other", r"train\.label\.tsv row 2: key"),
    ("train.img.tsv", f"videos/train/{SECOND}.mp4\tvideos/train/{SECOND}.mp4\n", "", r"has 1 rows, its captions 2"),
    ("train.caption.linelist.tsv", "1\t0", "2\t0", r"linelist\.tsv row 2 names row 2"),
    ("train.caption.linelist.tsv", "1\t0", "1\t1", r"row 2 names caption 1 of"),
    ("train.caption.linelist.tsv", "1\t0", "1\t-1", r"row 2: '1 -1' is no row and number"),
    ("train.caption.linelist.tsv", "1\t0\n", "", rf"lacks row 1, .*caption\.tsv row 2, key .*{SECOND}"),
    ("train.caption_coco_format.json", FIRST, "other", r"format\.json annotation 0: image_id .*other"),
    ("train.caption_coco_format.json", '"annotations"', '"notes"', r"no COCO file of captions"),
    ("test.caption.tsv", "y_0_1", FIRST, r"test\.label\.tsv row 1: key"),
]


@pytest.mark.parametrize(("name", "old", "new", "line"), MUTATIONS)
def test_files_that_disagree_are_told_in_one_line(tmp_path: Path, name: str, old: str, new: str, line: str) -> None:
    favd.write(small(), tmp_path)
    edit(tmp_path / "metadata" / name, old, new)
    with pytest.raises(InputError, match=line) as error:
        favd.read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_clip_in_two_splits_is_refused(tmp_path: Path) -> None:
    favd.write(table(favd.row("a", "x/a.mp4", "train", "a."), favd.row("a", "y/a.mp4", "test", "b.")), tmp_path)
    with pytest.raises(InputError, match=r"test\.caption\.tsv row 1: clip a is listed twice"):
        favd.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("id,caption\na,b\n", "row 1: the columns are"),
        ("id,caption,split\na,b,dev\n", "row 2: split 'dev' is unknown"),
        ("id,caption,split\n,b,test\n", "row 2 names no clip"),
        ("id,path,caption,split\nb,x/a.mp4,b,test\n", "row 2: id 'b', but the file is"),
        ('id,caption,split\na,"b,test\n', "no UTF-8 CSV"),
        ("id,caption,split\na,b,c,test\n", "row 2: not as many columns"),
    ],
)
def test_rows_of_csv_that_are_none(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "captions.csv").write_text(text)
    with pytest.raises(InputError, match=line):
        favd.read(tmp_path)


def test_a_folder_without_annotations(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"captions\.csv not found, nor metadata/train\.caption\.tsv"):
        favd.read(tmp_path)


def test_the_vocabulary_is_the_classes(tmp_path: Path) -> None:
    assert class_names(favd, tmp_path) == []  # pyright: ignore[reportArgumentType]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u2028", "##ing", "cat"]
    write_class_names(favd, names, tmp_path)  # pyright: ignore[reportArgumentType]
    assert favd.classes(tmp_path) == names
    (tmp_path / "metadata/vocab.txt").write_text("[PAD]\ncat\n")
    with pytest.raises(InputError, match=r"lacks the wordpiece \[UNK\]"):
        favd.classes(tmp_path)


def test_captions_that_a_model_cannot_learn_from_are_told(tmp_path: Path) -> None:
    rows = [
        favd.row("v_0_5", "v_0_5.mp4", "train", " "),
        favd.row("v_5_9", "v_5_9.mp4", "test", "a man plays, then he"),
        favd.row("w", "w.mp4", "train", "word " * 113 + "."),
        favd.row("x", "x.mp4", "train", "word " * 112 + "."),
    ]
    review = favd.check(table(*rows).assign(reason=""), tmp_path)
    told = [(finding.severity, finding.clip, finding.text) for finding in review.findings]
    assert [(severity, clip) for severity, clip, _ in told] == [
        ("error", "v_0_5"), ("warning", "v_5_9"), ("warning", ""), ("warning", ""),
    ]  # fmt: skip
    assert "empty" in told[0][2] and "then he" in told[1][2]
    assert told[2][2].startswith("1 of 4 captions (25%)") and "video v are in test and in train" in told[3][2]
    assert review.tables["What there is"]["most tokens"].tolist() == [116, 8]


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with released archives: the metadata, and a tar of sounds."""
    monkeypatch.chdir(tmp_path)
    favd.write(small(), tmp_path / "made")
    (tmp_path / "made/audio_mp3/train").mkdir(parents=True)
    (tmp_path / f"made/audio_mp3/train/{FIRST}.mp3").write_bytes(b"sound")
    folder = tmp_path / "released"
    folder.mkdir()
    for name, form in (("metadata", "zip"), ("audio_mp3", "tar")):
        made = shutil.make_archive(str(folder / name), form, tmp_path / "made", name)
        monkeypatch.setitem(favd.RELEASED, Path(made).name, hashlib.md5(Path(made).read_bytes()).hexdigest())
    return folder


def test_released_archives_are_unpacked_side_by_side(release: Path) -> None:
    settings = Download(str(release), "favd", None, None, None)
    assert "3 clips listed" in download("described", settings)
    raw = Path("data/described/raw")
    assert sorted(path.name for path in raw.iterdir()) == ["audio_mp3", "metadata"]
    assert (raw / f"audio_mp3/train/{FIRST}.mp3").read_bytes() == b"sound" and (release / "metadata.zip").is_file()
    one = Download(str(release / "metadata.zip"), "favd", None, None, None)
    assert "3 clips listed" in download("described", one)


@pytest.mark.parametrize("of", [".", "metadata.zip"])
def test_a_released_archive_with_other_bytes_is_refused(release: Path, of: str) -> None:
    with (release / "metadata.zip").open("ab") as handle:
        handle.write(b"\0")
    source = release if of == "." else release / of
    with pytest.raises(InputError, match=r"metadata\.zip: md5 is .*, the released one has .*; fetch it again"):
        download("described", Download(str(source), "favd", None, None, None))
    assert not Path("data/described/raw").exists() and (release / "metadata.zip").is_file()
