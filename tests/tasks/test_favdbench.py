"""FAVDBench's files made from a folder of videos and a CSV, against readers written here from the format's description."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
import simplejpeg

from models.family import InputError
from tasks import clean, download, favdbench, storage, stores, subset
from tasks.data import video
from tasks.data.frame_store import FrameStore
from tasks.datasets import favd

CLIPS = {"b_x_0_1000": "train", "-a_5000_6000": "train", "c_1_1001": "val", "d_0_1000": "test"}
BUILD = favdbench.Build(4, 16, 95, 32000)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_clip: Callable[..., Path]) -> Path:
    """A folder of four videos, named in three ways, and their captions.csv; the working directory is beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "clips"
    for number, (name, split) in enumerate(CLIPS.items()):
        place = folder if number == 0 else folder / split if number == 1 else folder / "videos" / split
        write_clip(place / f"{name}.mp4", 400 + 200 * number)
    lines = [f'{name},{split},"a {name}, seen. it sounds."' for name, split in CLIPS.items()]
    (folder / "captions.csv").write_text("\n".join(["id,split,caption", *lines, "d_0_1000,test,another."]) + "\n")
    return folder


def make(source: Path, out: Path, workers: int = 1) -> str:
    return favdbench.build(source, source / "captions.csv", out, BUILD, workers)


def rows(path: Path) -> list[list[str]]:
    """A TSV by its lineidx, which must agree with its lineidx.8b."""
    data = path.read_bytes()
    offsets = [int(line) for line in path.with_suffix(".lineidx").read_text().split("\n")[:-1]]
    binary = path.with_suffix(".lineidx.8b").read_bytes()
    assert [value for (value,) in struct.iter_unpack("<Q", binary)] == offsets
    found = [data[at : data.index(b"\n", at)].decode().split("\t") for at in offsets]
    assert "".join("\t".join(row) + "\n" for row in found).encode() == data
    return found


def test_every_file_is_the_benchmarks(source: Path, tmp_path: Path) -> None:
    line = make(source, tmp_path / "out")
    out = tmp_path / "out"
    assert "4 clips (2 train, 1 val, 1 test), 4 frames each" in line
    names = ["-a_5000_6000", "b_x_0_1000"]  # in the order of the ids
    keys = [f"datasets/videos/train/{name}.mp4" for name in names]
    assert [row[0] for row in rows(out / "metadata/train.caption.tsv")] == keys
    assert json.loads(rows(out / "metadata/train.label.tsv")[1][1]) == [{"caption": "a b_x_0_1000, seen. it sounds."}]
    assert rows(out / "metadata/train.img.tsv") == [[key, key] for key in keys]
    assert rows(out / "metadata/test.caption.linelist.tsv") == [["0", "0"], ["0", "1"]]
    assert (out / "metadata/val_4frames.yaml").read_text() == (
        "caption: val.caption.tsv\ncaption_coco_format: val.caption_coco_format.json\n"
        "caption_linelist: val.caption.linelist.tsv\nimg: frame_tsv/val_4frames.img.tsv\n"
        "label: val.label.tsv\naudio: audio_hdf/val_mp3.hdf\n"
    )
    frames = rows(out / "frame_tsv/train_4frames.img.tsv")
    assert [row[0] for row in frames] == keys and {len(row) for row in frames} == {6}
    assert json.loads(frames[0][1]) == {"class": -1, "width": 24, "height": 16}
    with h5py.File(out / "audio_hdf/train_mp3.hdf") as file:
        assert [name.decode() for name in np.asarray(file["audio_name"])] == names
        sounds = [np.asarray(sound, np.uint8).tobytes() for sound in np.asarray(file["mp3"])]
    for name, row, sound in zip(names, frames, sounds, strict=True):
        expected = video.read_clip(next(source.rglob(f"{name}.mp4")), BUILD.preparation)
        assert [base64.b64decode(jpeg, validate=True) for jpeg in row[2:]] == expected.jpegs
        assert simplejpeg.decode_jpeg(expected.jpegs[0]).shape == (16, 24, 3)
        with av.open(io.BytesIO(sound), "r") as container:
            stream = container.streams.audio[0]
            assert (stream.codec_context.name, stream.rate, stream.channels) in [
                (codec, 32000, 1) for codec in ("mp3", "mp3float")
            ]
            wave = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(stream)])
        peak = np.abs(np.fft.rfft(wave[:32000])).argmax()
        assert abs(peak - (400 + 200 * [*CLIPS].index(name))) <= 2


