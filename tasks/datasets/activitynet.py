"""Actions in untrimmed videos: ActivityNet's JSON (Caba Heilbron et al. 2015), in which THUMOS-14 goes from hand to hand too.

The one *.json at the top or in annotations/ holds {"database": {ID: {"subset", "duration" (s), "frame" (how many; optional),
"annotations": [{"segment": [start, end] (s), "label"}]}}}. Beside it may lie category_idx.txt, one class a line, and
block_list.txt, one ID a line of videos to leave out. A video is ID.mp4, or has another ending, in videos/, raw_data/video/ or
video/, or in validation/ or test/ as THUMOS-14's archives have it: the first that is there. Elsewhere it is where the entry's
own "path" says. classifier.json, where it lies there too, is what a classifier of whole videos says, as CUHK's scores for
ActivityNet are published: {"results": {ID: [score of each class, in [0, 1]]}, "class": [their names]}, or {"results": {ID:
{LABEL: score}}}. It must know all videos of the test split.

`training` is trained on and `validation` is the test split, as all published numbers have it. Where `testing` has segments,
that is the test split and `validation` is val; else the truth of `testing` is withheld, and its videos are left out.
Segments labelled Ambiguous and exact repetitions are no truth and are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np
import pandas as pd

from models.family import InputError
from tasks import storage
from tasks.datasets import Finding, Review, Severity

ANNOTATIONS, CLASS_MAP, CLASSIFIER = "annotations.json", "category_idx.txt", "classifier.json"
BLOCK_LISTS = ("block_list.txt", "missing_files.txt")
PLACES = ("videos", "raw_data/video", "video", "validation", "test", "TH14_validation_set_mp4", "TH14_test_set_mp4")
ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts")
SUBSETS = ("training", "validation", "testing")
COLUMNS = ["id", "path", "split", "start", "group", "annotation"]
AMBIGUOUS = "Ambiguous"
ODD, WRONG = 0.01, 0.1  # share of a video's duration by which annotation and file may differ: more is odd, is wrong

Segment = tuple[float, float, str]  # start and end in seconds, label


@dataclass(frozen=True)
class Video:
    """An entry of the database, checked."""

    id: str
    subset: str
    duration: float  # seconds
    frame: int | None
    segments: list[Segment]  # as they stand there
    path: str  # "" where the entry names none

    @property
    def truth(self) -> list[Segment]:
        """The segments that count."""
        return [segment for segment in dict.fromkeys(self.segments) if segment[2] != AMBIGUOUS]


def class_of(annotation: str) -> str | None:
    """All classes of a video, such as "CliffDiving, Diving", so that a subset's test classes are trained on; None: no action."""
    return ", ".join(sorted({label for _, _, label in json.loads(annotation)["segments"]})) or None


def row(
    name: str,
    path: str,
    split: str,
    segments: list[Segment],
    duration: float,
    frame: int | None,
    scores: Mapping[str, float] | None = None,
) -> dict[str, object]:
    """A row of the table that `read` gives; `scores` of a classifier of whole videos by label."""
    values = {"segments": [list(segment) for segment in segments], "duration": duration, "frame": frame}
    values |= {} if scores is None else {"class_scores": dict(scores)}
    return dict(zip(COLUMNS, (name, path, split, 0.0, name, json.dumps(values, ensure_ascii=False)), strict=True))


def read(folder: Path) -> pd.DataFrame:
    """One row a video: id, path (relative to `folder`), split, start (0 s), group (the video), annotation (JSON)."""
    videos = read_videos(folder)
    is_told = any(video.subset == "testing" and video.truth for video in videos)
    splits = {"training": "train", "validation": "val" if is_told else "test"} | (
        {"testing": "test"} if is_told else {}
    )
    find, scores = _finder(folder), read_scores(folder, videos)
    rows = []
    for video in (video for video in videos if video.subset in splits):
        split, said = splits[video.subset], scores.get(video.id)
        if scores and split == "test" and said is None:
            path = annotation_file(folder).with_name(CLASSIFIER)
            raise InputError(f"{path}: video {video.id} of the test split has no scores; add them, or delete the file")
        known = video.path or find(video.id)
        rows.append(row(video.id, known, split, video.truth, video.duration, video.frame, said))
    return pd.DataFrame(rows, columns=COLUMNS)


