"""The manifest: one row for every usable clip of a dataset, in Parquet."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from models.family import ClipInfo, InputError
from tasks import storage

COLUMNS = [
    "id", "path", "split", "group", "start", "duration", "fps", "frames", "width", "height",
    "has_video", "has_audio", "sample_rate", "silent", "still", "checksum", "annotation",
]  # fmt: skip
SPLITS = ("train", "val", "test")


def manifest_path(dataset: str) -> Path:
    """Where the clean stage leaves the manifest of a dataset."""
    return storage.DATA / dataset / "clean" / "manifest.parquet"


def read_clean(dataset: str) -> pd.DataFrame:
    """The manifest as the clean stage left it, sorted by split and id; `path` is relative to data/<dataset>."""
    path = manifest_path(dataset)
    if not path.is_file():
        raise InputError(f"{path} not found; run `python -m tasks.clean {dataset}` (or dvc repro clean@{dataset})")
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no readable Parquet file ({_line(error)}); run the clean stage again") from None


def read(dataset: str) -> pd.DataFrame:
    """The manifest without the clips that the stores stage put into quarantine, so that each row can be trained on."""
    table = read_clean(dataset)
    failed = storage.DATA / dataset / "stores" / "quarantine.csv"
    if not failed.is_file():
        return table
    lost = pd.read_csv(failed, dtype=str, keep_default_na=False)["id"]
    return table[~table["id"].isin(lost)].reset_index(drop=True)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def write(table: pd.DataFrame, path: Path) -> None:
    """Write the rows sorted by split and id, atomically; the same rows give the same bytes."""
    ordered = table.sort_values(["split", "id"], kind="stable")[COLUMNS].reset_index(drop=True)
    with storage.atomic_file(path) as temporary:
        ordered.to_parquet(temporary, index=False)


def annotations(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The parsed annotation of each row."""
    return [json.loads(text) for text in table["annotation"]]


def clips(table: pd.DataFrame, split: str) -> list[ClipInfo]:
    """What evaluation knows of the clips of a split, in the order in which they are predicted."""
    rows = table[table["split"] == split]
    return [ClipInfo(*values) for values in zip(rows["id"], rows["group"], annotations(rows), strict=True)]
