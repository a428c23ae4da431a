"""The audio store: FAVDBench's HDF5 layout, sharded: `audio_name` (clip ids) beside the sound of each row.

The sound's data set is called after its codec: `mp3` and `flac` hold the bytes of such files, `pcm16` holds samples.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np

from models.family import InputError
from tasks import storage
from tasks.data import audio, index
from tasks.data.frame_store import shard_name
from tasks.data.index import Places, find

CODECS: tuple[audio.Codec, ...] = ("pcm16", "flac", "mp3")
CACHE = 1 << 16  # bytes of what was read that HDF5 keeps of a file; up to 32 MB, times the shards, if it may


class _Disk(io.FileIO):
    """A file whose first write error is kept for `check`: HDF5 that meets one itself cannot even close its file."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """All of the data."""
        view = memoryview(data).cast("B")
        try:
            done = 0
            while self.error is None and done < len(view):
                done += super().write(view[done:]) or 0
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        """As a file does."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def check(self) -> None:
        """Raise the error that HDF5 was spared."""
        if self.error is not None:
            raise OSError(self.error.errno, self.error.strerror, self.name)


@contextmanager
def audio_writer(path: Path, sample_rate: int, codec: audio.Codec) -> Iterator[Callable[[str, np.ndarray], int]]:
    """Appends (clip id, (N,) int16) and gives back the row; the file takes its name when the block ends well."""
    with coded_writer(path, sample_rate, codec) as add:
        yield lambda name, wave: add(name, audio.encode(wave, sample_rate, codec))


@contextmanager
def coded_writer(path: Path, sample_rate: int, codec: audio.Codec) -> Iterator[Callable[[str, np.ndarray], int]]:
    """As audio_writer, of sounds that are in the codec's form already."""
    kind = np.int16 if codec == "pcm16" else np.uint8
    with storage.atomic_file(path) as temporary, _Disk(temporary, "w+") as disk:
        with h5py.File(disk, "w") as file:
            grow: dict[str, Any] = {"maxshape": (None,), "track_times": False}  # no times: same input, same bytes
            names = file.create_dataset("audio_name", (0,), h5py.string_dtype(), chunks=(256,), **grow)
            sounds = file.create_dataset(codec, (0,), h5py.vlen_dtype(kind), chunks=(16,), **grow)
            sounds.attrs["codec"], sounds.attrs["sample_rate"] = codec, sample_rate

            def add(name: str, stored: np.ndarray) -> int:
                row = len(names)
                names.resize(row + 1, 0)
                sounds.resize(row + 1, 0)
                names[row], sounds[row] = name, stored
                disk.check()
                return row

            yield add
        disk.check()


def write_audio(path: Path, rows: Iterable[tuple[str, np.ndarray]], sample_rate: int, codec: audio.Codec) -> int:
    """Write rows of (clip id, (N,) int16) as one HDF5 file, atomically; returns their number."""
    count = 0
    with audio_writer(path, sample_rate, codec) as add:
        for name, wave in rows:
            count = add(name, wave) + 1
    return count


class AudioShard:
    """One HDF5 file of ours or of FAVDBench ({split}_mp3.hdf); opened anew in each process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: h5py.File | None = None
        self._sounds: tuple[h5py.Dataset, int | None] | None = None  # and the Hz that it tells of all
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_file": None, "_sounds": None, "_process": 0}

    def open(self) -> h5py.File:
        """The file; InputError where it is none."""
        if self._file is None or self._process != os.getpid():  # HDF5 does not survive a fork
            try:
                self._file, self._sounds, self._process = h5py.File(self.path, "r"), None, os.getpid()
                limits = self._file.id.get_mdc_config()
                limits.set_initial_size = True
                limits.initial_size = limits.min_size = limits.max_size = CACHE
                self._file.id.set_mdc_config(limits)
            except OSError as error:
                reason = " ".join(str(error).split())
                raise InputError(
                    f"{self.path} is no readable HDF5 file; run the stores stage again ({reason})"
                ) from None
        return self._file

    def names(self) -> list[str]:
        """Clip ids of the rows."""
        return [name.decode() for name in cast(h5py.Dataset, self.open()["audio_name"])[:]]

    def stored(self, number: int) -> tuple[np.ndarray, int | None]:
        """What the file keeps of a row, and the Hz that it tells of all: int16 samples, or uint8 bytes of an mp3 or flac."""
        file = self.open()
        if self._sounds is None:
            codec = next((name for name in CODECS if name in file), None)
            if codec is None:
                raise InputError(f"{self.path} has none of the data sets {', '.join(CODECS)}")
            sounds = cast(h5py.Dataset, file[codec])
            rate = sounds.attrs.get("sample_rate")
            self._sounds = sounds, None if rate is None else int(cast(int, rate))
        sounds, rate = self._sounds
        return np.asarray(sounds[number]), rate

    def read(self, number: int) -> tuple[np.ndarray, int]:
        """((N,) float32 in [-1, 1], Hz) of a row."""
        try:
            return audio.decode(*self.stored(number))
        except (ValueError, OSError) as error:
            raise InputError(f"{self.path} row {number} cannot be decoded: {' '.join(str(error).split())}") from None


class AudioStore:
    """The shards of a dataset's stores folder, by clip id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = index.read(folder)
        self.places = Places(rows)
        self._shard, self._row = rows["shard"].to_numpy(), rows["audio_row"].to_numpy()  # row -1: no sound
        self._count = len(list(folder.glob("audio-*.h5")))
        self._shards: dict[int, AudioShard] = {}

    def __len__(self) -> int:
        return int((self._row >= 0).sum())

    def __contains__(self, clip: str) -> bool:
        return clip in self.places and self._row[self.places[clip]] >= 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}

    def read(self, clip: str) -> tuple[np.ndarray, int]:
        """((N,) float32 in [-1, 1], Hz) of a clip."""
        place = find(self.places, clip, self.folder)
        if self._row[place] < 0:
            raise InputError(f"{self.folder} holds no sound of clip {clip}")
        number = int(self._shard[place])
        if number not in self._shards:
            self._shards[number] = AudioShard(self.folder / shard_name("audio", number, self._count, "h5"))
        return self._shards[number].read(int(self._row[place]))