def test_what_was_built_is_trained_on_here(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "out")
    Path("params.yaml").write_text("download: {described: {format: favd}}\n")
    settings = download.Download(str(tmp_path / "out"), "favd", None, None, None)
    assert "4 clips listed" in download.download("described", settings)
    subset.subset("described", subset.Subset("all", 1, 1, 1, "none", 1))
    clean.clean("described", clean.Clean(0.0, 1, True, True, True, 1, 0.0))
    stores.stores("described", stores.Stores(4, 0, 16, 95, 32000, "mp3", 1, 1, "processes", 0.0))
    kept = FrameStore(Path("data/described/stores"))
    for name in CLIPS:
        expected = video.read_clip(next(source.rglob(f"{name}.mp4")), BUILD.preparation)
        assert kept.read(name, range(4)) == expected.jpegs
    assert favd.captions(favd.read(Path("data/described/raw"))["annotation"][3]) == [
        "a d_0_1000, seen. it sounds.", "another.",
    ]  # fmt: skip


def test_the_same_clips_give_the_same_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(source, tmp_path / "one")
    monkeypatch.setattr(favdbench, "PIECE", 1)
    make(source, tmp_path / "two", workers=2)
    assert storage.folder_digest(tmp_path / "one") == storage.folder_digest(tmp_path / "two")


def test_a_killed_run_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(source, tmp_path / "whole")
    script = (
        "import sys; from pathlib import Path; from tasks import favdbench; favdbench.PIECE = 1; "
        "source, out = map(Path, sys.argv[1:]); settings = favdbench.Build(4, 16, 95, 32000); "
        "favdbench.build(source, source / 'captions.csv', out, settings, 1)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(source), str(tmp_path / "out")])
    work = storage.WORK
    while process.poll() is None and not list(work.glob("favdbench-*/*.h5")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(work.glob("favdbench-*/*.h5")) and not (tmp_path / "out").exists()
    monkeypatch.setattr(favdbench, "PIECE", 1)
    deadline = time.monotonic() + 30
    while True:  # the killed run's worker may hold on for a moment
        try:
            make(source, tmp_path / "out")
            break
        except InputError as error:
            assert "in use by another run" in str(error) and time.monotonic() < deadline
            time.sleep(0.05)
    assert storage.folder_digest(tmp_path / "out") == storage.folder_digest(tmp_path / "whole")
    assert not list(work.glob("favdbench-*"))


def test_clips_that_cannot_be_used_are_all_named_and_mending_them_is_enough(
    source: Path, tmp_path: Path, write_clip: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    broken, mute = source / "b_x_0_1000.mp4", source / "videos/val/c_1_1001.mp4"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    write_clip(mute, sound=False)
    with pytest.raises(InputError, match=r"2 of 4 clips cannot be used, first b_x_0_1000\.mp4: .*nothing was written"):
        make(source, tmp_path / "out")
    assert "videos/val/c_1_1001.mp4: no audio" in capsys.readouterr().out and not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="2 of 4"):
        make(source, tmp_path / "out")
    broken.write_bytes(whole)
    write_clip(mute)
    assert "4 clips" in make(source, tmp_path / "out")


def test_rows_without_file_or_caption_are_told_before_any_work(source: Path, tmp_path: Path) -> None:
    csv, text = source / "captions.csv", (source / "captions.csv").read_text()
    for change, line in [
        (text + "none,test,a.\n", r"row 7: .*videos/test/none\.mp4 not found"),
        (text + "b_x_0_1000,test,a.\n", "row 7: clip b_x_0_1000 is listed twice"),
        (text.replace("another.", " "), "row 5: the caption is empty"),
        ("id,split,caption\n", "lists no clip"),
    ]:
        csv.write_text(change)
        with pytest.raises(InputError, match=line):
            make(source, tmp_path / "out")
    assert not storage.WORK.exists() and not (tmp_path / "out").exists()


def test_nobodys_folder_is_replaced(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name a new folder"):
        make(source, source)
    make(source, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/frame_tsv")
    make(source, tmp_path / "out")
    assert (tmp_path / "out/frame_tsv/val_4frames.img.tsv").is_file()


def test_from_the_command_line(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tasks.favdbench", str(source), str(source / "captions.csv")]
    settings = ["--out", str(tmp_path / "out"), "--frames", "2", "--size", "0", "--workers", "1"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and "format favd" in done.stdout
    assert json.loads(rows(tmp_path / "out/frame_tsv/test_2frames.img.tsv")[0][1])["width"] == 48
    bad = subprocess.run([*command, *settings, "--quality", "0"], capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stderr.splitlines()[-1] == "error: quality is 0; it goes from 1 to 100"
