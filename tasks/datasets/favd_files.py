"""The files of FAVDBench's `metadata/`: how their rows are read, and the same files written.

A TSV has a row a line and beside it X.lineidx, the byte offset of each row, decimal, one a line, and X.lineidx.8b, the same as
little-endian unsigned 64-bit integers. `{split}.caption.tsv` and `{split}.label.tsv` hold a key and [{"caption": …}];
`{split}.img.tsv` a path twice; `{split}.caption.linelist.tsv` row and number of a caption; the JSON is COCO's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.family import InputError
from tasks import storage
from tasks.data.clip_files import row_id as clip_id

SPLITS = ("train", "val", "test")
TIMES = re.compile(r"(?P<source>.+)_(?P<start>\d+)_(?P<end>\d+)", re.ASCII)  # of an id: milliseconds


@dataclass(frozen=True)
class Entry:
    """A row of a caption TSV."""

    where: str  # file and row
    key: str
    captions: list[dict[str, Any]]  # each with "caption", and "start", "end" and "asr" where they are told


def times(name: str) -> tuple[str, float, float] | None:
    """Source video, start and end (s) of an id such as -05wY41ht1s_123000_133000; None where it tells none."""
    match = TIMES.fullmatch(name)
    return (match["source"], int(match["start"]) / 1000, int(match["end"]) / 1000) if match else None


# --- reading ---------------------------------------------------------------------------------------------------------------


def read_rows(path: Path, columns: int) -> list[tuple[str, list[str]]]:
    """("file row n", fields) of each line that is not blank; rows count from 1. InputError names a row of other columns."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    rows = [(f"{path} row {number}", line.split("\t")) for number, line in enumerate(lines, 1) if line.strip()]
    for where, fields in rows:
        if len(fields) != columns:
            raise InputError(f"{where} has {len(fields)} columns, {columns} expected; part them by tabs")
    return rows


def read_captions(path: Path) -> list[Entry]:
    """The rows of a caption TSV; fields in the quotes of CSV are read too. InputError for a row that says no captions."""
    entries = []
    for where, fields in read_rows(path, 2):
        key, text = map(_unquoted, fields)
        try:
            captions = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: the second column is no JSON ({error.msg}); write {_EXAMPLE}") from None
        captions = [captions] if isinstance(captions, dict) else captions
        if not clip_id(key):
            raise InputError(f"{where}: the key {key!r} names no clip; write the path or the id of its video")
        if not isinstance(captions, list) or not captions or not all(map(_is_caption, captions)):
            raise InputError(f"{where}: the second column is no list of captions; write {_EXAMPLE}")
        entries.append(Entry(where, key, captions))
    return entries


_EXAMPLE = '[{"caption": "…"}]'


def _unquoted(field: str) -> str:
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"'
    return field[1:-1].replace('""', '"') if is_quoted else field


def _is_caption(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("caption"), str)


def check_alignment(folder: Path, split: str, entries: Sequence[Entry]) -> None:
    """InputError for the first row of a split's other files that does not fit its caption TSV; files may be missing."""
    for name in (f"{split}.label.tsv", f"{split}.img.tsv"):
        if (folder / name).is_file():
            _check_keys(folder / name, entries)
    if (path := folder / f"{split}.caption.linelist.tsv").is_file():
        _check_lines(path, entries)
    if (path := folder / f"{split}.caption_coco_format.json").is_file():
        _check_coco(path, entries)


def _check_keys(path: Path, entries: Sequence[Entry]) -> None:
    rows = read_rows(path, 2)
    for (where, fields), entry in zip(rows, entries, strict=False):
        if clip_id(_unquoted(fields[0])) != clip_id(entry.key):
            raise InputError(
                f"{where}: key {fields[0]!r}, but {entry.where} has {entry.key!r}; all files of a split must have the "
                "same clips in the same order"
            )
    if len(rows) != len(entries):
        raise InputError(f"{path} has {len(rows)} rows, its captions {len(entries)}; make them the same clips")


