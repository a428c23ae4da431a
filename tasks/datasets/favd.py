"""Audible video descriptions as FAVDBench lays them out: metadata/{split}.caption.tsv and what belongs to it, beside the media.

metadata/ lies at the top or in datasets/; its files may lie at the top too. A clip's key is a path of its video or its id,
YouTube id, start and end in milliseconds: videos/{split}/-05wY41ht1s_123000_133000.mp4. Of clips whose video is not there the
prepared row is taken, frame_tsv/{split}_32frames.img.tsv/ID.row (tasks/data/archive_rows.py). Where there is no such metadata,
captions.csv does: a header with caption, split, and path (of the video) or id (videos/{split}/ID.mp4).
FAVDBench's released archives may be the source too, one of them or a folder with several; `download` unpacks them.

An annotation is {"caption": …}, with "captions" where there are several, the first one included, and with "start", "end" (s)
and "asr" where the rows have them. vocab.txt, BERT's list of wordpieces, gives the classes: a line's number from 0 is its id.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from models.family import InputError
from tasks import storage
from tasks.data.clip_files import ROW, VIDEOS
from tasks.data.clip_files import row_id as clip_id
from tasks.datasets import Finding, Review, favd_files
from tasks.datasets.favd_files import SPLITS, Entry

COLUMNS = ["id", "path", "split", "start", "group", "annotation"]
PLACES = ("metadata", "datasets/metadata", ".")
CSV = "captions.csv"
VOCABULARY = "vocab.txt"
VOCABULARIES = (VOCABULARY, f"metadata/{VOCABULARY}", f"captioning/bert-base-uncased/{VOCABULARY}")
RELEASED = {  # by the README of FAVDBench
    "meta.zip": "5b50445f2e3136a83c95b396fc69c84a",
    "metadata.zip": "f03e61e48212132bfd9589c2d8041cb1",
    "audio_mp3.tar": "e2a3eb49edbb21273a4bad0abc32cda7",
    "audio_hdf.tar": "79f09f444ce891b858cb728d2fdcdc1b",
    "frame_tsv.tar": "6c237a72d3a2bbb9d6b6d78ac1b55ba2",
}
EXTRAS = ("start", "end", "asr")  # of a caption
LONGEST = 115  # tokens of a caption that the original writes, [CLS] and [SEP] included


def segment(clip: str, start: float) -> tuple[str, float, float] | None:
    """The YouTube video of a clip, and the seconds of it, as its id tells them."""
    return favd_files.times(clip)


def class_of(annotation: str) -> str | None:
    """None: a description is no class."""
    return None


def row(
    name: str, path: str, split: str, caption: str, others: Sequence[str] = (), **extras: object
) -> dict[str, object]:
    """A row of the table that `read` gives: a clip with a caption, and maybe others; `name` is what the path ends with."""
    if clip_id(path) != name:
        raise ValueError(f"a clip's id is the name of its file: {name!r} is not that of {path!r}")
    told = favd_files.times(name)
    group, start = (told[0], told[1]) if told else (name, _seconds(extras.get("start")))
    values = {"caption": caption} | ({"captions": [caption, *others]} if others else {}) | extras
    return dict(zip(COLUMNS, (name, path, split, start, group, json.dumps(values, ensure_ascii=False)), strict=True))


def _seconds(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def captions(annotation: str) -> list[str]:
    """All captions of a clip."""
    values = json.loads(annotation)
    return values.get("captions", [values["caption"]])


def read(folder: Path) -> pd.DataFrame:
    """One row a clip: id, path (relative to `folder`), split, start (s), group (source video), annotation (JSON)."""
    rows = list(_read_metadata(folder, place) if (place := find_metadata(folder)) else read_csv(folder / CSV, folder))
    seen: set[object] = set()
    for where, clip in rows:
        if clip["id"] in seen:
            raise InputError(f"{where}: clip {clip['id']} is listed twice; keep one of its rows")
        seen.add(clip["id"])
    return pd.DataFrame([clip for _, clip in rows], columns=COLUMNS)


def find_metadata(folder: Path) -> Path | None:
    """Where the caption TSVs lie, None where there are none."""
    places = [folder / place for place in PLACES]
    return next((place for place in places if any(_captions_of(place, split) for split in SPLITS)), None)


def _captions_of(place: Path, split: str) -> Path | None:
    files = [place / f"{split}.{kind}.tsv" for kind in ("caption", "label")]
    return next(filter(Path.is_file, files), None)


def _read_metadata(folder: Path, place: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """File and row, and the clip, of all splits; every split's files are compared first."""
    root = place if place == folder else place.parent
    splits: dict[str, list[Entry]] = {}
    for split in SPLITS:
        if path := _captions_of(place, split):
            splits[split] = favd_files.read_captions(path)
            favd_files.check_alignment(place, split, splits[split])
    for split, entries in splits.items():
        archive = _archive(root, split)
        for entry in entries:
            path = _path_of(folder, root, split, entry.key, archive)
            first, *others = entry.captions
            extras = {name: first[name] for name in EXTRAS if first.get(name) is not None}
            name = clip_id(entry.key)
            yield entry.where, row(name, path, split, first["caption"], [c["caption"] for c in others], **extras)


