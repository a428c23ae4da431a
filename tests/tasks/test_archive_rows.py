"""Clips that are rows of FAVDBench's frame and sound archives: read as they are, by the whole way into the stores."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from models.family import InputError
from tasks import clean, stores, subset
from tasks.data import archive_rows, audio, clip_files, manifest, video
from tasks.data.audio_store import AudioStore
from tasks.data.clip_files import ClipError
from tasks.data.frame_store import FrameStore
from tasks.datasets import favd

RATE, FRAMES = 32000, 8
NAMES = ["-05wY41ht1s_2000_3000", "b_c_0_1000", "d_5000_6000"]
KEY = "/data/favd/videos/{}/{}.mp4"
LENIENT = clean.Clean(0.0, 1, False, False, False, 1, 1.0)
STORES = stores.Stores(4, 0, 0, 95, RATE, "pcm16", 2, 1, "processes", 0.0)


def jpegs(seed: int, count: int = FRAMES, size: tuple[int, int] = (24, 32)) -> list[bytes]:
    rng = np.random.default_rng(seed)
    images = [np.kron(rng.integers(0, 256, (3, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in range(count)]
    return [simplejpeg.encode_jpeg(np.ascontiguousarray(image[: size[0], : size[1]]), 95, "RGB") for image in images]


def mp3(pitch: float, rate: int = RATE) -> bytes:
    wave = 8000 * np.sin(2 * np.pi * pitch / rate * np.arange(rate))
    return audio.encode(wave.astype(np.int16), rate, "mp3").tobytes()


def archive(root: Path, split: str, rows: dict[str, list[bytes]], sounds: dict[str, bytes]) -> Path:
    """The original's two files, by the format's description alone and without an index."""
    path = root / f"frame_tsv/{split}_32frames.img.tsv"
    for folder in ("frame_tsv", "audio_hdf"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    lines = [
        "\t".join([KEY.format(split, name), '{"class": -1, "width": 32, "height": 24}', *map(text, pictures)])
        for name, pictures in rows.items()
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
    with h5py.File(root / f"audio_hdf/{split}_mp3.hdf", "w") as file:
        file.create_dataset("audio_name", data=list(sounds), dtype=h5py.string_dtype())
        kept = file.create_dataset("mp3", (len(sounds),), h5py.vlen_dtype(np.uint8))
        for number, coded in enumerate(sounds.values()):
            kept[number] = np.frombuffer(coded, np.uint8)
    return path


def text(jpeg: bytes) -> str:
    return base64.b64encode(jpeg).decode()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose dataset has metadata and archives and not one video."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("download: {described: {format: favd}}\n")
    root = tmp_path / "data/described/raw/datasets"
    for split, names in (("train", NAMES[:2]), ("test", NAMES[2:])):
        seeds = {name: NAMES.index(name) for name in names}
        # The rows of the sounds stand in another order than those of the pictures.
        sounds = {name: mp3(400 + 200 * seeds[name]) for name in reversed(names)}
        archive(root, split, {name: jpegs(seed) for name, seed in seeds.items()}, sounds)
        captions = [f"{KEY.format(split, name)}\t{json.dumps([{'caption': f'{name} sounds.'}])}\n" for name in names]
        (root / "metadata").mkdir(exist_ok=True)
        (root / f"metadata/{split}.caption.tsv").write_text("".join(captions))
    return root


@pytest.mark.parametrize("media", ["none", "link", "copy"])
def test_they_reach_the_stores_as_they_are(project: Path, media: str) -> None:
    subset.subset("described", subset.Subset("all", 1, 1, 1, media, 1))  # pyright: ignore[reportArgumentType]
    if media != "none":
        shutil.rmtree(project)
    clean.clean("described", LENIENT)
    table = manifest.read_clean("described").set_index("id")
    where = "raw" if media == "none" else "subset"
    assert table["path"][NAMES[0]] == f"{where}/datasets/frame_tsv/train_32frames.img.tsv/{NAMES[0]}.row"
    assert table.loc[[NAMES[0]], ["frames", "width", "height", "sample_rate", "duration", "fps", "start"]].values.tolist() == [
        [FRAMES, 32, 24, RATE, 1.0, 8.0, 2.0]
    ]  # fmt: skip
    assert table[["has_audio", "still", "silent"]].to_numpy().tolist() == [[True, False, False]] * 3
    stores.stores("described", STORES)
    made = Path("data/described/stores")
    frames, sounds = FrameStore(made), AudioStore(made)
    for seed, name in enumerate(NAMES):
        every = jpegs(seed)
        assert frames.read(name, range(4)) == [every[k] for k in video.choose(FRAMES, 4)]
        wave, rate = sounds.read(name)
        expected, _ = audio.decode(np.frombuffer(mp3(400 + 200 * seed), np.uint8), None)
        assert rate == RATE
        np.testing.assert_array_equal(wave, expected)
        assert abs(np.abs(np.fft.rfft(wave[:RATE])).argmax() - (400 + 200 * seed)) <= 1


def test_an_index_changes_nothing_and_one_of_another_file_is_told(project: Path) -> None:
    path = project / "frame_tsv/train_32frames.img.tsv"
    counted = archive_rows.open_frames(path).offsets
    data = path.read_bytes()
    assert counted.tolist() == [0, data.index(b"\n") + 1]
    index = path.with_suffix(".lineidx")
    index.write_text("".join(f"{offset}\n" for offset in counted))
    assert archive_rows.open_frames(path).offsets.tolist() == counted.tolist()
    for wrong in (counted + 1, counted[:1], [*counted, len(data)], [*counted, len(data) + 9]):
        index.write_text("".join(f"{offset}\n" for offset in wrong))
        with pytest.raises(InputError, match=r"lineidx is not the index of .*img\.tsv"):
            archive_rows.open_frames(path)
    index.write_text("a\n")
    with pytest.raises(InputError, match="no list of offsets"):
        archive_rows.open_frames(path)


@given(lines=st.lists(st.binary(max_size=5).filter(lambda line: b"\n" not in line)), ends=st.booleans())
def test_lines_are_found_where_splitting_finds_them(lines: list[bytes], ends: bool) -> None:
    data = b"\n".join(lines) + (b"\n" if ends else b"")
    offsets = archive_rows.line_offsets(data).tolist()
    assert [data[at:].split(b"\n")[0] for at in offsets] == [line for line in data.split(b"\n") if line.strip()]


def test_every_defect_has_its_reason(tmp_path: Path) -> None:
    good = jpegs(0)
    broken = [*good[:3], good[3][:-200], *good[4:]]
    rows = {
        "good": good, "cut": broken, "sizes": [*good[:7], jpegs(1, 1, (16, 16))[0]], "one": good[:1], "none": [],
        "black": [simplejpeg.encode_jpeg(np.zeros((24, 32, 3), np.uint8), 95, "RGB")] * FRAMES,
        "noise": good, "mute": good, "still": good[:1] * FRAMES,
    }  # fmt: skip
    path = archive(tmp_path, "val", rows, {"good": mp3(500), "noise": b"no mp3 at all" * 50})
    text_ = path.read_text().replace(text(good[0]), "*", 1)
    found = {}
    for name in [*rows, "absent"]:
        try:
            found[name] = archive_rows.probe(path / f"{name}.row")
        except ClipError as error:
            found[name] = error.reason
            assert "\n" not in str(error)
    assert {name: reason for name, reason in found.items() if isinstance(reason, str)} == {
        "cut": "damaged", "sizes": "wrong shape", "one": "too short", "none": "too short", "black": "no video",
        "noise": "damaged", "absent": "missing",
    }  # fmt: skip
    assert found["good"].has_audio and not found["mute"].has_audio and found["still"].still
    path.write_text(text_)
    with pytest.raises(ClipError, match="damaged"):
        archive_rows.probe(path / "good.row")
    with pytest.raises(ClipError, match=r"missing: there is no test_32frames\.img\.tsv"):
        archive_rows.probe(path.with_name("test_32frames.img.tsv") / "good.row")


def test_a_row_that_stands_twice_is_told(tmp_path: Path) -> None:
    path = archive(tmp_path, "val", {"a": jpegs(0)}, {})
    path.write_text(path.read_text() * 2)
    with pytest.raises(InputError, match="row 2: a stands in row 1 already"):
        archive_rows.probe(path / "a.row")


def test_a_row_that_is_none_is_told(tmp_path: Path) -> None:
    path = archive(tmp_path, "val", {"a": jpegs(0)}, {})
    path.write_text(path.read_text() + "\n\nb\n")
    with pytest.raises(InputError, match=r"val_32frames\.img\.tsv row 2 has no key and pictures"):
        archive_rows.probe(path / "a.row")


def test_rows_that_end_as_on_windows(tmp_path: Path) -> None:
    path = archive(tmp_path, "val", {"a": jpegs(0), "b": jpegs(1)}, {})
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")[:-2])
    for seed, name in enumerate("ab"):
        assert archive_rows.probe(path / f"{name}.row").frames == FRAMES
        whole = archive_rows.read_clip(path / f"{name}.row", video.Preparation(FRAMES, 0, 95, RATE))
        assert whole.jpegs == jpegs(seed)


def test_sounds_that_are_no_archive_are_told(tmp_path: Path) -> None:
    path = archive(tmp_path, "val", {"a": jpegs(0)}, {})
    (tmp_path / "audio_hdf/val_mp3.hdf").write_text("none")
    with pytest.raises(InputError, match=r"val_mp3\.hdf is no HDF5 file"):
        archive_rows.probe(path / "a.row")


def test_pictures_larger_than_asked_are_made_smaller(tmp_path: Path) -> None:
    path = archive(tmp_path, "val", {"a": jpegs(0)}, {"a": mp3(500)})
    as_they_are = archive_rows.read_clip(path / "a.row", video.Preparation(0, 24, 95, RATE, 2))
    assert as_they_are.jpegs == jpegs(0)[::2] and as_they_are.fps == pytest.approx(8.0, rel=0.1)
    smaller = archive_rows.read_clip(path / "a.row", video.Preparation(3, 12, 95, 16000))
    assert (smaller.width, smaller.height, smaller.sample_rate) == (16, 12, 16000)
    assert simplejpeg.decode_jpeg(smaller.jpegs[0]).shape == (12, 16, 3)
    assert smaller.wave is not None and abs(len(smaller.wave) - 16000) < 2000


def test_sound_of_a_row_may_lie_where_the_converter_left_it_or_in_a_file(tmp_path: Path) -> None:
    path = archive(tmp_path, "val", {"a": jpegs(0)}, {"a": mp3(500)})
    before = archive_rows.checksum(path / "a.row")
    (tmp_path / "audio_hdf/val_mp3.hdf").rename(tmp_path / "audio_hdfval_mp3.hdf")
    assert archive_rows.checksum(path / "a.row") == before and archive_rows.probe(path / "a.row").has_audio
    (tmp_path / "audio_hdfval_mp3.hdf").unlink()
    assert not archive_rows.probe(path / "a.row").has_audio and archive_rows.checksum(path / "a.row") != before
    (tmp_path / "audio_mp3/val").mkdir(parents=True)
    (tmp_path / "audio_mp3/val/a.mp3").write_bytes(mp3(500))
    assert archive_rows.probe(path / "a.row").sample_rate == RATE


def test_an_mp3_beside_a_mute_video_is_its_sound(tmp_path: Path, write_clip: Callable[..., Path]) -> None:
    mute, loud = (write_clip(tmp_path / f"videos/train/{name}.mp4", 700, name == "loud") for name in ("mute", "loud"))
    assert not video.probe(mute).has_audio and clip_files.files_of(mute) == [mute]
    sounds = [tmp_path / f"audio_mp3/train/{name}.mp3" for name in ("mute", "loud")]
    sounds[0].parent.mkdir(parents=True)
    for sound in sounds:
        sound.write_bytes(mp3(1300, 44100))
    assert clip_files.files_of(mute) == [mute, sounds[0]] and video.probe(mute).sample_rate == 44100
    heard = [video.read_clip(path, video.Preparation(2, 0, 95, 16000)).wave for path in (mute, loud)]
    peaks = [np.abs(np.fft.rfft(wave[:16000])).argmax() for wave in heard if wave is not None]
    assert abs(peaks[0] - 1300) <= 2 and abs(peaks[1] - 700) <= 2
    sounds[0].write_bytes(b"no sound" * 20)
    with pytest.raises(ClipError, match=r"damaged: the sound mute\.mp3"):
        video.probe(mute)


def test_their_captions_come_with_them(project: Path) -> None:
    found = favd.read(project.parent)
    assert found["path"].tolist()[2] == f"datasets/frame_tsv/test_32frames.img.tsv/{NAMES[2]}.row"
    assert isinstance(found, pd.DataFrame) and favd.captions(found["annotation"][0]) == [f"{NAMES[0]} sounds."]
