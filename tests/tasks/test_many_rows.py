"""Hundreds of thousands of clips: what is held of each, in a trainer and in its workers."""

from __future__ import annotations

import gc
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from models.family import Batch, ClipSpec, Sample
from tasks import storage, stores
from tasks.data import index, manifest
from tasks.data.audio_store import AudioShard, write_audio
from tasks.data.frame_store import FrameStore, shard_name, write_frames
from tasks.data.loader import ClipDataset, open_split

FEW, MANY = 1000, 5000
HELD = 64  # bytes of Python's own that a clip may cost; a list of ids and one of annotations cost hundreds


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storage, "DATA", tmp_path)
    return tmp_path


def write_dataset(name: str, rows: int) -> None:
    """Manifest and index of so many clips, nine in ten of train, in 8 shards; no pictures and sounds."""
    ids = [f"clip{(k * 7919) % rows:06d}" for k in range(rows)]
    table = pd.DataFrame({"id": ids, "path": [f"raw/{clip}.mp4" for clip in ids], "group": ids})
    table["annotation"] = [json.dumps({"label": f"sound {k % 309}", "number": k}) for k in range(rows)]
    table["split"] = ["test" if k % 10 == 9 else "train" for k in range(rows)]
    same = {"start": 0.0, "duration": 1.0, "fps": 10.0, "frames": 10, "width": 48, "height": 32, "sample_rate": 16000}
    flags = {"has_video": True, "has_audio": True, "silent": False, "still": False, "checksum": "0" * 64}
    manifest.write(table.assign(**same, **flags), manifest.manifest_path(name))
    stored = pd.DataFrame({"id": ids, "shard": np.arange(rows) % 8, "row": np.arange(rows) // 8, "num_frames": 4})
    stored = stored.assign(width=48, height=32, has_audio=True, audio_row=stored["row"])
    folder = storage.DATA / name / "stores"
    folder.mkdir()
    listed = manifest.read(name)[stores.LISTED]
    index.write(listed.merge(stored, on="id"), folder, manifest.digest(name))


def annotation_of(sample: Sample) -> Batch:
    return dict(sample.annotation)


def open_train(name: str) -> ClipDataset:
    clips = open_split(name, "train", ClipSpec(0, 16000, 0.0), annotation_of, 0)
    assert isinstance(clips, ClipDataset)
    return clips


def held_by(name: str) -> int:
    """Bytes of Python's own that an opened split keeps."""
    gc.collect()
    tracemalloc.start()
    clips = open_train(name)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(clips)
    return held


def test_an_opened_split_keeps_no_object_for_each_clip(data: Path) -> None:
    for name, rows in (("few", FEW), ("many", MANY)):
        write_dataset(name, rows)
    open_train("few")  # what is imported and compiled once
    assert (held_by("many") - held_by("few")) / (MANY - FEW) < HELD


def test_opening_a_split_reads_no_row(data: Path) -> None:
    write_dataset("many", MANY)
    before = pa.total_allocated_bytes()
    clips = open_train("many")
    assert pa.total_allocated_bytes() == before and len(clips)


def test_clips_of_a_split_are_those_of_the_manifest(data: Path) -> None:
    write_dataset("few", FEW)
    table, clips = manifest.read("few"), open_train("few")
    train = table[table["split"] == "train"]
    assert list(clips.ids) == train["id"].tolist() and len(clips) == FEW * 9 // 10
    assert list(clips.annotations) == [json.loads(text) for text in train["annotation"]]
    last: Any = clips[0, len(clips) - 1]
    assert {name: last[name] for name in ("label", "number")} == json.loads(train["annotation"].iloc[-1])
    assert clips.annotations[1:3] == [clips.annotations[1], clips.annotations[2]]


def test_what_a_reader_has_seen_of_frames_does_not_stay_with_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(f"clip{k:02d}", 1, 1, [rng.bytes(90_000)]) for k in range(64)]
    path = tmp_path / shard_name("frames", 0, 1, "tsv")
    write_frames(path, rows)
    stored = {"id": [row[0] for row in rows], "split": "train", "shard": 0, "row": range(64), "num_frames": 1}
    index.write(pd.DataFrame(stored), tmp_path, "")
    store = FrameStore(tmp_path)
    assert [store.read(row[0], [0]) for row in rows] == [row[3] for row in rows]
    assert path.stat().st_size > 7_000_000
    assert mapped(path) < 1000


def mapped(path: Path) -> int:
    """kB of a file that this process has mapped and in memory."""
    blocks = Path("/proc/self/smaps").read_text().split(str(path))
    assert len(blocks) > 1
    return sum(int(block.split("Rss:")[1].split()[0]) for block in blocks[1:])


def test_what_a_reader_has_heard_does_not_stay_with_it(tmp_path: Path) -> None:
    wave = np.random.default_rng(0).integers(-9999, 9999, 16000).astype(np.int16)
    path = tmp_path / "audio.h5"
    write_audio(path, ((f"clip{k}", np.roll(wave, k)) for k in range(300)), 16000, "pcm16")
    shard = AudioShard(path)
    for row in range(300):
        assert np.array_equal(shard.stored(row)[0], np.roll(wave, row))
    assert shard.open().id.get_mdc_size()[2] < 500_000  # bytes; the file has 10 MB