def write(table: pd.DataFrame, folder: Path) -> None:
    """Write the rows, in their order, as annotations.json and category_idx.txt; with `path` where its name does not tell it.

    classifier.json is there where rows have scores: those for classes of these rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    has_val = (table["split"] == "val").any()
    subsets = {"train": "training", "val": "validation", "test": "testing" if has_val else "validation"}
    database, scores, classes = {}, {}, set[str]()
    for clip in table.to_dict("records"):
        known = json.loads(clip["annotation"])
        classes |= {label for _, _, label in known["segments"]} - {AMBIGUOUS}
        entry = {"subset": subsets[clip["split"]], "duration": known["duration"], "frame": known["frame"]}
        entry["annotations"] = [{"segment": [start, end], "label": label} for start, end, label in known["segments"]]
        scores |= {clip["id"]: known["class_scores"]} if "class_scores" in known else {}
        database[clip["id"]] = entry | (
            {} if clip["path"] == f"{PLACES[0]}/{clip['id']}.mp4" else {"path": clip["path"]}
        )
    lines = [f"{json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}" for name, entry in database.items()]
    with storage.atomic_file(folder / ANNOTATIONS) as temporary:
        temporary.write_text('{"database": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
    with storage.atomic_file(folder / CLASS_MAP) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in sorted(classes)), encoding="utf-8")
    if scores:
        kept = {name: {label: own[label] for label in own if label in classes} for name, own in scores.items()}
        with storage.atomic_file(folder / CLASSIFIER) as temporary:
            temporary.write_text(json.dumps({"results": kept}, ensure_ascii=False) + "\n", encoding="utf-8")


# --- files -----------------------------------------------------------------------------------------------------------------


def read_videos(folder: Path) -> list[Video]:
    """The database's entries in their order, without those on the block list. InputError names file, video and segment."""
    path = annotation_file(folder)
    known = read_json(path)
    database = known.get("database") if isinstance(known, dict) else None
    if not isinstance(database, dict) or not database:
        raise InputError(f"{path} has no `database` of videos; it must be in ActivityNet's form")
    blocked = {name for file in BLOCK_LISTS for name in read_lines(path.with_name(file))}
    classes = read_lines(path.with_name(CLASS_MAP))
    return [_video(path, name, entry, classes) for name, entry in database.items() if name not in blocked]


def read_json(path: Path) -> Any:
    """What a file holds; InputError for one that is no JSON, or names something twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{path}: {twice} is listed twice; keep one")
        return dict(pairs)

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {error.lineno} is no JSON ({error.msg}); bring the whole file again") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from None


def read_scores(folder: Path, videos: list[Video]) -> dict[str, dict[str, float]]:
    """Video -> label -> score of classifier.json beside the annotations, none where there is none."""
    path = annotation_file(folder).with_name(CLASSIFIER)
    if not path.is_file():
        return {}
    known = read_json(path)
    told, names = (known.get("results"), known.get("class", [])) if isinstance(known, dict) else (None, [])
    if not isinstance(told, dict) or not told:
        raise InputError(f"{path} has no `results` of videos; it must hold {{video: {{label: score}}}} there")
    labels = {*read_lines(path.with_name(CLASS_MAP)), *(label for video in videos for _, _, label in video.segments)}
    return {video: _scores(f"{path}: video {video}", own, names, labels) for video, own in told.items()}


def _scores(where: str, own: Any, names: list[str], labels: set[str]) -> dict[str, float]:
    """A video's scores by label; `own` may be a list in the order of `names`."""
    if isinstance(own, list) and isinstance(names, list) and len(own) == len(names):
        own = dict(zip(names, own, strict=True))
    if not isinstance(own, dict):
        given = f"{len(own)} scores and `class` not as many names" if isinstance(own, list) else f"{own!r} as scores"
        raise InputError(f"{where} has {given}; write one score for each")
    for label, score in own.items():
        if label not in labels:
            raise InputError(
                f"{where}: {label!r} is none of the {len(labels)} classes of the annotations; mend its name"
            )
        if not _is_number(score) or not 0 <= score <= 1:
            raise InputError(f"{where}: the score of {label!r} is {score!r}; it must lie in [0, 1], as after a softmax")
    return own