def _archive(root: Path, split: str) -> Path | None:
    """The prepared pictures of a split, the most of a clip where there are several."""
    counts = {
        int(match[1]): path
        for path in (root / "frame_tsv").glob(f"{split}_*frames.img.tsv")
        if (match := re.fullmatch(rf"{split}_(\d+)frames\.img\.tsv", path.name))
    }
    return counts[max(counts)] if counts else None


def _path_of(folder: Path, root: Path, split: str, key: str, archive: Path | None) -> str:
    """The clip's video, relative to `folder`: the first that is there; else its prepared row; else where it should be."""
    name = clip_id(key)
    key = key.replace("\\", "/")
    suffix = PurePosixPath(key).suffix
    file = f"{name}{suffix if suffix.lower() in VIDEOS else '.mp4'}"
    standard = root / "videos" / split / file
    is_path = not re.match(r"/|[A-Za-z]:", key) and ".." not in PurePosixPath(key).parts and "/" in key
    if is_path and key.endswith(ROW):
        return key
    own = [folder / key, root / key, root / "videos" / key] if is_path else []
    here = next(filter(Path.is_file, [*own, standard, root / split / file, root / file]), None)
    if here is None and archive is not None:
        here = archive / f"{name}{ROW}"
    if here is None:
        here = standard if not is_path or key.startswith(f"{split}/") else folder / key
    return here.relative_to(folder).as_posix()


def read_csv(path: Path, folder: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """File and row, and the clip in `folder`, of captions in CSV; several rows of a clip are several captions of it."""
    clips: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for where, line in csv_rows(path):
        split, key = line["split"], line.get("path") or line.get("id") or ""
        if split not in SPLITS:
            raise InputError(f"{where}: split {split!r} is unknown; write {', '.join(SPLITS)}")
        if not clip_id(key):
            raise InputError(f"{where} names no clip; write its path or its id")
        if line.get("id") and line["id"] != clip_id(key):
            raise InputError(
                f"{where}: id {line['id']!r}, but the file is {key!r}; a clip's id is the name of its file"
            )
        clips.setdefault((split, _path_of(folder, folder, split, key, None)), []).append((where, line["caption"]))
    for (split, video), told in clips.items():
        yield told[0][0], row(clip_id(video), video, split, told[0][1], [caption for _, caption in told[1:]])


def csv_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """("file row n", values by column, stripped) of captions in CSV. InputError for what is no such file."""
    if not path.is_file():
        raise InputError(f"{path} not found, nor metadata/train.caption.tsv beside it; bring the captions")
    try:
        reader = csv.DictReader(path.read_bytes().decode("utf-8-sig").splitlines(keepends=True), strict=True)
        header = set(reader.fieldnames or ())
        if not {"caption", "split"} <= header or not header & {"path", "id"}:
            raise InputError(
                f"{path} row 1: the columns are {reader.fieldnames}; write path (or id), split and caption"
            )
        for number, line in enumerate(reader, 2):
            if None in line or None in line.values():
                raise InputError(f"{path} row {number}: not as many columns as the header has; quote commas")
            yield f"{path} row {number}", {name: " ".join(value.split()) for name, value in line.items()}
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no UTF-8 CSV: {error}; save it as UTF-8 and close its quotes") from None


def write(table: pd.DataFrame, folder: Path) -> None:
    """Write the rows, in their order, as the files of metadata/; splits without a clip have none."""
    for split in SPLITS:
        clips = [
            (_key(split, str(clip["path"])), _captions(str(clip["annotation"])))
            for clip in table[table["split"] == split].to_dict("records")
        ]
        if clips:
            favd_files.write_split(folder / "metadata", split, clips)


def _key(split: str, path: str) -> str:
    """The path, marked where it would read like a key that is relative to videos/."""
    return f"./{path}" if "/" not in path or path.startswith(f"{split}/") else path


def _captions(annotation: str) -> list[dict[str, Any]]:
    values = json.loads(annotation)
    extras = {name: values[name] for name in EXTRAS if name in values}
    return [{"caption": text} | (extras if k == 0 else {}) for k, text in enumerate(captions(annotation))]


# --- the vocabulary --------------------------------------------------------------------------------------------------------


def classes(folder: Path) -> list[str]:
    """The wordpieces of vocab.txt by their id; none where there is no such file."""
    path = next(filter(Path.is_file, (folder / base / v for base in (".", "datasets") for v in VOCABULARIES)), None)
    if path is None:
        return []
    try:
        names = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); bring BERT's own") from None
    for needed in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"):
        if needed not in names:
            raise InputError(f"{path} lacks the wordpiece {needed}; bring BERT's own vocabulary, one wordpiece a line")
    return names


