"""What adatad tells a person about a video: segments, ActivityNet's results file, subtitles, and scores one can trust."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from models.family import Batch, Facts
from models.segment_scores import best_thresholds, match
from models.segments import Segments

CALIBRATED_AT = 0.5  # IoU in time from which on a detection counts as right for its threshold


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


def calibrate(found: Segments, truth: Segments, labels: Sequence[str], num_videos: int) -> dict[str, float]:
    """The score from which on each class's detections are best believed: that of the highest F1 on validation videos.

    A class without a right detection takes the threshold of all classes together; 1 where none is right: believe nothing.
    """
    matched = match(found, truth, (CALIBRATED_AT,), num_videos, len(labels))
    return dict(zip(labels, np.nan_to_num(best_thresholds(matched, 0), nan=1.0).tolist(), strict=True))


def above(answer: Mapping[str, Any], thresholds: Mapping[str, float]) -> dict[str, Any]:
    """The answer with those segments alone whose score reaches the threshold of their class."""
    kept = [row for row in answer["segments"] if row["score"] >= thresholds[row["label"]]]
    return {**answer, "segments": kept}


def results(answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """ActivityNet's results file of answers by video: seconds with 2 decimals, scores with 4."""
    return {
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
        }
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