def annotation_file(folder: Path) -> Path:
    """The one JSON of the folder, but for a classifier's."""
    listed = [*folder.glob("*.json"), *folder.glob("annotations/*.json")]
    found = sorted(path for path in listed if path.name != CLASSIFIER)
    if len(found) != 1:
        there = f"{len(found)} of them: {', '.join(file.name for file in found)}" if found else "none"
        raise InputError(f"{folder} must hold one .json, at its top or in annotations/; there is {there}; keep one")
    return found[0]


def read_lines(path: Path) -> list[str]:
    """Names, one a line, none where there is no such file; InputError for one that is empty or comes twice."""
    if not path.is_file():
        return []
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    for number, name in enumerate(names, 1):
        if not name or names.index(name) < number - 1:
            raise InputError(
                f"{path} line {number}: {name!r} is {'listed twice' if name else 'empty'}; delete the line"
            )
    return names


def _video(path: Path, name: str, entry: Any, classes: list[str]) -> Video:
    """An entry as it should be."""
    where = f"{path}: video {name}"
    if not name.isprintable() or not name.strip() or any(c in name for c in "/\\"):
        raise InputError(f"{path}: {name!r} is no video's id; write the file's name without its ending")
    if not isinstance(entry, Mapping) or entry.get("subset") not in SUBSETS:
        given = entry.get("subset") if isinstance(entry, Mapping) else None
        raise InputError(f"{where}: subset is {given!r}; write {', '.join(SUBSETS[:-1])} or {SUBSETS[-1]}")
    duration, frame, listed = entry.get("duration"), entry.get("frame"), entry.get("annotations", [])
    if not _is_number(duration) or duration <= 0:
        raise InputError(f"{where}: duration is {duration!r}; write its length in seconds")
    if frame is not None and (not _is_number(frame) or frame < 1 or frame != int(frame)):
        raise InputError(f"{where}: frame is {frame!r}; write how many frames it has, or leave it out")
    if not isinstance(listed, list):
        raise InputError(f"{where}: annotations is a {type(listed).__name__}; write a list")
    own = entry.get("path", "")
    if not isinstance(own, str) or PurePosixPath(own).is_absolute() or ".." in PurePosixPath(own).parts:
        raise InputError(f"{where}: path {own!r} is none below the folder; write it from there on")
    segments = [_segment(f"{where}, segment {k}", item, classes) for k, item in enumerate(listed, 1)]
    frames = None if frame is None else int(frame)
    return Video(name, entry["subset"], float(duration), frames, segments, own)


