"""Clips with several tags: the list files of PaddlePaddle's VideoTag (train.list, val.list, test.list) and its label file.

They lie beside the media or in one of PLACES, and all paths go from the data's folder on. A line is a clip; blank lines do not
count, and neither does a label's repetition. What the first field names says what the clip is:
    path.mp4 3 17         a video and the ids of its tags, one or more
    feat.npy 3 17         features of its frames, (T, D), made elsewhere
    folder 120 3 17       a folder of 120 pictures img_00001.jpg, img_00002.jpg, …
Fields stand apart by a space; a path with spaces stands in double quotes, in which "" is a quote, or the fields of its line stand
apart by tabs. train.jsonl, {"path": …, "labels": [3, 17], "num_frames": 120 (of a folder)} a line, and train.csv, with a
header path,labels[,num_frames] and labels like 3 17, say the same; `write` makes lists of them.

The one label*.txt beside the lists or at the top names a class a line; its id is the line's number from 0. Names may repeat,
`clean` warns of those. infer.list has no labels: it is for prediction, and no part of the dataset.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from models.family import InputError
from tasks import storage
from tasks.datasets import Finding, Review

SPLITS = ("train", "val", "test")
COLUMNS = ["id", "path", "split", "start", "group", "annotation"]
PLACES = (
    ".", "lists", "data/dataset/attention_lstm", "data/attention_lstm", "data/dataset/tsn", "data/tsn",
    "dataset/attention_lstm", "dataset/tsn",
)  # fmt: skip
ENDINGS = (".list", ".jsonl", ".csv")
LABELS = "label.txt"
FIRST = "img_00001.jpg"  # of a folder of pictures, as tasks/data/picture_folder.py reads it
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv")
LONGEST = 200  # bytes of an id, which is the name of files
SHOWN = 20  # tags of a table


@dataclass(frozen=True)
class Line:
    """A clip as a list names it."""

    where: str  # file and line
    path: str  # as it stands there
    labels: tuple[int, ...]  # ascending, each once
    num_frames: int | None  # of a folder of pictures


def class_of(annotation: str) -> str | None:
    """The ids of all its tags, such as "3 17"."""
    return " ".join(map(str, json.loads(annotation)["tags"])) or None


def row(name: str, path: str, split: str, tags: Sequence[int], num_frames: int | None = None) -> dict[str, object]:
    """A row of the table that `read` gives; `path` is a folder of pictures where `num_frames` says how many."""
    values = {"tags": sorted(set(tags))} | ({} if num_frames is None else {"num_frames": num_frames})
    media = path if num_frames is None else f"{path}/{FIRST}"
    return dict(zip(COLUMNS, (name, media, split, 0.0, name, json.dumps(values)), strict=True))


def read(folder: Path) -> pd.DataFrame:
    """One row a clip: id, path (relative to `folder`), split, start (0 s), group (the clip), annotation (JSON)."""
    names = classes(folder)
    lines = [(split, line) for split, file in list_files(folder).items() for line in read_lines(file)]
    seen: dict[str, str] = {}
    for _, line in lines:
        if line.path in seen:
            raise InputError(f"{line.where}: {line.path} stands in {seen[line.path]} already; keep one")
        if not line.labels:
            raise InputError(f"{line.where}: {line.path} has no label; name one or more, or delete the line")
        if line.labels[-1] >= len(names):
            raise InputError(f"{line.where}: label {line.labels[-1]}, but the label file ends with {len(names) - 1}")
        seen[line.path] = line.where
    kinds = {_kind(line): line for _, line in lines}
    if len(kinds) > 1:
        kind, line = list(kinds.items())[-1]
        raise InputError(f"{line.where}: {kind} among {next(iter(kinds))}; a dataset holds clips of one kind")
    ids = clip_ids([line.path for _, line in lines])
    rows = [row(ids[line.path], line.path, split, line.labels, line.num_frames) for split, line in lines]
    return pd.DataFrame(rows, columns=COLUMNS)


def write(table: pd.DataFrame, folder: Path) -> None:
    """Write the rows, in their order, as train.list, val.list and test.list at the top; splits without a clip have none."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = [_text(clip) for clip in table[table["split"] == split].to_dict("records")]
        if lines:
            with storage.atomic_file(folder / f"{split}.list") as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _text(clip: dict[Any, Any]) -> str:
    values, path = json.loads(clip["annotation"]), clip["path"]
    fields = [str(tag) for tag in values["tags"]]
    if "num_frames" in values:
        path, fields = str(PurePosixPath(path).parent), [str(values["num_frames"]), *fields]
    quoted = '"' + path.replace('"', '""') + '"' if re.search(r'[\s"]', path) else path
    return " ".join([quoted, *fields])