def _check_lines(path: Path, entries: Sequence[Entry]) -> None:
    named: set[int] = set()
    for where, fields in read_rows(path, 2):
        if not all(field.isascii() and field.isdigit() for field in fields):
            raise InputError(
                f"{where}: {' '.join(fields)!r} is no row and number of a caption, both from 0; mend the line"
            )
        row, number = map(int, fields)
        if row >= len(entries) or number >= len(entries[row].captions):
            what = f"row {row}" if row >= len(entries) else f"caption {number} of {entries[row].key!r}"
            raise InputError(f"{where} names {what}, which is not in the caption file; delete the line")
        named.add(row)
    if missing := sorted(set(range(len(entries))) - named):
        entry = entries[missing[0]]
        raise InputError(
            f"{path} lacks row {missing[0]}, {entry.where}, key {entry.key!r}; add the line {missing[0]}\t0"
        )


def _check_coco(path: Path, entries: Sequence[Entry]) -> None:
    try:
        content = json.loads(path.read_bytes())
        listed = [str(item["image_id"]) for item in content["annotations"]]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is no COCO file of captions ({type(error).__name__}: {error}); make it again"
        ) from None
    known, there = {clip_id(entry.key) for entry in entries}, set(map(clip_id, listed))
    for number, key in enumerate(listed):
        if clip_id(key) not in known:
            raise InputError(f"{path} annotation {number}: image_id {key!r} is not in the caption file; delete it")
    for entry in entries:
        if clip_id(entry.key) not in there:
            raise InputError(f"{path} lacks {entry.key!r} of {entry.where}; make the file again")


# --- writing ---------------------------------------------------------------------------------------------------------------


def write_split(folder: Path, split: str, clips: Sequence[tuple[str, list[dict[str, Any]]]]) -> None:
    """Write a split's TSVs with their indices, its COCO file and its {split}.yaml from keys and captions."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = [[key, json.dumps(values)] for key, values in clips]
    write_tsv(folder / f"{split}.caption.tsv", captions)
    write_tsv(folder / f"{split}.label.tsv", captions)
    write_tsv(folder / f"{split}.img.tsv", [[key, key] for key, _ in clips])
    numbered = [[str(row), str(number)] for row, (_, values) in enumerate(clips) for number in range(len(values))]
    write_tsv(folder / f"{split}.caption.linelist.tsv", numbered)
    _write_text(folder / f"{split}.caption_coco_format.json", json.dumps(coco(clips), indent=4))
    write_yaml(folder / f"{split}.yaml", split, f"{split}.img.tsv")


def coco(clips: Sequence[tuple[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Captions as COCO's evaluation reads them: a number from 0 for each."""
    pairs = [(key, value["caption"]) for key, values in clips for value in values]
    return {
        "annotations": [{"image_id": key, "caption": caption, "id": k} for k, (key, caption) in enumerate(pairs)],
        "images": [{"id": key, "file_name": key} for key, _ in clips],
        "type": "captions",
        "info": "dummy",
        "licenses": "dummy",
    }


def write_yaml(path: Path, split: str, img: str, audio: str | None = None) -> None:
    """Write the file that names a split's files: those of metadata/ by their name, archives by their path."""
    names = {
        "caption": f"{split}.caption.tsv",
        "caption_coco_format": f"{split}.caption_coco_format.json",
        "caption_linelist": f"{split}.caption.linelist.tsv",
        "img": img,
        "label": f"{split}.label.tsv",
    } | ({"audio": audio} if audio else {})
    _write_text(path, "".join(f"{name}: {value}\n" for name, value in names.items()))


def write_tsv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Write rows as X.tsv with X.lineidx and X.lineidx.8b. InputError for a field that would break the rows."""
    for number, row in enumerate(rows, 1):
        if not all(row) or any(c in field for field in row for c in "\t\n\r"):
            raise InputError(
                f"{path} row {number}: a field of {row!r} is empty or holds a tab or a line break; mend it"
            )
    lines = ["\t".join(row).encode() + b"\n" for row in rows]
    offsets = np.cumsum([0, *map(len, lines)], dtype="<u8")[:-1]
    with storage.atomic_file(path.with_suffix(".lineidx.8b")) as temporary:
        offsets.tofile(temporary)
    _write_text(path.with_suffix(".lineidx"), "".join(f"{offset}\n" for offset in offsets))
    with storage.atomic_file(path) as temporary:
        temporary.write_bytes(b"".join(lines))


def _write_text(path: Path, text: str) -> None:
    with storage.atomic_file(path) as temporary:
        temporary.write_bytes(text.encode())
