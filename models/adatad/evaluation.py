"""What adatad reports on the test split: mean average precision, what goes wrong, and timelines to judge by eye."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from models import metrics, segment_scores
from models.adatad.answers import CALIBRATED_AT, TIMELINE
from models.adatad.detections import FOUND, THRESHOLDS, clip_scores, detect, true_segments
from models.family import ClipInfo, Evaluation, InputError, Results, Table
from models.segment_scores import Matched, mean_average_precision
from models.segments import Segments, from_rows

MULTIPLES = (1, 5)  # of the number of true segments: how many detections a recall counts
MANY = 10  # the same of false positives
RECALL = np.linspace(0, 1, 21)  # where the precision-recall curves are drawn
NUM_TIMELINES, NUM_RANKED = 8, 64  # videos drawn, and those they are chosen from
NUM_NAMED = 5  # detections that an answer puts into words


def evaluate(run: Evaluation) -> Results:
    """Score the test split once: all numbers flat, in [0, 1] unless they are counts."""
    labels, clips = run.facts.labels["label"], run.clips("test")
    truth = true_segments(clips, labels)
    if not len(truth):
        raise InputError("no video of the test split has a segment; evaluation needs some to compare with")
    found, top = detected(run, clips), run.config.classifier_top
    matched = alone = segment_scores.match(found, truth, THRESHOLDS, len(clips), len(labels))
    believed = np.array([run.facts.thresholds.get(label, 0.0) for label in labels])
    kept = found[found.score >= believed[found.label]]  # thresholds are for what the model says alone, as of raw videos
    if top:
        found = detect(run.predict("finetune", "test"), run.config, clip_scores(clips, labels, top))
        matched = segment_scores.match(found, truth, THRESHOLDS, len(clips), len(labels))
    areas = segment_scores.average_precisions(matched, np.ones((1, len(clips))))[0]
    recalls = np.nanmean(segment_scores.recalls(matched, MULTIPLES)[:, :, matched.present], axis=2)
    tables = {
        "map": by_threshold(areas, recalls),
        "per_class": per_class(matched, areas, labels),
        "precision_recall": precision_recall(matched),
        "false_positives": false_positives(matched),
        "timelines": timelines(matched, kept, clips, labels),
        "thresholds": thresholds(alone, believed, labels),
        "predictions": Table("Every video", predictions(clips, found, kept, labels)),
    }
    return Results(numbers(matched, areas, recalls) | intervals(run, matched), tables, [])


def average_map(table: pd.DataFrame) -> Callable[[np.ndarray], np.ndarray]:
    """The headline out of the table `predictions`, as a statistic for models.metrics.bootstrap."""
    truth = [json.loads(text) for text in table["truth"]]
    found = [json.loads(text) for text in table["detections"]]
    labels = sorted({row[2] for rows in truth for row in rows} | {label for groups in found for label in groups})
    index = {label: i for i, label in enumerate(labels)}
    true_rows = [(v, index[label], s, e, 1.0) for v, rows in enumerate(truth) for s, e, label in rows]
    rows = [(v, index[label], *row) for v, groups in enumerate(found) for label, own in groups.items() for row in own]
    return mean_average_precision(
        segment_scores.match(from_rows(rows), from_rows(true_rows), THRESHOLDS, len(table), len(labels))
    )


def detected(run: Evaluation, clips: Sequence[ClipInfo]) -> Segments:
    """The detections of the test videos; InputError where the model answers with NaN."""
    found = run.predict("finetune", "test")
    lost = np.flatnonzero(~np.isfinite([found[name].reshape(len(found["clip"]), -1).sum(1) for name in FOUND]).all(0))
    if len(lost):
        clip = clips[int(found["clip"][lost[0]])].id
        raise InputError(f"the finetune checkpoint answers clip {clip} with NaN: it diverged; train it at a lower lr")
    return detect(found, run.config)


def numbers(matched: Matched, areas: np.ndarray, recalls: np.ndarray) -> dict[str, float]:
    """The flat numbers; `areas` (T, C), `recalls` (K, T)."""
    values = {"map_average": float(np.nanmean(areas))}
    values |= {f"map_{100 * t:.0f}": float(np.nanmean(row)) for t, row in zip(THRESHOLDS, areas, strict=True)}
    middle = THRESHOLDS.index(CALIBRATED_AT)
    values |= {f"recall_at_{k}x": float(row[middle]) for k, row in zip(MULTIPLES, recalls, strict=True)}
    return values | {"num_clips": float(len(matched.counts)), "num_segments": float(len(matched.truth))}


def intervals(run: Evaluation, matched: Matched) -> dict[str, float]:
    """95 % bootstrap intervals of the average mAP and of that at 0.5; videos of one group are drawn together."""
    groups = [clip.group for clip in run.clips("test")]
    statistics = {
        "map_average": mean_average_precision(matched),
        "map_50": mean_average_precision(matched.at(THRESHOLDS.index(0.5))),
    }
    return metrics.intervals(statistics, groups, run.num_bootstrap, run.seed)


# --- tables --------------------------------------------------------------------------------------------------------------


def by_threshold(areas: np.ndarray, recalls: np.ndarray) -> Table:
    """mAP and recall at each tIoU, and their means."""
    frame = pd.DataFrame({"tIoU": [*(f"{t:g}" for t in THRESHOLDS), "mean"]})
    means = np.nanmean(areas, axis=1)
    frame["mAP"] = [*means, means.mean()]
    for k, row in zip(MULTIPLES, recalls, strict=True):
        frame[f"recall@{k}x"] = [*row, row.mean()]
    note = (
        "ActivityNet's protocol: mean over the classes. Recall@kx is the share of true segments met by one of the best "
        "k · n detections of the class in the video, which has n."
    )
    return Table("Mean average precision by overlap asked for", frame, note)


def per_class(matched: Matched, areas: np.ndarray, labels: Sequence[str]) -> Table:
    """Support and average precision of each class."""
    frame = pd.DataFrame({"class": labels, "videos": (matched.counts > 0).sum(0), "segments": matched.counts.sum(0)})
    frame["AP"] = areas.mean(0)
    for threshold, row in zip(THRESHOLDS, areas, strict=True):
        frame[f"AP@{threshold:g}"] = row
    return Table("Per class", frame, "AP is the mean over the tIoUs; empty where the test split lacks the class.")


def precision_recall(matched: Matched) -> Table:
    """The mean curve of the classes at each tIoU."""
    frame = pd.DataFrame({"recall": RECALL})
    for threshold, curve in zip(THRESHOLDS, segment_scores.precision_curves(matched, RECALL), strict=True):
        frame[f"tIoU {threshold:g}"] = curve
    note = "The best precision at such a recall or more, mean over the classes; 0 where a class never gets there."
    return Table("Precision over recall", frame, note, "lines")


def false_positives(matched: Matched) -> Table:
    """Shares of the kinds among the best detections."""
    kinds = segment_scores.error_kinds(matched, THRESHOLDS.index(CALIBRATED_AT))
    total, label = matched.counts.sum(0), matched.found.label
    rank = np.arange(len(label)) - np.searchsorted(label, label)
    frame = pd.DataFrame({"kind": segment_scores.KINDS})
    for many, name in ((1, "best n"), (MANY, f"best {MANY} n")):
        counts = np.bincount(kinds[rank < many * total[label]], minlength=len(segment_scores.KINDS))
        frame[name] = counts / max(counts.sum(), 1)
    note = (
        f"Among the best n and {MANY} n detections of each class, which has n true segments (DETAD). A wrong one is judged "
        "by the true segment that it overlaps most. tIoU 0.5 or more: double detection (of its class; a better one was "
        "there first) or wrong label. From 0.1: localisation (of its class) or confusion. Below: background."
    )
    return Table("What the detections are", frame, note, "bars")


def timelines(matched: Matched, kept: Segments, clips: Sequence[ClipInfo], labels: Sequence[str]) -> Table:
    """Truth and believed detections of some videos that have true segments, from the worst to the best detected."""
    rows = np.flatnonzero(matched.counts.sum(1))
    rows = rows[spread(len(rows), NUM_RANKED)]
    worth = mean_average_precision(matched)(np.eye(len(clips))[rows])
    rows = rows[np.argsort(worth, kind="stable")]
    rows = rows[spread(len(rows), NUM_TIMELINES)]
    names = np.array(labels, dtype=object)
    parts = []
    for video in rows:
        for kind, every in (("truth", matched.truth), ("found", kept)):
            own = every[every.video == video]
            part = pd.DataFrame({"label": names[own.label], "start": own.start, "end": own.end, "score": own.score})
            parts.append(part.sort_values("start", kind="stable").assign(kind=kind, clip=clips[video].id))
            parts[-1]["duration"] = float(clips[video].annotation["duration"])
    note = "From the worst to the best detected of the test videos. Shown is what reaches the threshold of its class below."
    return Table("Timelines", pd.concat(parts)[TIMELINE].reset_index(drop=True), note, "timeline")


def spread(num: int, most: int) -> np.ndarray:
    """Up to `most` of the first `num` numbers, evenly."""
    return np.linspace(0, num - 1, min(num, most)).astype(int)


def thresholds(matched: Matched, cut: np.ndarray, labels: Sequence[str]) -> Table:
    """What one gets who believes the detections from each class's threshold `cut` (C,) on."""
    label, right = matched.found.label, matched.right[THRESHOLDS.index(CALIBRATED_AT)]
    kept = matched.found.score >= cut[label]
    shown, hits = (np.bincount(label[rows], minlength=len(labels)) for rows in (kept, kept & right))
    total = matched.counts.sum(0)
    frame = pd.DataFrame({"class": labels, "threshold": cut})
    with np.errstate(invalid="ignore"):
        frame["precision"], frame["recall"], frame["F1"] = hits / shown, hits / total, 2 * hits / (shown + total)
    note = (
        "The score from which on a class's detections have the best F1 on the validation videos, at tIoU 0.5, and what "
        "that gives on the test videos; without the scores of another classifier. Predictions for raw videos use it too."
    )
    return Table("Scores to believe", frame, note)


