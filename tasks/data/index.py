"""The index of a stores or features folder: a row for each of its clips, sorted by split and id as the manifest's are.

It is an Arrow file that is mapped into memory and not read: opening it takes as long for a million clips as for ten, and
all processes on a machine share its pages. A digest in it tells of which manifest its clips are.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa

from models.family import InputError
from tasks import storage
from tasks.data import manifest

INDEX = "index.arrow"
DIGEST = b"manifest"


def write(table: pd.DataFrame, folder: Path, digest: str) -> None:
    """Write rows of the manifest that has this digest, in its order; the same rows give the same bytes."""
    found = pa.Table.from_pandas(table, preserve_index=False).combine_chunks()
    columns = [column.chunk(0) for column in found.columns]  # one batch, so that a row is found by its number
    rows = pa.record_batch(columns, found.column_names, metadata={DIGEST: digest})
    with storage.atomic_file(folder / INDEX) as temporary, pa.ipc.new_file(str(temporary), rows.schema) as file:
        file.write(rows)


def read(folder: Path, remedy: str = "run the stores stage again") -> pa.RecordBatch:
    """The rows, still on disk; InputError, which says what to do, where the folder has no index of this form."""
    path = folder / INDEX
    if not path.is_file():
        raise InputError(f"{path} not found; {remedy}")
    try:
        rows = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no readable Arrow file ({' '.join(str(error).split())}); {remedy}") from None
    return rows


def check(rows: pa.RecordBatch, folder: Path, dataset: str, remedy: str) -> None:
    """InputError where an index's clips are not of the manifest as it stands."""
    if (rows.schema.metadata or {}).get(DIGEST) != manifest.digest(dataset).encode():
        raise InputError(f"{folder} was made of another manifest than {manifest.manifest_path(dataset)}; {remedy}")


def of_split(rows: pa.RecordBatch, split: str) -> pa.RecordBatch:
    """The rows of a split, in the manifest's order; nothing is copied."""
    first, last = _ends(rows, split)
    return rows.slice(first, last - first)


class Places(Mapping[str, int]):
    """The row of each id, found by halving: a dict would hold an object for each id, in each worker anew."""

    def __init__(self, rows: pa.RecordBatch) -> None:
        self._ids = rows["id"]
        self._splits = [_ends(rows, split) for split in manifest.SPLITS]

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids.to_pylist())

    def __getitem__(self, clip: str) -> int:
        for first, last in self._splits:
            place = bisect_left(self._ids, clip, first, last, key=_text)
            if place < last and _text(self._ids[place]) == clip:
                return place
        raise KeyError(clip)


def find(places: Mapping[str, int], clip: str, folder: Path) -> int:
    """A clip's row in the index; InputError where the folder lacks it."""
    try:
        return places[clip]
    except KeyError:
        raise InputError(f"{folder} holds no clip {clip}; run the stores stage again") from None


def _ends(rows: pa.RecordBatch, split: str) -> tuple[int, int]:
    """Where the rows of a split begin and where they end."""
    names = rows["split"]
    return bisect_left(names, split, key=_text), bisect_right(names, split, key=_text)


def _text(value: pa.Scalar) -> str:
    return value.as_py()
