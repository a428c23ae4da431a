"""Scores of found segments against the true ones, by ActivityNet's protocol, for all videos and thresholds at once.

Detections of a class are taken from the best score of all videos downwards. Each takes, of the segments of its class in its
video that nobody has yet, the one it overlaps most, if their IoU reaches the threshold: then it is right, otherwise a false
positive. Equal scores count in the order given, equal overlaps in that of the truth; true segments that repeat count once.
A class without true segments has no score, and what was found of it does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from models.segments import Segments, best_first, by_key, overlap, rank_in, sorted_within

CHUNK = 1 << 15  # pairs compared at once
# A false positive is judged by the true segment of any class that it overlaps most (DETAD, Alwassel et al. 2018).
KINDS = ("right", "double detection", "wrong label", "localisation", "confusion", "background")
TOUCHES = 0.1  # IoU below which a detection has met nothing but background


@dataclass(frozen=True)
class Pairs:
    """Detections and true segments that overlap, by detection and then the largest IoU first; (P,) each."""

    found: np.ndarray  # row of the detection
    truth: np.ndarray  # row of the true segment
    iou: np.ndarray


@dataclass(frozen=True)
class Matched:
    """Detections, each right or wrong at every threshold."""

    found: Segments  # by class and then the best first
    truth: Segments  # each once
    counts: np.ndarray  # (V, C) true segments
    thresholds: np.ndarray  # (T,)
    pairs: Pairs  # of one video and class, down to the least threshold
    right: np.ndarray  # (T, N) bool

    @property
    def present(self) -> np.ndarray:
        """Classes that have true segments."""
        return np.flatnonzero(self.counts.sum(0))

    def of_class(self, label: int) -> slice:
        """Where the detections of a class stand."""
        return slice(*np.searchsorted(self.found.label, [label, label + 1]))

    def at(self, t: int) -> Matched:
        """The same with threshold number t alone."""
        return replace(self, thresholds=self.thresholds[t : t + 1], right=self.right[t : t + 1])


def match(found: Segments, truth: Segments, thresholds: Sequence[float], num_videos: int, num_classes: int) -> Matched:
    """Judge every detection at every threshold, which is above 0."""
    found, truth = found[best_first(found.label, found.score)], distinct(truth)
    keys = [segments.video * num_classes + segments.label for segments in (found, truth)]
    counts = np.bincount(keys[1], minlength=num_videos * num_classes).reshape(num_videos, num_classes)
    pairs = overlapping(found, truth, keys[0], keys[1], min(thresholds))
    right = np.zeros((len(thresholds), len(found)), dtype=bool)
    for row, threshold in zip(right, thresholds, strict=True):
        near = pairs.iou >= threshold
        row[_takers(pairs.found[near], pairs.truth[near], len(truth))] = True
    return Matched(found, truth, counts, np.array(thresholds), pairs, right)


def distinct(truth: Segments) -> Segments:
    """Every segment of a video and class once."""
    columns = np.stack([truth.video, truth.label, truth.start, truth.end], 1)
    return truth[np.sort(np.unique(columns, axis=0, return_index=True)[1])]


def overlapping(found: Segments, truth: Segments, found_key: np.ndarray, truth_key: np.ndarray, least: float) -> Pairs:
    """Detections and true segments of equal keys (N,) and (M,) whose IoU is `least` or more, which is above 0."""
    order = by_key(truth_key)
    size = np.bincount(truth_key, minlength=found_key.max(initial=0) + 1)
    begin = size.cumsum() - size
    rows = np.flatnonzero(size[found_key])
    total = size[found_key[rows]].cumsum()
    parts = []
    for part in np.split(rows, np.flatnonzero(np.diff(total // CHUNK)) + 1):
        many = size[found_key[part]]
        a = np.repeat(part, many)
        b = order[np.arange(len(a)) - np.repeat(many.cumsum() - many - begin[found_key[part]], many)]
        touch = np.minimum(found.end[a], truth.end[b]) > np.maximum(found.start[a], truth.start[b])
        a, b = a[touch], b[touch]
        iou = overlap(found.start[a], found.end[a], truth.start[b], truth.end[b])
        near = iou >= least
        parts.append((a[near], b[near], iou[near]))
    a, b, iou = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = sorted_within(a, -iou)
    return Pairs(a[order], b[order], iou[order])


def _takers(found: np.ndarray, truth: np.ndarray, num_truth: int) -> np.ndarray:
    """Detections that get a true segment when each, in order, takes the first of its candidates that is still free.

    All propose at once, each segment keeps the first in order, the others go on to their next candidate (deferred
    acceptance, Gale and Shapley 1962). Since all segments prefer alike there is one stable matching: that of the order.
    """
    place = np.flatnonzero(np.diff(found, prepend=-1))
    stop = np.append(place, len(found))[1:]
    holder = np.empty(num_truth, dtype=np.int64)
    while True:
        rows, wanted = np.arange(len(place)), truth[place]
        holder[wanted[::-1]] = rows[::-1]  # of several values for one place the last is kept
        lost = holder[wanted] != rows
        if not lost.any():
            return found[place]
        place = place + lost
        place, stop = place[place < stop], stop[place < stop]


# --- scores --------------------------------------------------------------------------------------------------------------


def average_precisions(matched: Matched, weights: np.ndarray) -> np.ndarray:
    """(R, T, C) area below precision, made falling, over recall; `weights` (R, V) tell how often each video counts.

    NaN where no true segment of the class counts.
    """
    areas = np.full((len(weights), len(matched.thresholds), matched.counts.shape[1]), np.nan)
    total = weights @ matched.counts
    for label in matched.present:
        with np.errstate(invalid="ignore"):
            for t, (mass, precision) in enumerate(_precisions(matched, label, weights)):
                areas[:, t, label] = (mass * precision).sum(1) / total[:, label]
    return areas


def _precisions(matched: Matched, label: int, weights: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """At each threshold, (R, K) how much each right detection of the class counts, and the best precision from it on."""
    own = matched.of_class(label)
    mass = weights[:, matched.found.video[own]]
    seen = mass.cumsum(1)
    for row in matched.right:
        hits = np.flatnonzero(row[own])
        precision = mass[:, hits].cumsum(1) / np.maximum(seen[:, hits], 1)
        yield mass[:, hits], np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]


def mean_average_precision(matched: Matched) -> Callable[[np.ndarray], np.ndarray]:
    """Mean over classes and thresholds as a statistic of videos for models.metrics.bootstrap."""

    def statistic(weights: np.ndarray) -> np.ndarray:
        areas = average_precisions(matched, weights)
        known = np.isfinite(areas)
        with np.errstate(invalid="ignore"):
            return np.where(known, areas, 0).sum((1, 2)) / known.sum((1, 2))

    return statistic


def precision_curves(matched: Matched, recall: np.ndarray) -> np.ndarray:
    """(T, len(recall)) best precision at such a recall or more, 0 where it is not reached, mean over the classes."""
    once = np.ones((1, len(matched.counts)))
    curves = np.zeros((len(matched.thresholds), len(recall)))
    for label in matched.present:
        needed = np.ceil(recall * matched.counts[:, label].sum() - 1e-9).astype(int)  # so many right detections
        for t, (_, precision) in enumerate(_precisions(matched, label, once)):
            reached = np.append(precision[0], np.zeros(1))
            curves[t] += reached[np.clip(needed - 1, 0, len(reached) - 1)]
    return curves / len(matched.present)


def recalls(matched: Matched, multiples: Sequence[int]) -> np.ndarray:
    """(K, T, C) share of the true segments that one of the best k * n detections reaches, for each k of `multiples`.

    n is how many true segments of the class the video has. NaN where a class has none.
    """
    found, truth, pairs = matched.found, matched.truth, matched.pairs
    key = found.video * matched.counts.shape[1] + found.label
    order, rank = by_key(key), np.empty(len(found), dtype=np.int64)
    rank[order] = rank_in(key[order])
    num, shares = matched.counts[found.video, found.label], []
    for k in multiples:
        kept = (rank < k * num)[pairs.found]
        best = np.zeros(len(truth))
        np.maximum.at(best, pairs.truth[kept], pairs.iou[kept])
        reached = best >= matched.thresholds[:, None]
        shares.append([np.bincount(truth.label, row, matched.counts.shape[1]) for row in reached])
    with np.errstate(invalid="ignore"):
        return np.array(shares) / matched.counts.sum(0)


def error_kinds(matched: Matched, t: int) -> np.ndarray:
    """(N,) which of KINDS each detection is at threshold number t.

    The true segment that a false positive overlaps most decides. IoU at or above the threshold: `double detection` where it
    is of the detection's class, whose segment a better one had, `wrong label` where it is of another. IoU from 0.1 up to
    the threshold: `localisation` and `confusion`. Below: `background`.
    """
    found, truth = matched.found, matched.truth
    pairs = overlapping(found, truth, found.video, truth.video, TOUCHES)
    kinds = np.full(len(found), KINDS.index("background"))
    first = np.flatnonzero(np.diff(pairs.found, prepend=-1))
    row, other = pairs.found[first], truth.label[pairs.truth[first]] != found.label[pairs.found[first]]
    far = pairs.iou[first] < matched.thresholds[t]
    kinds[row] = KINDS.index("double detection") + other + 2 * far
    kinds[matched.right[t]] = KINDS.index("right")
    return kinds


def best_thresholds(matched: Matched, t: int) -> np.ndarray:
    """(C,) scores from which on a class's detections have the highest F1 at threshold number t.

    A class that has no right detection takes that of all classes together. NaN where none has.
    """
    order = np.argsort(-matched.found.score, kind="stable")
    known = order[np.isin(matched.found.label[order], matched.present)]
    total = matched.counts.sum(0)
    chosen = np.full(len(total), _best_cut(matched.found.score[known], matched.right[t][known], total.sum()))
    for label in matched.present:
        own = matched.of_class(label)
        cut = _best_cut(matched.found.score[own], matched.right[t][own], total[label])
        chosen[label] = chosen[label] if np.isnan(cut) else cut
    return chosen


def _best_cut(score: np.ndarray, right: np.ndarray, num_truth: int) -> float:
    """The score, halfway between two detections, above which F1 is best; NaN where nothing is right. The best first."""
    hits = right.cumsum()
    if not right.any():
        return float("nan")
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + num_truth)
    below = np.append(score[1:], 0)
    cut = int(np.where(score > below, f1, -1).argmax())
    return float((score[cut] + below[cut]) / 2)
