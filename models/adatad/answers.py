"""What adatad tells a person about a video: segments, and which to believe; ActivityNet's results file, subtitles, timelines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from models.adatad.config import FinetuneConfig
from models.adatad.detections import detect, true_segments
from models.family import Batch, ClipInfo, Facts, Table
from models.segment_scores import best_thresholds, match

CALIBRATED_AT = 0.5  # IoU in time from which on a detection counts as right for its threshold
TIMELINE = ["clip", "duration", "kind", "label", "start", "end", "score"]


def present(predictions: Batch, facts: Facts) -> list[dict[str, Any]]:
    """The segments of each video, the best first, from starts, ends, scores, classes (V, K) as `detections.padded` makes.

    `segments` lists {"segment": [start, end] in seconds, "label", "score" in [0, 1]}.
    """
    names = facts.labels["label"]
    columns = (predictions[name].tolist() for name in ("starts", "ends", "classes", "scores"))
    return [
        {
            "segments": [
                {"segment": [start, end], "label": names[int(label)], "score": score}
                for start, end, label, score in zip(*video, strict=True)
                if label >= 0
            ]
        }
        for video in zip(*columns, strict=True)
    ]


def calibrate(
    config: FinetuneConfig, facts: Facts, predictions: Mapping[str, np.ndarray], clips: Sequence[ClipInfo]
) -> dict[str, float]:
    """The score from which on each class's detections are best believed: that of the highest F1 on validation videos.

    A class without a right detection takes the threshold of all classes together; 1 where none is right: believe nothing.
    `predictions` are those for windows, see `detect`. Scores of another classifier have no say: raw videos come without.
    """
    labels = facts.labels["label"]
    found, truth = detect(predictions, config), true_segments(clips, labels)
    matched = match(found, truth, (CALIBRATED_AT,), len(clips), len(labels))
    return dict(zip(labels, np.nan_to_num(best_thresholds(matched, 0), nan=1.0).tolist(), strict=True))


def export(answers: Mapping[str, Mapping[str, Any]], facts: Facts) -> dict[str, str | Table]:
    """results.json with every detection, as scorers want it; of each video subtitles and a timeline of what to believe."""
    files: dict[str, str | Table] = {"results.json": json.dumps(results(answers), ensure_ascii=False) + "\n"}
    for name, answer in answers.items():
        believed = [row for row in answer["segments"] if facts.believes(row["label"], row["score"])]
        files[f"{name}.srt"] = subtitles({"segments": believed})
        files[f"{name}.png"] = timeline(name, answer["duration"], believed)
    return files


def timeline(name: str, duration: float, segments: Sequence[Mapping[str, Any]]) -> Table:
    """A video's segments as `Table.plot` timeline takes them."""
    rows = [(name, duration, "found", row["label"], *row["segment"], row["score"]) for row in segments]
    nothing = [(name, duration, "nothing", "", 0.0, 0.0, 0.0)]
    return Table(name, pd.DataFrame(sorted(rows, key=lambda row: row[4:]) or nothing, columns=TIMELINE), "", "timeline")


def results(answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """ActivityNet's results file of answers by video: seconds with 2 decimals, scores with 4.

    The official scorer refuses a file without `version` and `external_data`.
    """
    return {
        "version": "VERSION 1.3",
        "external_data": {},
        "results": {
            video: [
                {
                    "segment": [round(second, 2) for second in row["segment"]],
                    "label": row["label"],
                    "score": round(row["score"], 4),
                }
                for row in answer["segments"]
            ]
            for video, answer in answers.items()
        },
    }


def subtitles(answer: Mapping[str, Any]) -> str:
    """An answer's segments as SRT. Where they overlap, one subtitle lists all that go on, the earliest first.

    A class that goes on twice is named once, with its best score. Segments below a millisecond are not shown.
    """
    rows = [
        (round(1000 * row["segment"][0]), round(1000 * row["segment"][1]), row["label"], row["score"])
        for row in answer["segments"]
    ]
    rows = sorted((row for row in rows if row[0] < row[1]), key=lambda row: (row[0], -row[3], row[2]))
    edges = sorted({edge for row in rows for edge in row[:2]})
    shown: list[tuple[int, int, str]] = []
    for begin, end in pairwise(edges):
        text = _lines([row for row in rows if row[0] <= begin and end <= row[1]])
        if shown and shown[-1][1] == begin and shown[-1][2] == text:
            begin = shown.pop()[0]
        if text:
            shown.append((begin, end, text))
    return "\n".join(
        f"{number}\n{_clock(begin)} --> {_clock(end)}\n{text}\n" for number, (begin, end, text) in enumerate(shown, 1)
    )


def _lines(rows: Sequence[tuple[int, int, str, float]]) -> str:
    """One line a class."""
    best: dict[str, float] = {}
    for _, _, label, score in rows:
        best[label] = max(score, best.get(label, 0.0))
    return "\n".join(f"{label} ({score:.2f})" for label, score in best.items())


def _clock(milliseconds: int) -> str:
    """hh:mm:ss,mmm."""
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02},{rest:03}"