def _segment(where: str, item: Any, classes: list[str]) -> Segment:
    times, label = (item.get("segment"), item.get("label")) if isinstance(item, Mapping) else (None, None)
    if (
        not isinstance(times, list)
        or len(times) != 2
        or not all(map(_is_number, times))
        or not 0 <= times[0] < times[1]
    ):
        raise InputError(f"{where}: {times!r} is no [start, end] in seconds with 0 <= start < end; mend or delete it")
    if not isinstance(label, str) or not label.strip():
        raise InputError(f"{where}: the label is {label!r}; name the action")
    if classes and label not in classes and label != AMBIGUOUS:
        raise InputError(
            f"{where}: label {label!r} is not among the {len(classes)} classes of {CLASS_MAP}; add it there"
        )
    return float(times[0]), float(times[1]), label


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _finder(folder: Path) -> Callable[[str], str]:
    """find(id) -> path of the video, relative to `folder`; where it should be when there is none."""
    places = [place for place in PLACES if (folder / place).is_dir()] or [PLACES[0]]
    found: dict[str, str] = {}
    for place in places:
        files = [file for file in (folder / place).glob("*.*") if file.suffix.lower() in ENDINGS]
        for file in sorted(files, key=lambda file: (ENDINGS.index(file.suffix.lower()), file.name)):
            found.setdefault(file.stem, f"{place}/{file.name}")
    return lambda name: found.get(name, f"{places[0]}/{name}.mp4")


# --- what the files say to it ------------------------------------------------------------------------------------------------


def check(table: pd.DataFrame, folder: Path) -> Review:
    """The annotations in `folder` against the probed videos that `table` has of them, and what they are like.

    `table` has the columns of `read` and those of the manifest, `reason` where a file cannot be used.
    """
    videos = {video.id: video for video in read_videos(folder)}
    usable = table[table["reason"] == ""]
    findings = list(_class_findings(usable, read_lines(annotation_file(folder).with_name(CLASS_MAP))))
    clips: list[dict[str, Any]] = table.to_dict("records")  # pyright: ignore[reportAssignmentType]
    for clip in clips:
        texts = _video_findings(videos[clip["id"]], clip) if clip["id"] in videos else []
        findings += [Finding(severity, clip["id"], text) for severity, text in texts]
    segments = segment_table(usable)
    tables = {"What there is": overview(usable, segments), "Classes": class_table(segments)}
    return Review(findings, tables, advice(usable, segments))


def segment_table(table: pd.DataFrame) -> pd.DataFrame:
    """A row a segment: split, label, length (s)."""
    rows = [
        (clip["split"], label, end - start)
        for clip in table.to_dict("records")
        for start, end, label in json.loads(clip["annotation"])["segments"]
    ]
    return pd.DataFrame(rows, columns=["split", "label", "length"])


def _class_findings(table: pd.DataFrame, classes: list[str]) -> Iterator[Finding]:
    """What is wrong with the classes as a whole."""
    segments = segment_table(table)
    known = {split: set(rows["label"]) for split, rows in segments.groupby("split")}
    trained = known.get("train", set())
    if not trained:
        yield Finding("error", "", "no usable training video has a segment; nothing can be learned")
    for name in sorted(set(segments["label"]) - trained):
        where = " and ".join(sorted(str(split) for split in known if name in known[split]))
        yield Finding("error", "", f"class {name!r} is annotated in {where} and in no usable training video")
    if lacking := sorted(set(classes) - set(segments["label"])):
        yield Finding("warning", "", f"no usable video shows {', '.join(lacking)} of {CLASS_MAP}")
    if classes != sorted(classes):
        text = f"{CLASS_MAP} is not in alphabetical order, in which classes are numbered here"
        yield Finding("warning", "", f"{text}; weights of a detector that was trained elsewhere keep the file's order")