# --- classes ---------------------------------------------------------------------------------------------------------------


def classes(folder: Path) -> list[str]:
    """The names of the label file by their id."""
    path = label_file(folder)
    names = [line.strip() for line in _read_text(path).rstrip("\n").split("\n")]
    for number, name in enumerate(names, 1):
        if not name or not name.isprintable():
            raise InputError(f"{path} line {number}: {name!r} is no name; a line is a class, and its place is its id")
    return names


def write_classes(names: Sequence[str], folder: Path) -> None:
    """Write the label file."""
    folder.mkdir(parents=True, exist_ok=True)
    with storage.atomic_file(folder / LABELS) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def label_file(folder: Path) -> Path:
    """The one label*.txt beside the lists, or else at the top."""
    beside = next(iter(list_files(folder).values())).parent
    found = sorted(beside.glob("label*.txt")) or sorted(folder.glob("label*.txt"))
    if len(found) != 1:
        there = ", ".join(file.name for file in found) or "none"
        raise InputError(f"{folder} must hold one label*.txt, a class a line; there is {there}; keep one")
    return found[0]


# --- lists -----------------------------------------------------------------------------------------------------------------


def list_files(folder: Path) -> dict[str, Path]:
    """The lists by their split. InputError where there is none to train on, or more than one that may be meant."""
    found = {
        place: files
        for place in PLACES
        if (files := [folder / place / f"{s}{end}" for s in SPLITS for end in ENDINGS])
        and any(map(Path.is_file, files))
    }
    if not found:
        raise InputError(f"{folder}/train.list not found, nor in {', '.join(PLACES[1:])}; put the lists there")
    if len(found) > 1:
        raise InputError(f"{folder}: there are lists in {' and in '.join(found)}; keep those of one dataset")
    splits: dict[str, Path] = {}
    for file in filter(Path.is_file, next(iter(found.values()))):
        if file.stem in splits:
            raise InputError(f"{file} and {splits[file.stem].name} are lists of the same split; keep one")
        splits[file.stem] = file
    return splits


def read_lines(path: Path) -> Iterator[Line]:
    """The clips of a list of any form; of an infer.list without labels. InputError names file and line."""
    text = _read_text(path)
    if path.suffix == ".csv":
        yield from _csv_lines(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path} line {number}"
            yield _json_line(where, line) if path.suffix == ".jsonl" else _list_line(where, line.strip())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _list_line(where: str, text: str) -> Line:
    path, fields = _split(where, text)
    is_folder = _is_folder(path)
    if is_folder and not fields:
        raise InputError(
            f"{where}: {path!r} ends like no video or .npy, and a folder needs its number of pictures; add it"
        )
    numbers = [_number(where, field) for field in fields]
    return _line(where, path, numbers[1:] if is_folder else numbers, numbers[0] if is_folder else None)


def _split(where: str, text: str) -> tuple[str, list[str]]:
    """The path of a line, and its other fields."""
    if match := re.fullmatch(r'"((?:[^"]|"")*)"(?:\s+(.*))?', text):
        return match[1].replace('""', '"'), (match[2] or "").split()
    if text.startswith('"'):
        raise InputError(f"{where}: a quote that is not closed, or more than a space after it; mend the line")
    path, *fields = text.split("\t") if "\t" in text else text.split(" ")
    return path.strip(), " ".join(fields).split()


def _json_line(where: str, text: str) -> Line:
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is no JSON ({error.msg}); a line is one clip") from None
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("path"), str)
        or entry.keys() - {"path", "labels", "num_frames"}
    ):
        raise InputError(f'{where}: write {{"path": …, "labels": [ids]}}, and "num_frames" of a folder of pictures')
    labels, frames = entry.get("labels", []), entry.get("num_frames")
    if not isinstance(labels, list):
        raise InputError(f"{where}: labels is a {type(labels).__name__}; write a list of ids")
    numbers = [_number(where, json.dumps(value)) for value in [*labels, *([] if frames is None else [frames])]]
    return _line(where, entry["path"], numbers[: len(labels)], None if frames is None else numbers[-1])


def _csv_lines(path: Path, text: str) -> Iterator[Line]:
    reader = csv.DictReader(text.splitlines(), strict=True)
    if not reader.fieldnames or not {"path"} <= {*reader.fieldnames} <= {"path", "labels", "num_frames"}:
        raise InputError(
            f"{path} line 1: the header is {reader.fieldnames}; write path,labels or path,labels,num_frames"
        )
    try:
        for entry in reader:
            where = f"{path} line {reader.line_num}"
            if None in entry or None in entry.values():
                raise InputError(f"{where}: not as many columns as the header has; quote commas")
            labels = [_number(where, field) for field in entry.get("labels", "").split()]
            frames = entry.get("num_frames")
            yield _line(where, entry["path"], labels, _number(where, frames) if frames else None)
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num} is no CSV: {error}; close its quotes") from None


