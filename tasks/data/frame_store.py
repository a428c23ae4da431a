"""The frame store: SwinBERT's TSV of base64 JPEGs, sharded, read by memory map.

A row is `key \\t {"class": -1, "width": w, "height": h} \\t base64 JPEG \\t …`. Beside X.tsv stand X.lineidx (offset of
each row, decimal, one a line) and X.lineidx.8b (the same as little-endian unsigned 64-bit integers).
"""

from __future__ import annotations

import binascii
import json
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pybase64
import simplejpeg

from models.family import InputError
from tasks import storage
from tasks.data import index
from tasks.data.index import Places, find

LINE_END = b"\r\n"
BLOCK = 1 << 16  # bytes that the system maps at once around a page


def write_frames(path: Path, rows: Iterable[tuple[str, int, int, Sequence[bytes]]]) -> int:
    """Write rows of (key, width, height, JPEGs) to `path` (X.tsv) and its two indices; returns the number of rows.

    The TSV takes its name last: where it stands, the store is whole. ValueError for a key that would break the format.
    """
    offsets: list[int] = []
    with storage.atomic_file(path) as temporary:
        with temporary.open("wb") as handle:
            for key, width, height, jpegs in rows:
                if not key or any(c in key for c in "\t\n\r"):
                    raise ValueError(f"key {key!r} is empty or holds a tab or a line break")
                offsets.append(handle.tell())
                size = json.dumps({"class": -1, "width": width, "height": height})
                columns = [key.encode(), size.encode(), *(pybase64.b64encode(jpeg) for jpeg in jpegs)]
                handle.write(b"\t".join(columns) + b"\n")
        with storage.atomic_file(path.with_suffix(".lineidx")) as text:
            text.write_text("".join(f"{offset}\n" for offset in offsets))
        with storage.atomic_file(path.with_suffix(".lineidx.8b")) as binary:
            np.array(offsets, "<u8").tofile(binary)
    return len(offsets)


