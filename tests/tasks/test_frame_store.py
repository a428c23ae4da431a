"""The frame store, against a reader written here from the format's description alone."""

from __future__ import annotations

import base64
import json
import pickle
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.family import InputError
from tasks.data import index, video
from tasks.data.frame_store import FrameShard, FrameStore, decode_jpegs, write_frames

Row = tuple[str, int, int, list[bytes]]


def read_by_the_format(path: Path) -> list[Row]:
    """Rows by way of .lineidx (decimal byte offsets): key, JSON with the size, base64 columns, separated by tabs."""
    data = path.read_bytes()
    rows = []
    for line in path.with_suffix(".lineidx").read_text().split("\n")[:-1]:
        fields = data[int(line) : data.index(b"\n", int(line))].split(b"\t")
        size = json.loads(fields[1])
        assert set(size) == {"class", "width", "height"} and size["class"] == -1
        jpegs = [base64.b64decode(column, validate=True) for column in fields[2:]]
        rows.append((fields[0].decode(), size["width"], size["height"], jpegs))
    return rows


keys = st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=["Cs"]), min_size=1, max_size=12)
columns = st.lists(st.binary(max_size=60), min_size=0, max_size=6)
rows_of_any_kind = st.lists(st.tuples(keys, st.integers(1, 5000), st.integers(1, 5000), columns), max_size=6)


@given(rows=rows_of_any_kind)
@settings(max_examples=60, deadline=None)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    path = tmp_path_factory.mktemp("store") / "X.tsv"
    assert write_frames(path, rows) == len(rows)
    assert read_by_the_format(path) == rows
    text = [int(line) for line in path.with_suffix(".lineidx").read_text().split()]
    binary = path.with_suffix(".lineidx.8b").read_bytes()
    assert [value for (value,) in struct.iter_unpack("<Q", binary)] == text
    shard = FrameShard(path)
    assert len(shard) == len(rows)
    for number, (key, _, _, jpegs) in enumerate(rows):
        assert shard.key(number) == key
        assert shard.num_frames(number) == len(jpegs)
        order = [*range(len(jpegs))][::-2]
        assert shard.jpegs(number, order) == [jpegs[k] for k in order]


def test_a_foreign_store_without_the_binary_index(tmp_path: Path) -> None:
    rows: list[Row] = [("a/b.mp4", 4, 3, [b"one", b"two"]), ("c", 4, 3, [b"three", b""])]
    write_frames(tmp_path / "X.tsv", rows)
    (tmp_path / "X.lineidx.8b").unlink()
    assert FrameShard(tmp_path / "X.tsv").jpegs(1, [0]) == [b"three"]
    (tmp_path / "X.lineidx").unlink()
    with pytest.raises(InputError, match=r"lacks its X\.lineidx"):
        FrameShard(tmp_path / "X.tsv")


@pytest.mark.parametrize("key", ["", "a\tb", "a\nb"])
def test_a_key_that_would_break_the_format(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        write_frames(tmp_path / "X.tsv", [(key, 1, 1, [])])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> FrameStore:
    """Two shards of three clips each, four grey pictures a clip: clip k's frame t has the level 40 k + t."""
    listed = []
    for shard in range(2):
        rows = []
        for row in range(3):
            clip = shard * 3 + row
            pictures = [np.full((16, 24, 3), 40 * clip + t, np.uint8) for t in range(4)]
            rows.append((f"clip{clip}", 24, 16, [video.encode_jpeg(picture, 100) for picture in pictures]))
            listed.append((f"clip{clip}", "train", shard, row, 4, 24, 16, False, -1))
        write_frames(tmp_path / f"frames-{shard:05d}-of-00002.tsv", rows)
    names = ["id", "split", "shard", "row", "num_frames", "width", "height", "has_audio", "audio_row"]
    index.write(pd.DataFrame(listed, columns=names), tmp_path, "")
    return FrameStore(tmp_path)


def test_frames_by_clip_and_column(store: FrameStore) -> None:
    assert store.ids == [f"clip{k}" for k in range(6)] and len(store) == 6
    assert store.num_frames("clip5") == 4
    frames = store.decode("clip4", [3, 0, 3])
    assert frames.shape == (3, 16, 24, 3) and frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - np.array([163, 160, 163])[:, None, None, None]).max() <= 1


def test_pictures_of_a_clip_have_one_size_and_repetitions_are_copies() -> None:
    large, small = (video.encode_jpeg(np.full((height, 24, 3), 90, np.uint8), 100) for height in (16, 8))
    frames = decode_jpegs([large, large, large])
    assert frames.shape == (3, 16, 24, 3) and np.abs(frames.astype(int) - 90).max() <= 1
    for others in ([large, small], [small, large]):
        with pytest.raises(ValueError):
            decode_jpegs(others)


def test_a_used_store_can_be_sent_to_another_process(store: FrameStore) -> None:
    expected = store.read("clip1", [2])
    sent = pickle.dumps(store)
    assert len(sent) < 20000
    assert pickle.loads(sent).read("clip1", [2]) == expected


def test_damage_is_named(store: FrameStore) -> None:
    with pytest.raises(InputError, match="holds no clip nobody"):
        store.read("nobody", [0])
    with pytest.raises(InputError, match=r"frames-00000-of-00002.tsv row 0 is damaged"):
        store.read("clip0", [4])
    path = store.folder / "frames-00001-of-00002.tsv"
    path.write_bytes(path.read_bytes().replace(b"/9j/", b"AAAA"))
    with pytest.raises(InputError, match="a picture of clip clip3 is damaged"):
        store.decode("clip3", [0])
    with pytest.raises(InputError, match=r"index.arrow not found; run the stores stage again"):
        FrameStore(store.folder / "nowhere")


def test_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom tasks import command\nfrom tasks.data.frame_store import write_frames\n"
        "rows = [(str(k), 1, 1, [bytes(3000)]) for k in range(20)]\n"
        f"command.run(lambda: write_frames(Path({str(tmp_path)!r}) / 'X.tsv', rows))"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))  # noqa: E731
    done = subprocess.run([sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no space left") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
