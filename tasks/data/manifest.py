"""The manifest: one row for every usable clip of a dataset, in Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from models.family import InputError
from tasks import storage

COLUMNS = [
    "id", "path", "split", "group", "start", "duration", "fps", "frames", "width", "height",
    "has_video", "has_audio", "sample_rate", "silent", "still", "checksum", "annotation",
]  # fmt: skip
SPLITS = ("train", "val", "test")


def manifest_path(dataset: str) -> Path:
    """Where the clean stage leaves the manifest of a dataset."""
    return storage.DATA / dataset / "clean" / "manifest.parquet"


def read(dataset: str) -> pd.DataFrame:
    """The manifest of a dataset, sorted by split and id; `path` is relative to data/<dataset>."""
    path = manifest_path(dataset)
    if not path.is_file():
        raise InputError(f"{path} not found; run `python -m tasks.clean {dataset}` (or dvc repro clean@{dataset})")
    return pd.read_parquet(path)


def write(table: pd.DataFrame, path: Path) -> None:
    """Write the rows sorted by split and id, atomically; the same rows give the same bytes."""
    ordered = table.sort_values(["split", "id"], kind="stable")[COLUMNS].reset_index(drop=True)
    with storage.atomic_file(path) as temporary:
        ordered.to_parquet(temporary, index=False)


def annotations(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The parsed annotation of each row."""
    return [json.loads(text) for text in table["annotation"]]