class FrameShard:
    """One TSV, its rows found through the .lineidx.8b, or through the .lineidx where a foreign store lacks that.

    Or through `offsets`, where its rows begin, of a foreign store that has neither.
    """

    def __init__(self, path: Path, offsets: np.ndarray | None = None) -> None:
        self.path = path
        binary, text = path.with_suffix(".lineidx.8b"), path.with_suffix(".lineidx")
        if offsets is not None:
            self.offsets = offsets
        elif binary.is_file():
            self.offsets = np.memmap(binary, "<u8", "r") if binary.stat().st_size else np.empty(0, "<u8")
        elif text.is_file():
            self.offsets = np.loadtxt(text, dtype="<u8", ndmin=1)
        else:
            raise InputError(f"{path} lacks its {text.name}; build the index again")
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def row(self, number: int) -> tuple[memoryview, list[int]]:
        """A row's bytes, without its line end, and the position after each of its tabs; nothing is copied or decoded."""
        data, start, end = self._span(number)
        tabs, at = [], start
        while (at := data.find(b"\t", at, end) + 1) > 0:
            tabs.append(at - start)
        while end > start and data[end - 1] in LINE_END:
            end -= 1
        return memoryview(data)[start:end], tabs

    def _span(self, number: int) -> tuple[mmap.mmap, int, int]:
        """The whole file, and from where to where in it the row goes."""
        if self._map is None:
            with self.path.open("rb") as handle:  # the map outlives the handle, and a fork
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        end = int(self.offsets[number + 1]) if number + 1 < len(self.offsets) else len(self._map)
        return self._map, int(self.offsets[number]), end

    def key(self, number: int) -> str:
        """The row's key; of the rest of the row, which may be long, nothing is read. ValueError for a row without any."""
        data, start, end = self._span(number)
        tab = data.find(b"\t", start, end)
        if tab < 0:
            raise ValueError(f"{self.path} row {number} has one column")
        return data[start:tab].decode()

    def size(self, number: int) -> tuple[int, int]:
        """Width and height that the row states."""
        view, tabs = self.row(number)
        told = json.loads(bytes(view[tabs[0] : tabs[1] - 1 if len(tabs) > 1 else len(view)]))
        return told["width"], told["height"]

    def forget(self, number: int) -> None:
        """Let go of a row's pages, which stay in the system's cache: else a process grows by all that it ever read."""
        data, start, end = self._span(number)
        first = start // BLOCK * BLOCK
        data.madvise(mmap.MADV_DONTNEED, first, min(-(-end // BLOCK) * BLOCK, len(data)) - first)

    def num_frames(self, number: int) -> int:
        """How many JPEGs the row holds."""
        return len(self.row(number)[1]) - 1

    def jpegs(self, number: int, columns: Sequence[int]) -> list[bytes]:
        """The JPEGs of the chosen columns (0 = the first picture); only these are decoded from base64."""
        view, tabs = self.row(number)
        ends = [*(tab - 1 for tab in tabs[1:]), len(view)]
        try:
            return [pybase64.b64decode(view[tabs[c + 1] : ends[c + 1]], validate=True) for c in columns]
        except (binascii.Error, IndexError):
            raise InputError(f"{self.path} row {number} is damaged; run the stores stage again") from None


class FrameStore:
    """The shards of a dataset's stores folder, by clip id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = index.read(folder)
        self.places = Places(rows)
        self._shard, self._row, self._num_frames = (rows[c].to_numpy() for c in ("shard", "row", "num_frames"))
        self._step = rows["step"].to_numpy() if "step" in rows.schema.names else None
        self._shards: dict[int, FrameShard] = {}
        self._count = len(list(folder.glob("frames-*.tsv")))

    def __len__(self) -> int:
        return len(self.places)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}

    @property
    def ids(self) -> list[str]:
        """Clips in the store, in its order."""
        return list(self.places)

    @property
    def has_steps(self) -> bool:
        """Whether stored frames follow each other at a step in time that is known."""
        return self._step is not None

    def num_frames(self, clip: str) -> int:
        """Stored frames of a clip."""
        return int(self._num_frames[find(self.places, clip, self.folder)])

    def step(self, clip: str) -> float:
        """Seconds from one stored frame of a clip to the next."""
        assert self._step is not None, "frames were stored by their number"
        return float(self._step[find(self.places, clip, self.folder)])

    def read(self, clip: str, columns: Sequence[int]) -> list[bytes]:
        """JPEG bytes of the chosen columns."""
        place = find(self.places, clip, self.folder)
        number = int(self._shard[place])
        if number not in self._shards:
            self._shards[number] = FrameShard(self.folder / shard_name("frames", number, self._count, "tsv"))
        jpegs = self._shards[number].jpegs(int(self._row[place]), columns)
        self._shards[number].forget(int(self._row[place]))
        return jpegs

    def decode(self, clip: str, columns: Sequence[int]) -> np.ndarray:
        """(T, H, W, 3) uint8 RGB of the chosen columns."""
        try:
            return decode_jpegs(self.read(clip, columns))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self.folder}: a picture of clip {clip} is damaged; run the stores stage again"
            ) from None


def decode_jpegs(jpegs: Sequence[bytes]) -> np.ndarray:
    """JPEGs of one size -> (T, H, W, 3) uint8 RGB; one that follows its like is not decoded. ValueError for a damaged one."""
    height, width = map(int, simplejpeg.decode_jpeg_header(jpegs[0])[:2])
    pictures = np.empty((len(jpegs), height, width, 3), np.uint8)
    for k, jpeg in enumerate(jpegs):
        if k and jpeg == jpegs[k - 1]:
            pictures[k] = pictures[k - 1]
        elif simplejpeg.decode_jpeg(jpeg, "RGB", buffer=pictures[k]).shape != (height, width, 3):
            raise ValueError(f"picture {k} has another size than picture 0")
    return pictures


def shard_name(kind: str, number: int, count: int, ending: str) -> str:
    """Such as frames-00000-of-00004.tsv."""
    return f"{kind}-{number:05d}-of-{count:05d}.{ending}"
