"""The manifest: one row for every usable clip of a dataset, in Parquet."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, overload

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from models.family import ClipInfo, InputError
from tasks import storage

COLUMNS = [
    "id", "path", "split", "group", "start", "duration", "fps", "frames", "width", "height",
    "has_video", "has_audio", "sample_rate", "silent", "still", "checksum", "annotation",
]  # fmt: skip
SPLITS = ("train", "val", "test")
BATCH = 10_000  # rows whose digest is taken at once
DIGEST = b"digest"  # in the file's metadata: of all rows, so that later stages can tell whether they had the same
CLASSES = "classes.json"  # beside it: names by id, where the format lists all classes
T = TypeVar("T")


class Column(Sequence[T]):
    """Many rows of text in one buffer, each made into what it means when it is asked for.

    A list would hold an object for each row, and a forked worker its own copy of all: counting references writes to them.
    """

    def __init__(self, texts: pd.Series | pa.Array, make: Callable[[str], T]) -> None:
        self.texts, self.make = packed(texts), make

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, row: int) -> T: ...
    @overload
    def __getitem__(self, row: slice) -> list[T]: ...
    def __getitem__(self, row: int | slice) -> T | list[T]:
        found = self.texts[row]
        return [self.make(text) for text in found.to_pylist()] if isinstance(row, slice) else self.make(found.as_py())


def packed(texts: pd.Series | pa.Array) -> pa.Array:
    """A column of text in one buffer."""
    array = pa.array(texts, pa.large_string())
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def manifest_path(dataset: str) -> Path:
    """Where the clean stage leaves the manifest of a dataset."""
    return storage.DATA / dataset / "clean" / "manifest.parquet"


def read_clean(dataset: str, columns: Sequence[str] | None = None, split: str = "") -> pd.DataFrame:
    """The manifest as the clean stage left it, sorted by split and id; `path` is relative to data/<dataset>.

    `columns` and `split` ask for a part of it: of hundreds of thousands of clips the whole takes its room.
    """
    filters = [("split", "==", split)] if split else None
    with _readable(dataset) as path:
        return pd.read_parquet(path, columns=None if columns is None else list(columns), filters=filters)


def digest(dataset: str) -> str:
    """What tells these rows from all others; of the file only the end is read."""
    with _readable(dataset) as path:
        noted = (pq.read_schema(path).metadata or {}).get(DIGEST)
    if noted is None:
        raise InputError(f"{path} is of an older version of Duet; run the clean stage again")
    return noted.decode()


@contextmanager
def _readable(dataset: str) -> Iterator[Path]:
    """The manifest's path, to be read in the block; InputError where that cannot be done."""
    path = manifest_path(dataset)
    if not path.is_file():
        raise InputError(f"{path} not found; run `python -m tasks.clean {dataset}` (or dvc repro clean@{dataset})")
    try:
        yield path
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no readable Parquet file ({reason}); run the clean stage again") from None


def read(
    dataset: str, features: Path | None = None, columns: Sequence[str] | None = None, split: str = ""
) -> pd.DataFrame:
    """The manifest without the clips that later stages put into quarantine, so that each row can be trained on.

    These are the stores stage and, where its folder is given, the features stage. A part of it has `id` among its columns.
    """
    table = read_clean(dataset, columns, split)
    for folder in filter(None, (storage.DATA / dataset / "stores", features)):
        if lost := quarantined(folder):
            table = table[~table["id"].isin(lost)].reset_index(drop=True)
    return table


def quarantined(folder: Path) -> list[str]:
    """The clips that a later stage has put into quarantine beside what it made."""
    path = folder / "quarantine.csv"
    return pd.read_csv(path, dtype=str, keep_default_na=False)["id"].tolist() if path.is_file() else []


def read_classes(dataset: str) -> list[str]:
    """All classes by their id, none where the dataset's format lists none; names may repeat."""
    path = manifest_path(dataset).with_name(CLASSES)
    return json.loads(path.read_text()) if path.is_file() else []


def write(table: pd.DataFrame, path: Path) -> None:
    """Write the rows sorted by split and id, atomically; the same rows give the same bytes."""
    ordered = table.sort_values(["split", "id"], kind="stable")[COLUMNS]
    rows = pa.Table.from_pandas(ordered, preserve_index=False)
    contents = hashlib.sha256()
    for batch in rows.to_batches(max_chunksize=BATCH):
        contents.update(batch.serialize())
    noted = {**(rows.schema.metadata or {}), DIGEST: contents.hexdigest()}
    with storage.atomic_file(path) as temporary:
        pq.write_table(rows.replace_schema_metadata(noted), temporary)


def annotations(table: pd.DataFrame | pa.RecordBatch) -> Column[dict[str, Any]]:
    """The annotation of each row, parsed when it is asked for."""
    return Column(table["annotation"], json.loads)


def clips(table: pd.DataFrame, split: str) -> list[ClipInfo]:
    """What evaluation knows of the clips of a split, in the order in which they are predicted."""
    rows = table[table["split"] == split]
    return [ClipInfo(*values) for values in zip(rows["id"], rows["group"], annotations(rows), strict=True)]