def _video_findings(video: Video, clip: Mapping[str, Any]) -> Iterator[tuple[Severity, str]]:
    """What is wrong with a video; of a file that cannot be used only that."""
    if clip["reason"]:
        yield "warning", f"its file is not used ({clip['reason']}: {clip['detail']})"
        return
    seconds, fps, frames = clip["duration"], clip["fps"], int(clip["frames"])
    if (apart := abs(video.duration - seconds)) > ODD * seconds + 0.5:
        severity = "error" if apart > WRONG * seconds + 1 else "warning"
        yield severity, f"the annotation says {video.duration:g} s, the file has {seconds:g} s"
    if video.frame and abs(video.frame - frames) > ODD * frames + 1:
        yield "warning", f"the annotation says {video.frame} frames, the file has {frames}: only its times are used"
    if abs(frames / fps - seconds) > ODD * seconds + 0.5:
        yield "warning", f"{frames} frames at {fps:g} a second do not make {seconds:g} s: its frame rate varies"
    for number, (start, end, label) in enumerate(video.segments, 1):
        where = f"segment {number} ({label}, {start:g} to {end:g} s)"
        if start >= seconds:
            yield "error", f"{where} lies after the end of the video at {seconds:g} s"
        elif end > seconds + 1 / fps:
            yield "warning", f"{where} goes on after the end of the video at {seconds:g} s"
    if repeated := len(video.segments) - len(set(video.segments)):
        yield "warning", f"segments that stand there before already: {repeated}; they are left out"
    if unclear := sum(label == AMBIGUOUS for _, _, label in video.segments):
        yield "warning", f"segments labelled {AMBIGUOUS}: {unclear}; they are left out"
    if not video.truth:
        yield "warning", "it has no segment: all of it is background"


def overview(table: pd.DataFrame, segments: pd.DataFrame) -> pd.DataFrame:
    """A row a split: videos, hours, segments, classes, and seconds of the segments' lengths."""
    rows = []
    for split, clips in table.groupby("split"):
        own = segments[segments["split"] == split]
        shares = {f"{share} % of segments last up to (s)": own["length"].quantile(share / 100) for share in (5, 50, 95)}
        hours = clips["duration"].sum() / 3600
        counts = {"videos": len(clips), "hours": hours, "segments": len(own), "classes": own["label"].nunique()}
        rows.append({"split": split, **counts, **shares})
    return pd.DataFrame(rows)


def class_table(segments: pd.DataFrame) -> pd.DataFrame:
    """A row a class: its segments in each split and their median length."""
    counts = pd.crosstab(segments["label"], segments["split"])
    return counts.assign(**{"median length (s)": segments.groupby("label")["length"].median()}).reset_index()


def advice(table: pd.DataFrame, segments: pd.DataFrame) -> list[str]:
    """Values that suit the training segments, and why."""
    lengths = segments.loc[segments["split"] == "train", "length"].to_numpy()
    if not len(lengths):
        return []
    fps, longest = float(table["fps"].median()), float(table["duration"].max())
    step, window, levels = suggest(fps, lengths, longest)
    short, long = np.quantile(lengths, [0.05, 0.99])
    rate = fps / step
    return [
        f"frame_step {step}: at {fps:g} frames a second it gives {rate:.3g} grid steps a second, and all but the shortest "
        f"5 % of segments ({short:.2g} s) span {short * rate:.0f} steps or more.",
        f"window {window}: these are {window / rate:.0f} s, up to four times as long as all but the longest 1 % of segments "
        f"({long:.3g} s = {long * rate:.0f} steps), so that borders are seen from both sides.",
        f"num_levels {levels}: the last level answers for segments of {2 ** (levels + 1)} steps and more.",
    ]


def suggest(fps: float, lengths: np.ndarray, longest: float) -> tuple[int, int, int]:
    """frame_step, window and num_levels for segments of these `lengths` in videos of up to `longest` seconds.

    One segment in twenty may span fewer than 6 grid steps. The first of the levels, whose points answer for up to 4 steps
    to the further border and twice as many on each next level, is as many halvings away from the last as half of a long
    segment takes. A window is 2^k or 3 2^k steps: four long segments, but not more than the longest video.
    """
    short, long = np.quantile(lengths, [0.05, 0.99])
    step = max(1, int(fps * short / 6))
    steps = long * fps / step
    levels = 2 + max(0, math.floor(math.log2(max(steps / 2 / 4, 1))))
    wanted = min(4 * steps, longest * fps / step)
    sizes = sorted(size << k for k in range(30) for size in (16, 24))
    return step, next(size for size in sizes if size >= wanted and size % 2 ** (levels - 1) == 0), levels
