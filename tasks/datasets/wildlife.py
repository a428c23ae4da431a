"""Species and behaviour: train.csv, val.csv and test.csv with the columns `video_path`, `species` and `activity`.

They lie in metadata/ or beside the videos, and a video is `video_path` from that folder on, or from clips/ or videos/ in it, as
MammAlps comes. In the data folder of someone who has prepared clips already they lie in raw/metadata/, and a clip is the pair
processed/video_frames/ID.pt and processed/mel_spectrograms/ID.npy. ID is the `video_path` with _ for / and \\, and without .mp4.

An empty label or -1 says that nobody annotated it. A column `event` names the clips that show the same moment; without one,
clips named as MammAlps names them (Gabeff et al. 2025; S1_C3_E144_V0060_ID1_T1_c0.mp4) belong to their site's event, and
others stand for themselves. val.csv may be missing. Other columns are left alone.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pandas as pd

from models.family import InputError
from tasks import storage

HEADS = ("species", "activity")
HEADER = ["video_path", *HEADS]
SPLITS = ("train", "val", "test")
COLUMNS = ["id", "path", "split", "start", "group", "annotation"]
PLACES = ("metadata", ".", "raw/metadata")
FOLDERS = ("clips", "videos")  # of videos, which paths may leave out
PREPARED = "processed/video_frames"  # the pictures of the layout whose annotations lie in raw/metadata
MAMMALPS = re.compile(r"(?P<site>S\d+)_C\d+_(?P<event>E\d+)_V\d+.*")


def clip_id(video_path: str) -> str:
    """The name of a clip's prepared files without their ending."""
    return re.sub(r"[/\\]", "_", video_path).removesuffix(".mp4")


def class_of(annotation: str) -> str | None:
    """Species and activity in one, such as "red_deer, foraging"; None where neither is known."""
    values = json.loads(annotation)
    known = [values[head] or "not annotated" for head in HEADS]
    return ", ".join(known) if any(values[head] for head in HEADS) else None


def row(
    video_path: str, species: str | None, activity: str | None, split: str, event: str = "", prepared: bool = False
) -> dict[str, object]:
    """A row of the table that `read` gives."""
    name = clip_id(video_path)
    path = f"{PREPARED}/{name}.pt" if prepared else video_path.replace("\\", "/")
    annotation = json.dumps({"species": species, "activity": activity}, ensure_ascii=False)
    return dict(zip(COLUMNS, (name, path, split, 0.0, event or event_of(name, video_path), annotation), strict=True))


def event_of(name: str, video_path: str) -> str:
    """The event that a clip's name tells, else the clip's own id."""
    match = MAMMALPS.fullmatch(PurePosixPath(video_path.replace("\\", "/")).name)
    # Of a prepared clip the name alone is left: folder and file name in one.
    match = match or MAMMALPS.fullmatch(name)
    return f"{match['site']}_{match['event']}" if match else name


def read(folder: Path) -> pd.DataFrame:
    """One row a clip: id, path (relative to `folder`), split, start (s), group (event), annotation (JSON)."""
    place = next((place for place in PLACES if (folder / place / "train.csv").is_file()), None)
    if place is None:
        raise InputError(f"{folder}/metadata/train.csv not found, nor train.csv beside the videos; put the CSVs there")
    rows: list[dict[str, object]] = []
    seen: dict[object, str] = {}
    for split in SPLITS:
        path = folder / place / f"{split}.csv"
        if split == "val" and not path.is_file():
            continue
        for where, fields in _lines(path):
            if place != "raw/metadata":
                fields["video_path"] = _path_of(folder, fields["video_path"])
            made = _row(where, fields, split, prepared=place == "raw/metadata")
            if made["id"] in seen:
                raise InputError(f"{where}: {fields['video_path']} is listed in {seen[made['id']]} too; keep one")
            seen[made["id"]] = where
            rows.append(made)
    return pd.DataFrame(rows, columns=COLUMNS)


def write(table: pd.DataFrame, folder: Path) -> None:
    """Write the rows, in their order, as the three files; with the column `event` where names do not tell the event."""
    prepared = table["path"].str.startswith(f"{PREPARED}/").any()
    paths = [f"{name}.mp4" for name in table["id"]] if prepared else table["path"].tolist()
    told = [event_of(name, path) for name, path in zip(table["id"], paths, strict=True)]
    header = HEADER if told == table["group"].tolist() else [*HEADER, "event"]
    place = folder / ("raw/metadata" if prepared else "metadata")
    place.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        file = place / f"{split}.csv"
        with storage.atomic_file(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerow(header)
            for path, clip in zip(paths, table.to_dict("records"), strict=True):
                if clip["split"] == split:
                    labels = json.loads(clip["annotation"])
                    fields = [path, *(labels[head] or "" for head in HEADS), clip["group"]]
                    writer.writerow(fields[: len(header)])


def _path_of(folder: Path, path: str) -> str:
    """A video's path with the folder that it leaves out, where only there it is a file."""
    told = path.replace("\\", "/")
    tried = [path, *(f"{name}/{told}" for name in FOLDERS)] if path.isprintable() else [path]
    return next((one for one in tried if (folder / one.replace("\\", "/")).is_file()), path)


def _row(where: str, fields: dict[str, str], split: str, prepared: bool) -> dict[str, object]:
    path = fields["video_path"]
    parts = re.split(r"[/\\]", path)
    if not path.strip() or "" in parts or ".." in parts or ":" in parts[0] or not path.isprintable():
        raise InputError(f"{where}: video_path {path!r} is no path below the data's folder; write it from there on")
    species, activity = (None if fields[head] in ("", "-1") else fields[head] for head in HEADS)
    return row(path, species, activity, split, fields.get("event", ""), prepared)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """("file row n", fields by column, without the blanks around labels) of each non-empty line after the header."""
    if not path.is_file():
        raise InputError(f"{path} not found; train.csv and test.csv are needed, val.csv may be missing")
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            lines = [(n, fields) for n, fields in enumerate(csv.reader(handle, strict=True), 1) if fields]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no UTF-8 CSV: {error}; save it as UTF-8 and close its quotes") from None
    header = lines[0][1] if lines else []
    lacking = [name for name in HEADER if name not in header]
    if lacking:
        raise InputError(f"{path} row 1: no column {', '.join(lacking)}; the header is {','.join(HEADER)}")
    for n, fields in lines[1:]:
        if len(fields) != len(header):
            raise InputError(f"{path} row {n} has {len(fields)} columns, the header {len(header)}; quote commas")
        values = dict(zip(header, fields, strict=True))
        yield f"{path} row {n}", values | {key: values[key].strip() for key in (*HEADS, "event") if key in values}