def predictions(clips: Sequence[ClipInfo], found: Segments, kept: Segments, labels: Sequence[str]) -> pd.DataFrame:
    """A row a video: truth [[start, end, label], …] and detections {label: [[start, end, score], …]} as JSON, in full.

    `answer` says the best of what reaches the threshold of its class.
    """
    frame = pd.DataFrame({"clip": [clip.id for clip in clips], "group": [clip.group for clip in clips]})
    frame["truth"] = [json.dumps(clip.annotation["segments"], ensure_ascii=False) for clip in clips]
    frame["answer"] = [in_words(kept[kept.video == video], labels) for video in range(len(clips))]
    frame["detections"] = [as_json(found[found.video == video], labels) for video in range(len(clips))]
    return frame


def in_words(own: Segments, labels: Sequence[str]) -> str:
    """One video's best detections, in order of time: `jump 3.2–5.0 s (0.93); run 7.1–9.4 s (0.88)`."""
    best = own[np.argsort(-own.score, kind="stable")[:NUM_NAMED]]
    best = best[np.argsort(best.start, kind="stable")]
    rows = zip(best.label.tolist(), best.start, best.end, best.score, strict=True)
    return "; ".join(f"{labels[label]} {start:.1f}–{end:.1f} s ({score:.2f})" for label, start, end, score in rows)


def as_json(own: Segments, labels: Sequence[str]) -> str:
    """One video's detections by class, with all digits: the headline must come out of them again."""
    groups = {}
    for label in np.unique(own.label).tolist():
        one = own[own.label == label]
        groups[labels[label]] = np.stack([one.start, one.end, one.score], 1).tolist()
    return json.dumps(groups, ensure_ascii=False)
