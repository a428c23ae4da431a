"""Scores of tags: of every clip each class has a score of its own in [0, 1], and any number of classes are right.

`scores` are (N, C) floats, `truth` (N, C) bool. Hit@1, PERR and GAP are those of YouTube-8M (Abu-El-Haija et al. 2016). Equal
scores: within a clip the class of the lower number comes first; where the pairs of many clips are ranked, all of one score
come in together, and precision is taken after the last of them. So nothing depends on the order of clips or on batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CHUNK = 1 << 22  # numbers looked at together
FEW = 20  # right clips below which a class's own threshold counts in part


@dataclass(frozen=True)
class Pairs:
    """A clip and a class each, (P,)."""

    clip: np.ndarray  # row, from 0
    label: np.ndarray  # class, from 0
    score: np.ndarray
    hit: np.ndarray  # bool: is the class right?


# --- the best classes of a clip --------------------------------------------------------------------------------------------


def best_tags(scores: np.ndarray, k: int) -> np.ndarray:
    """(N, min(k, C)) classes of each clip, the best first."""
    k = min(k, scores.shape[1])
    if k == scores.shape[1]:
        return np.argsort(-scores, axis=1, kind="stable")
    chosen = np.empty((len(scores), k), dtype=np.int64)
    step = max(1, CHUNK // scores.shape[1])
    for start in range(0, len(scores), step):
        chosen[start : start + step] = _best_of_many(scores[start : start + step], k)
    return chosen


def _best_of_many(scores: np.ndarray, k: int) -> np.ndarray:
    """The same for k < C, without ranking what is not among them."""
    lowest = np.partition(scores, -k, axis=1)[:, -k, None]
    chosen = scores >= lowest
    torn = np.flatnonzero(np.count_nonzero(chosen, axis=1) != k)  # equal scores on both sides of the cut
    chosen[torn] = np.arange(scores.shape[1]) < k  # whichever, for now
    found = np.nonzero(chosen)[1].reshape(-1, k)
    values = np.take_along_axis(scores, found, axis=1)
    found = np.take_along_axis(found, np.argsort(-values, axis=1, kind="stable"), axis=1)
    found[torn] = np.argsort(-scores[torn], axis=1, kind="stable")[:, :k]
    return found


def top_pairs(scores: np.ndarray, truth: np.ndarray, k: int) -> Pairs:
    """Each clip with its k best classes, clip by clip, the best first."""
    labels = best_tags(scores, k)
    score, hit = (np.take_along_axis(values, labels, axis=1).ravel() for values in (scores, truth))
    return Pairs(np.repeat(np.arange(len(labels)), labels.shape[1]), labels.ravel(), score, hit)


def hits_at(scores: np.ndarray, truth: np.ndarray, k: int) -> np.ndarray:
    """(N,) bool: is one of the k best classes right? Hit@1 is the mean for k = 1."""
    return np.take_along_axis(truth, best_tags(scores, k), axis=1).sum(axis=1) > 0


def equal_recall_precision(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(N,) share of right ones among as many best classes as a clip has right ones; 0 where it has none. PERR is the mean.

    A class of score 0 was not answered, hence is not right.
    """
    num = truth.sum(axis=1)
    best = best_tags(scores, int(num.max(initial=0)) or 1)
    right = np.take_along_axis(truth & (scores > 0), best, axis=1)
    counted = np.arange(best.shape[1]) < num[:, None]
    return (right & counted).sum(axis=1) / np.maximum(num, 1)


# --- precision over ranked pairs -------------------------------------------------------------------------------------------


def ranked(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P,) places from the best score to the worst, and (G,) where, in that order, each run of equal scores ends."""
    order = np.argsort(-score)
    return order, np.flatnonzero(np.diff(score[order], append=np.nan) != 0)


def precision_sum(score: np.ndarray, hit: np.ndarray) -> float:
    """Sum of the precision at each hit of (P,) pairs: average precision times the number of right ones."""
    order, ends = ranked(score)
    hits = hit[order].cumsum()[ends]
    return float((np.diff(hits, prepend=0) * (hits / (ends + 1))).sum())


def average_precisions(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(C,) average precision of each class over all clips; NaN where it is right for none."""
    support = truth.sum(axis=0)
    areas = np.full(len(support), np.nan)
    for label in np.flatnonzero(support):
        areas[label] = precision_sum(scores[:, label], truth[:, label]) / support[label]
    return areas


def pooled_average_precisions(pairs: Pairs, support: np.ndarray) -> np.ndarray:
    """(C,) the same over a class's pairs alone, as YouTube-8M has it: what was not ranked among a clip's best is missed.

    `support` (C,) counts the clips for which each class is right.
    """
    order = np.argsort(pairs.label, kind="stable")
    place = np.searchsorted(pairs.label[order], np.arange(len(support) + 1))
    areas = np.full(len(support), np.nan)
    for label in np.flatnonzero(support):
        own = order[place[label] : place[label + 1]]
        areas[label] = precision_sum(pairs.score[own], pairs.hit[own]) / support[label]
    return areas


def precision_curve(pairs: Pairs, num_right: int, recall: np.ndarray) -> np.ndarray:
    """Best precision over all pairs at such a recall (of `num_right`) or more; 0 where they do not reach it."""
    order, ends = ranked(pairs.score)
    hits = pairs.hit[order].cumsum()[ends]
    best = np.maximum.accumulate((hits / (ends + 1))[::-1])[::-1]
    place = np.searchsorted(hits, np.ceil(recall * num_right - 1e-9))
    return np.append(best, 0)[place]


