"""The audio store: FAVDBench's HDF5 layout, sharded: `audio_name` (clip ids) beside the sound of each row.

The sound's data set is called after its codec: `mp3` and `flac` hold the bytes of such files, `pcm16` holds samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np

from models.family import InputError
from tasks import storage
from tasks.data import audio
from tasks.data.frame_store import read_index, shard_name

CODECS: tuple[audio.Codec, ...] = ("pcm16", "flac", "mp3")


def write_audio(path: Path, rows: Iterable[tuple[str, np.ndarray]], sample_rate: int, codec: audio.Codec) -> int:
    """Write rows of (clip id, (N,) int16) as one HDF5 file, atomically; returns their number."""
    kind = np.int16 if codec == "pcm16" else np.uint8
    with storage.atomic_file(path) as temporary, h5py.File(temporary, "w") as file:
        names = file.create_dataset("audio_name", (0,), h5py.string_dtype(), maxshape=(None,), chunks=(256,))
        sounds = file.create_dataset(codec, (0,), h5py.vlen_dtype(kind), maxshape=(None,), chunks=(16,))
        sounds.attrs["codec"], sounds.attrs["sample_rate"] = codec, sample_rate
        count = 0
        for name, wave in rows:
            names.resize(count + 1, 0)
            sounds.resize(count + 1, 0)
            names[count], sounds[count] = name, audio.encode(wave, sample_rate, codec)
            count += 1
    return count


class AudioShard:
    """One HDF5 file of ours or of FAVDBench ({split}_mp3.hdf); opened anew in each process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: h5py.File | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_file": None}

    def open(self) -> h5py.File:
        """The file; InputError where it is none."""
        if self._file is None:
            try:
                self._file = h5py.File(self.path, "r")
            except OSError as error:
                raise InputError(f"{self.path} is no readable HDF5 file; run the stores stage again ({error})") from None
        return self._file

    def names(self) -> list[str]:
        """Clip ids of the rows."""
        return [name.decode() for name in cast(h5py.Dataset, self.open()["audio_name"])[:]]

    def read(self, number: int) -> tuple[np.ndarray, int]:
        """((N,) float32 in [-1, 1], Hz) of a row."""
        file = self.open()
        codec = next((name for name in CODECS if name in file), None)
        if codec is None:
            raise InputError(f"{self.path} has none of the data sets {', '.join(CODECS)}")
        sounds = cast(h5py.Dataset, file[codec])
        rate = sounds.attrs.get("sample_rate")
        return audio.decode(np.asarray(sounds[number]), None if rate is None else int(cast(int, rate)))


class AudioStore:
    """The shards of a dataset's stores folder, by clip id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = read_index(folder)
        self.index = index[index["has_audio"]].set_index("id")
        self._count = len(list(folder.glob("audio-*.h5")))
        self._shards: dict[int, AudioShard] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}

    def read(self, clip: str) -> tuple[np.ndarray, int]:
        """((N,) float32 in [-1, 1], Hz) of a clip."""
        number = int(self.index.at[clip, "shard"])
        if number not in self._shards:
            self._shards[number] = AudioShard(self.folder / shard_name("audio", number, self._count, "h5"))
        return self._shards[number].read(int(self.index.at[clip, "audio_row"]))
