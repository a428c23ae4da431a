"""The audio store, against plain h5py and what went in."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import av
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.family import InputError
from tasks.data import audio, index
from tasks.data.audio_store import AudioShard, AudioStore, write_audio


def tone(seconds: float, pitch: float, rate: int = 16000) -> np.ndarray:
    return np.round(9000 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.int16)


WAVES = [("a", tone(1.0, 440)), ("b,ä", tone(0.37, 1000)), ("c", np.arange(-32768, 32767, 7).astype(np.int16))]


@pytest.mark.parametrize("codec", ["pcm16", "flac"])
def test_lossless_round_trip(tmp_path: Path, codec: audio.Codec) -> None:
    assert write_audio(tmp_path / "X.h5", WAVES, 16000, codec) == 3
    shard = AudioShard(tmp_path / "X.h5")
    assert shard.names() == [name for name, _ in WAVES]
    for number, (_, wave) in enumerate(WAVES):
        back, rate = shard.read(number)
        assert rate == 16000 and back.dtype == np.float32
        assert np.array_equal(np.round(back * 32768).astype(np.int16), wave)


@given(wave=hnp.arrays(np.int16, st.integers(1, 5000), elements=st.integers(-32768, 32767)))
@settings(max_examples=25, deadline=None)
def test_flac_keeps_every_sample(wave: np.ndarray) -> None:
    back, rate = audio.decode(audio.encode(wave, 16000, "flac"), None)
    assert rate == 16000
    assert np.array_equal(np.round(back * 32768).astype(np.int16), wave)


def test_mp3_is_close(tmp_path: Path) -> None:
    write_audio(tmp_path / "X.h5", WAVES[:1], 16000, "mp3")
    back, rate = AudioShard(tmp_path / "X.h5").read(0)
    assert rate == 16000 and abs(len(back) - 16000) < 1200
    spectrum = np.abs(np.fft.rfft(back[2000:10000]))
    assert spectrum.argmax() == 220  # 440 Hz in half a second
    assert np.sqrt(np.mean(back[2000:10000] ** 2)) == pytest.approx(9000 / 32768 / np.sqrt(2), rel=0.05)


def test_layout_is_favdbenchs(tmp_path: Path) -> None:
    write_audio(tmp_path / "X.h5", WAVES, 32000, "mp3")
    with h5py.File(tmp_path / "X.h5") as file:
        assert set(file) == {"audio_name", "mp3"}
        assert [name.decode() for name in file["audio_name"][:]] == [name for name, _ in WAVES]
        assert h5py.check_vlen_dtype(file["mp3"].dtype) == np.uint8
        with av.open(io.BytesIO(file["mp3"][0].tobytes())) as container:
            assert container.format.name == "mp3" and container.streams.audio[0].rate == 32000


def test_a_file_of_favdbenchs_own(tmp_path: Path) -> None:
    """As their convert_h5py writes it: two data sets, no attribute."""
    encoded = audio.encode(tone(1.0, 500, 32000), 32000, "mp3")
    with h5py.File(tmp_path / "test_mp3.hdf", "w") as file:
        file.create_dataset("audio_name", data=["x_1_2"], dtype=h5py.string_dtype())
        file.create_dataset("mp3", (1,), h5py.vlen_dtype(np.uint8))[0] = encoded
    shard = AudioShard(tmp_path / "test_mp3.hdf")
    wave, rate = shard.read(0)
    assert shard.names() == ["x_1_2"] and rate == 32000 and abs(len(wave) - 32000) < 2400


@pytest.mark.parametrize("codec", ["pcm16", "flac", "mp3"])
def test_same_input_same_bytes(tmp_path: Path, codec: audio.Codec) -> None:
    write_audio(tmp_path / "a.h5", WAVES, 16000, codec)
    write_audio(tmp_path / "b.h5", WAVES, 16000, codec)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@pytest.fixture
def store(tmp_path: Path) -> AudioStore:
    write_audio(tmp_path / "audio-00000-of-00001.h5", WAVES, 16000, "pcm16")
    rows = [("mute", "test", 0, -1), *((name, "train", 0, k) for k, (name, _) in enumerate(WAVES))]
    index.write(pd.DataFrame(rows, columns=["id", "split", "shard", "audio_row"]), tmp_path, "")
    return AudioStore(tmp_path)


def test_clips_by_name(store: AudioStore) -> None:
    assert len(store) == 3
    wave, rate = store.read("b,ä")
    assert rate == 16000 and np.array_equal(np.round(wave * 32768), WAVES[1][1])
    with pytest.raises(InputError, match="holds no sound of clip mute"):
        store.read("mute")
    with pytest.raises(InputError, match="holds no clip nobody"):
        store.read("nobody")
    assert [name in store for name in ("a", "mute", "nobody")] == [True, False, False]


def read_length(store: AudioStore, clip: str) -> int:
    return len(store.read(clip)[0])


def test_an_open_store_survives_fork_and_pickling(store: AudioStore) -> None:
    assert read_length(store, "a") == 16000
    with multiprocessing.get_context("fork").Pool(2) as pool:
        lengths = pool.starmap(read_length, [(store, name) for name, _ in WAVES] * 4)
    assert lengths == [len(wave) for _, wave in WAVES] * 4
    assert read_length(pickle.loads(pickle.dumps(store)), "c") == len(WAVES[2][1])


def test_damage_is_named(store: AudioStore) -> None:
    path = store.folder / "audio-00000-of-00001.h5"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"audio-00000-of-00001.h5 is no readable HDF5 file"):
        store.read("a")


def test_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    code = (
        "import numpy as np\nfrom pathlib import Path\nfrom tasks import command\n"
        "from tasks.data.audio_store import write_audio\n"
        "rows = [(str(k), np.ones(9000, np.int16)) for k in range(20)]\n"
        f"command.run(lambda: write_audio(Path({str(tmp_path)!r}) / 'X.h5', rows, 16000, 'pcm16'))"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (90000, 90000))  # noqa: E731
    done = subprocess.run([sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: no space left") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
