"""What videotag tells a person about a video: tags and which to believe, segments of long videos, the original's files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from models import tag_scores
from models.family import Batch, ClipInfo, Facts, InputError, Table
from models.videotag.config import TaggerConfig

TOP = 20  # classes of a clip that are ranked (GAP@20) and listed
UNCALIBRATED = 0.5  # score from which on a tag is believed where nothing tells better
SCHEMA = 1  # of tags.jsonl
SEGMENTS = ("segment_starts", "segment_ends", "segment_classes", "segment_scores")
TIMELINE = ["clip", "duration", "kind", "label", "start", "end", "score"]


def probabilities(logits: np.ndarray, clips: Sequence[ClipInfo], phase: str) -> np.ndarray:
    """(N, C) float64 scores of clips; InputError where the model answers one with NaN."""
    lost = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(lost):
        raise InputError(
            f"the {phase} checkpoint answers clip {clips[lost[0]].id} with NaN: it diverged; train it at a lower lr"
        )
    return expit(logits.astype(np.float64))


def true_tags(clips: Sequence[ClipInfo], num_classes: int) -> np.ndarray:
    """(N, C) bool, which tags each clip has; InputError for one beyond the classes of training."""
    truth = np.zeros((len(clips), num_classes), dtype=bool)
    for row, clip in zip(truth, clips, strict=True):
        for tag in clip.annotation["tags"]:
            if not 0 <= tag < num_classes:
                raise InputError(
                    f"clip {clip.id}: tag {tag} was not in training, whose {num_classes} classes have numbers from 0"
                )
            row[tag] = True
    return truth


def calibrate(
    config: TaggerConfig, facts: Facts, predictions: Mapping[str, np.ndarray], clips: Sequence[ClipInfo]
) -> dict[str, float]:
    """Each tag's threshold (tag_scores.class_thresholds) on validation clips; 1 for all where none has a tag: believe nothing."""
    labels = facts.labels["tag"]
    scores = probabilities(predictions["logits"], clips, "tagger")
    chosen = tag_scores.class_thresholds(scores, true_tags(clips, len(labels)), TOP)
    return dict(zip(labels, np.nan_to_num(chosen, nan=1.0).tolist(), strict=True))


def thresholds(facts: Facts) -> np.ndarray:
    """(C,) the scores from which on tags are believed."""
    return np.array([facts.thresholds.get(label, UNCALIBRATED) for label in facts.labels["tag"]])


def present(predictions: Batch, facts: Facts) -> list[dict[str, Any]]:
    """The tags of each clip, the best first: TOP of them, and whatever more is believed. From logits (B, C).

    `tags` lists {"label", "score" in [0, 1], "id", "decision": is it believed?}; labels are unique, ids the truth. Where the
    model tags segments (`SEGMENTS`; those without length are none), `segments` lists {"segment": [start, end] in seconds,
    "label", "score", "id"} of each.
    """
    labels, scores, cuts = facts.labels["tag"], expit(predictions["logits"].double().numpy()), thresholds(facts)
    num = np.maximum((scores >= cuts).sum(axis=1), min(TOP, len(labels)))
    best = tag_scores.best_tags(scores, int(num.max(initial=1)))
    answers: list[dict[str, Any]] = [
        {"tags": [_tag(labels, tag, row[tag]) | {"decision": bool(row[tag] >= cuts[tag])} for tag in own[:many]]}
        for row, own, many in zip(scores, best.tolist(), num, strict=True)
    ]
    if SEGMENTS[0] in predictions:
        told = {name: predictions[name].numpy() for name in SEGMENTS}
        for row, answer in enumerate(answers):
            answer["segments"] = segments(told, row, labels)
    return answers


def segments(predictions: Mapping[str, np.ndarray], row: int, labels: Sequence[str]) -> list[dict[str, Any]]:
    """The segments of one clip with their tags: starts and ends (N, S), of which some may be padding, classes and scores
    (N, S, K)."""
    columns = (predictions[name][row].tolist() for name in SEGMENTS)
    return [
        {"segment": [start, end], **_tag(labels, int(tag), score)}
        for start, end, tags, scores in zip(*columns, strict=True)
        for tag, score in zip(tags, scores, strict=True)
        if start < end
    ]


def _tag(labels: Sequence[str], tag: int, score: float) -> dict[str, Any]:
    return {"label": labels[tag], "score": float(score), "id": tag}


# --- files -----------------------------------------------------------------------------------------------------------------


def export(answers: Mapping[str, Mapping[str, Any]], facts: Facts) -> dict[str, str | Table]:
    """tags.jsonl, a line a video with all its tags and segments; a timeline of each video that has segments."""
    lines = [json.dumps({"schema": SCHEMA, "video": name, **answers[name]}, ensure_ascii=False) for name in answers]
    files: dict[str, str | Table] = {"tags.jsonl": "".join(line + "\n" for line in lines)}
    for name, answer in answers.items():
        if answer.get("segments"):
            files[f"{name}.png"] = timeline(name, answer["segments"], facts)
    return files


def original(answers: Mapping[str, Mapping[str, Any]], facts: Facts) -> dict[str, str]:
    """result0.json, result1.json, … in the order of the videos, as the original wrote them: names may occur twice.

    Its first key was `'class_id`, with a stray apostrophe that its documents lack; here it is `class_id`.
    """
    return {
        f"result{i}.json": json.dumps([name, *map(_original_tag, answer["tags"][:TOP])], ensure_ascii=False)
        for i, (name, answer) in enumerate(answers.items())
    }


def _original_tag(tag: Mapping[str, Any]) -> dict[str, Any]:
    name = tag["label"].removesuffix(f" #{tag['id']}")  # what tells classes of one name apart
    return {"class_id": tag["id"], "class_name": name, "probability": tag["score"]}


def timeline(name: str, segments: Sequence[Mapping[str, Any]], facts: Facts) -> Table:
    """When the tags of a video are believed, as `Table.plot` timeline takes it."""
    cuts = thresholds(facts)
    believed = [row for row in segments if row["score"] >= cuts[row["id"]]]
    duration = max(row["segment"][1] for row in segments)
    rows = [(name, duration, "found", label, *times, score) for label, times, score in joined(believed)]
    nothing = [(name, duration, "nothing", "", 0.0, 0.0, 0.0)]
    return Table(name, pd.DataFrame(rows or nothing, columns=TIMELINE), "", "timeline")


def joined(segments: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[float], float]]:
    """(label, [start, end], best score) of a tag's neighbouring segments as one, by start."""
    found: list[tuple[str, list[float], float]] = []
    last: dict[str, int] = {}
    for row in sorted(segments, key=lambda row: (row["segment"][0], row["id"])):
        label, (start, end), score = row["label"], row["segment"], row["score"]
        place = last.get(label)
        if place is not None and start <= found[place][1][1]:
            _, (begin, until), best = found[place]
            found[place] = (label, [begin, max(until, end)], max(best, score))
        else:
            last[label] = len(found)
            found.append((label, [start, end], score))
    return found