class GlobalPrecision:
    """GAP@k of any number of clips: of each only the scores of its k best classes, and whether they are right, are kept."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.score: list[np.ndarray] = []
        self.hit: list[np.ndarray] = []
        self.num_right = 0

    def update(self, scores: np.ndarray, truth: np.ndarray) -> None:
        """Take some clips."""
        pairs = top_pairs(scores, truth, self.k)
        self.score.append(pairs.score)
        self.hit.append(pairs.hit)
        self.num_right += int(truth.sum())

    def compute(self) -> float:
        """Below 1 where a clip has more than k right classes; 0 where none has any."""
        if not self.num_right:
            return 0.0
        return precision_sum(np.concatenate(self.score), np.concatenate(self.hit)) / self.num_right


def weighted_gap(pairs: Pairs, num_right: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """GAP as a statistic of clips for models.metrics.bootstrap; (N,) `num_right` classes of each."""
    order, ends = ranked(pairs.score)
    clip, hit = pairs.clip[order], pairs.hit[order]

    def statistic(weights: np.ndarray) -> np.ndarray:
        areas = np.empty(len(weights))
        step = max(1, CHUNK // max(len(clip), 1))
        for start in range(0, len(weights), step):
            mass = weights[start : start + step, clip]
            seen, hits = mass.cumsum(axis=1)[:, ends], (mass * hit).cumsum(axis=1)[:, ends]
            gained = np.diff(hits, axis=1, prepend=0)
            areas[start : start + step] = (gained * hits / np.maximum(seen, 1e-300)).sum(axis=1)
        total = weights @ num_right
        return np.divide(areas, total, out=np.zeros_like(areas), where=total > 0)

    return statistic


# --- decisions -------------------------------------------------------------------------------------------------------------


def precision_recall_f1(
    hits: np.ndarray, predicted: np.ndarray, support: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each (...) from counts; 0 where nothing was predicted or present."""
    return hits / np.maximum(predicted, 1), hits / np.maximum(support, 1), 2 * hits / np.maximum(support + predicted, 1)


def weighted_micro_f1(truth: np.ndarray, believed: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """F1 of all pairs of (N, C) bool, as a statistic of clips for models.metrics.bootstrap."""
    right, num_right, shown = (values.sum(axis=1) for values in (truth & believed, truth, believed))
    return lambda weights: precision_recall_f1(weights @ right, weights @ shown, weights @ num_right)[2]


def weighted_macro_f1(truth: np.ndarray, believed: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The same as the mean over the classes that the clips drawn have; NaN where they have none."""
    columns = np.array_split(np.flatnonzero(truth.any(axis=0)), 1 + truth.size // CHUNK)

    def statistic(weights: np.ndarray) -> np.ndarray:
        total, num = np.zeros(len(weights)), np.zeros(len(weights))
        for some in columns:
            own, shown = truth[:, some].astype(np.float64), believed[:, some].astype(np.float64)
            support = weights @ own
            f1 = precision_recall_f1(weights @ (own * shown), weights @ shown, support)[2]
            total += f1.sum(axis=1, where=support > 0)
            num += (support > 0).sum(axis=1)
        return np.divide(total, num, out=np.full(len(num), np.nan), where=num > 0)

    return statistic


def best_cut(score: np.ndarray, right: np.ndarray, num_right: int) -> float:
    """The score, halfway between two of (P,), above which F1 is best; NaN where nothing is right. The best come first."""
    hits = right.cumsum()
    if not right.any():
        return float("nan")
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + num_right)
    below = np.append(score[1:], 0)
    cut = int(np.where(score > below, f1, -1).argmax())
    return float((score[cut] + below[cut]) / 2)


def class_thresholds(scores: np.ndarray, truth: np.ndarray, k: int) -> np.ndarray:
    """(C,) the score from which on a class is best believed: that of its highest F1 over these clips.

    A class that is right for fewer than FEW clips is drawn, by what it lacks, to the threshold of the highest F1 of all
    classes together, taken over each clip's k best: at none it is that. NaN where no clip has a right class.
    Of scores that are probabilities F1 is highest at half its own value (Lipton et al. 2014).
    """
    pairs, support = top_pairs(scores, truth, k), truth.sum(axis=0)
    order = np.argsort(-pairs.score, kind="stable")
    shared = best_cut(pairs.score[order], pairs.hit[order], int(support.sum()))
    chosen = np.full(len(support), shared)
    for label in np.flatnonzero(support):
        order = np.argsort(-scores[:, label], kind="stable")
        own = best_cut(scores[order, label], truth[order, label], int(support[label]))
        trust = min(1.0, support[label] / FEW)
        chosen[label] = own if np.isnan(shared) else trust * own + (1 - trust) * shared
    return chosen


# --- calibration -----------------------------------------------------------------------------------------------------------


def reliability(score: np.ndarray, hit: np.ndarray, num_bins: int = 15) -> np.ndarray:
    """(3, num_bins) of bins of equal width: how many of (P,) scores fall into each, the sum of these, and their hits."""
    bins = np.clip(np.ceil(score * num_bins).astype(int) - 1, 0, num_bins - 1)
    return np.stack([np.bincount(bins, values, num_bins) for values in (np.ones(len(score)), score, hit)])


def calibration_error(score: np.ndarray, hit: np.ndarray) -> float:
    """Expected calibration error (Guo et al. 2017): |share of hits - mean score| of bins, weighted by their size."""
    _, total, hits = reliability(score, hit)
    return float(np.abs(hits - total).sum() / len(score))