def _line(where: str, path: str, labels: Sequence[int], num_frames: int | None) -> Line:
    parts = re.split(r"[/\\]", path)
    if not path.strip() or not path.isprintable() or {"", ".."} & {*parts} or ":" in parts[0]:
        raise InputError(f"{where}: {path!r} is no path below the data's folder; write it from there on")
    clean = PurePosixPath(path.replace("\\", "/")).as_posix()
    if _is_folder(clean) != (num_frames is not None) or num_frames == 0:
        raise InputError(
            f"{where}: {path!r}: a folder of pictures has their number, 1 or more, and nothing else has; mend it"
        )
    return Line(where, clean, tuple(sorted(set(labels))), num_frames)


def _number(where: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise InputError(f"{where}: {text!r} is no id, a whole number from 0; quote a path that has spaces")
    return int(text)


def _is_folder(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() not in (*VIDEOS, ".npy")


def _kind(line: Line) -> str:
    return "features" if line.path.endswith(".npy") else "folders of pictures" if line.num_frames else "videos"


def clip_ids(paths: Sequence[str]) -> dict[str, str]:
    """Path -> id: the path without its ending and with _ for what file names should not have; with a digest where two agree."""
    names = {
        path: re.sub(r"[^\w.-]", "_", path if _is_folder(path) else str(PurePosixPath(path).with_suffix("")))
        for path in paths
    }
    often = Counter(name.casefold() for name in names.values())

    def unique(path: str, name: str) -> str:
        if often[name.casefold()] == 1 and len(name.encode()) <= LONGEST:
            return name
        return (
            f"{name.encode()[-LONGEST + 20 :].decode(errors='ignore')}-{hashlib.sha256(path.encode()).hexdigest()[:12]}"
        )

    return {path: unique(path, name) for path, name in names.items()}


# --- what there is to say of them --------------------------------------------------------------------------------------------


def check(table: pd.DataFrame, folder: Path) -> Review:
    """The tags of the probed clips: names that repeat, tags that nothing is trained on, folders of another length."""
    names = classes(folder)
    usable = table[table["reason"] == ""]
    counts = {
        split: Counter(tag for text in rows["annotation"] for tag in json.loads(text)["tags"])
        for split, rows in usable.groupby("split")
    }
    findings = [*_name_findings(names), *_tag_findings(counts, names), *_folder_findings(usable)]
    tags = pd.DataFrame(
        [(k, name, *(counts.get(split, {}).get(k, 0) for split in SPLITS)) for k, name in enumerate(names)],
        columns=["id", "tag", *SPLITS],
    )
    numbers = [len(json.loads(text)["tags"]) for text in usable["annotation"]]
    overview = pd.DataFrame(
        {
            "clips": [len(usable)],
            "classes": [len(names)],
            "tags a clip": [round(sum(numbers) / max(len(numbers), 1), 2)],
        }
    )
    order = tags.assign(clips=tags[[*SPLITS]].sum(axis=1)).sort_values("clips", ascending=False, kind="stable")
    shown = order.drop(columns="clips")
    tables = {"What there is": overview, "Most frequent tags": shown.head(SHOWN)}
    if len(shown) > SHOWN:
        tables["Rarest tags"] = shown.tail(SHOWN)
    return Review(findings, tables, [])


def _name_findings(names: Sequence[str]) -> Iterator[Finding]:
    for name, count in Counter(names).items():
        if count > 1:
            ids = ", ".join(str(k) for k, other in enumerate(names) if other == name)
            yield Finding("warning", "", f"the ids {ids} have the same name {name!r}; they stay apart, as {name} #ID")


def _tag_findings(counts: dict[Any, Counter[int]], names: Sequence[str]) -> Iterator[Finding]:
    trained = counts.get("train", Counter())
    if not trained:
        yield Finding("error", "", "no usable training clip has a tag; nothing can be learned")
    for split in ("val", "test"):
        if lacking := sorted(set(counts.get(split, ())) - set(trained)):
            shown = ", ".join(f"{names[k]} ({k})" for k in lacking[:SHOWN])
            yield Finding("warning", "", f"{len(lacking)} tags occur in {split} and in no training clip: {shown}")


def _folder_findings(table: pd.DataFrame) -> Iterator[Finding]:
    for clip in table.to_dict("records"):
        told = json.loads(clip["annotation"]).get("num_frames")
        if told is not None and told != int(clip["frames"]):
            yield Finding(
                "warning", clip["id"], f"the list says {told} pictures, the folder has {int(clip['frames'])}: all count"
            )