def write_classes(names: Sequence[str], folder: Path) -> None:
    """Write vocab.txt."""
    with storage.atomic_file(folder / "metadata" / VOCABULARY) as temporary:
        temporary.write_bytes("".join(f"{name}\n" for name in names).encode())


# --- what there is to say of them --------------------------------------------------------------------------------------------


def check(table: pd.DataFrame, folder: Path) -> Review:
    """The captions: empty ones, long ones, such as end in the middle of a sentence; source videos in several splits."""
    usable = table[table["reason"] == ""]
    told = [
        (str(clip["id"]), str(clip["split"]), text)
        for clip in usable.to_dict("records")
        for text in captions(str(clip["annotation"]))
    ]
    lines = pd.DataFrame(told, columns=["id", "split", "caption"])
    lines = lines.assign(tokens=[_tokens(text) for _, _, text in told], sentences=[_sentences(t) for _, _, t in told])
    findings = [*_caption_findings(lines), *_source_findings(usable)]
    parts = [(split, lines[lines["split"] == split]) for split in SPLITS if (lines["split"] == split).any()]
    overview = pd.DataFrame(
        [
            (split, part["id"].nunique(), len(part), round(part["tokens"].mean(), 1), int(part["tokens"].max()),
             round(part["sentences"].mean(), 1), f"{(part['tokens'] > LONGEST).mean():.0%}")
            for split, part in parts
        ],
        columns=["split", "clips", "captions", "tokens", "most tokens", "sentences", f"over {LONGEST} tokens"],
    )  # fmt: skip
    return Review(findings, {"What there is": overview}, [])


def _tokens(text: str) -> int:
    """Words and marks with [CLS] and [SEP]: no more than the wordpieces are."""
    return len(re.findall(r"\w+|[^\w\s]", text)) + 2


def _sentences(text: str) -> int:
    return len([part for part in re.split(r"[.!?]+(?:\s+|$)", text) if part.strip()])


def _caption_findings(lines: pd.DataFrame) -> Iterator[Finding]:
    if not (lines["split"] == "train").any():
        yield Finding("error", "", "no usable training clip has a caption; nothing can be learned")
    for line in lines.to_dict("records"):
        text = str(line["caption"]).strip()
        if not text:
            yield Finding("error", line["id"], "the caption is empty")
        elif text[-1] not in ".!?":
            yield Finding("warning", line["id"], f"the caption does not end its last sentence: …{text[-40:]!r}")
    long = lines[lines["tokens"] > LONGEST]
    if len(long):
        yield Finding(
            "warning", "", f"{len(long)} of {len(lines)} captions ({len(long) / len(lines):.0%}) have more than {LONGEST} "
            "tokens; a model that writes no more loses their end, where FAVDBench describes the sound",
        )  # fmt: skip


def _source_findings(table: pd.DataFrame) -> Iterator[Finding]:
    for source, splits in table.groupby("group")["split"].unique().items():
        if len(splits) > 1:
            yield Finding("warning", "", f"clips of the video {source} are in {' and in '.join(sorted(splits))}")
