"""VGGSound's annotations (Chen et al. 2020): headerless vggsound.csv, or train.csv and test.csv, beside video/.

A clip is the file video/{ytid}_{start:06d}.mp4. vggsound.csv has the columns YouTube id, start second, label, split;
the official split files have {ytid}_{start:06d}.mp4, label. Every field is text: ids may look like numbers or like NA.
Archives of 10,000 clips each, in which the clips go from hand to hand, keep them in folders of their own; `download` brings
them to video/.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path, PurePosixPath

import pandas as pd

from models.family import InputError
from tasks import storage

CSV = "vggsound.csv"
SECONDS = 10.0  # of a clip
SPLITS = ("train", "test")
COLUMNS = ["id", "path", "split", "start", "group", "annotation"]
FILE_NAME = re.compile(r"(?P<ytid>.+)_(?P<start>\d{6})\.mp4")


def clip_id(ytid: str, start: int) -> str:
    """The name that VGGSound gives a clip's file, without its ending."""
    return f"{ytid}_{start:06d}"


def place(name: str) -> str:
    """Where `read` looks for a file that a mirror keeps in another folder."""
    file = PurePosixPath(name).name
    if FILE_NAME.fullmatch(file):
        return f"video/{file}"
    return file if file in (CSV, *(f"{split}.csv" for split in SPLITS)) else name


def segment(clip: str, start: float) -> tuple[str, float, float]:
    """The YouTube video of a clip, and the seconds of it: ten from its start."""
    return clip.rpartition("_")[0], start, start + SECONDS


def class_of(annotation: str) -> str:
    """The sound's name out of the table's annotation column."""
    return json.loads(annotation)["label"]


def read(folder: Path) -> pd.DataFrame:
    """One row a clip: id, path (relative to `folder`), split, start (s), group (source video), annotation (JSON)."""
    rows: list[dict[str, object]] = []
    if (folder / CSV).is_file():
        for where, fields in _lines(folder / CSV, 4):
            ytid, start, label, split = fields
            if split not in SPLITS:
                raise InputError(f"{where}: split {split!r} is unknown; write train or test")
            rows.append(_row(where, ytid, start, label, split))
    elif any((folder / f"{split}.csv").is_file() for split in SPLITS):
        for split in SPLITS:
            for where, (name, label) in _lines(folder / f"{split}.csv", 2):
                match = FILE_NAME.fullmatch(name)
                if match is None:
                    raise InputError(f"{where}: {name!r} is no VGGSound file; it must look like ytid_000030.mp4")
                rows.append(_row(where, match["ytid"], match["start"], label, split))
    else:
        raise InputError(
            f"{folder / CSV} not found, nor {SPLITS[0]}.csv and {SPLITS[1]}.csv beside it; put VGGSound's CSV there"
        )
    table = pd.DataFrame(rows, columns=COLUMNS)
    twice = table.id[table.id.duplicated()]
    if len(twice):
        raise InputError(f"{folder}: clip {twice.iloc[0]} is listed twice; keep one of the rows")
    return table


def write(table: pd.DataFrame, folder: Path) -> None:
    """Write the rows as a headerless vggsound.csv, in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    with storage.atomic_file(folder / CSV) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        for row in table.itertuples():
            writer.writerow([row.group, int(row.start), class_of(str(row.annotation)), row.split])  # pyright: ignore


def row(ytid: str, start: int, label: str, split: str) -> dict[str, object]:
    """A row of the table that `read` gives."""
    name = clip_id(ytid, start)
    annotation = json.dumps({"label": label}, ensure_ascii=False)
    return dict(zip(COLUMNS, (name, f"video/{name}.mp4", split, float(start), ytid, annotation), strict=True))


def _row(where: str, ytid: str, start: str, label: str, split: str) -> dict[str, object]:
    if not re.fullmatch(r"\d+", start, re.ASCII):
        raise InputError(
            f"{where}: start {start!r} is no whole number of seconds; the columns are id, start, label, split"
        )
    if not label.strip():
        raise InputError(f"{where}: the label is empty; name the sound or delete the row")
    if not ytid or "/" in ytid or "\\" in ytid:
        raise InputError(f"{where}: {ytid!r} is no YouTube id; write the id alone, as in its address")
    return row(ytid, int(start), label, split)


def _lines(path: Path, columns: int) -> list[tuple[str, list[str]]]:
    """("file row n", fields) of each non-empty line, the number of fields checked."""
    if not path.is_file():
        raise InputError(f"{path} not found; the official split files come as a pair")
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            lines = [
                (f"{path} row {n}", fields) for n, fields in enumerate(csv.reader(handle, strict=True), 1) if fields
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no UTF-8 CSV: {error}; save it as UTF-8 and close its quotes") from None
    if not lines:
        raise InputError(f"{path} is empty; it needs one row a clip")
    for where, fields in lines:
        if len(fields) != columns:
            raise InputError(f"{where} has {len(fields)} columns, {columns} expected; quote labels that hold commas")
    first = lines[0][1]
    if (columns == 4 and not first[1].isdigit() and first[3] not in SPLITS) or (columns == 2 and "." not in first[0]):
        raise InputError(f"{path} starts with a header ({', '.join(first)}); VGGSound's CSV has none: delete that row")
    return lines
