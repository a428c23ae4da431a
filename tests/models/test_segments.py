"""Segments against loops over single ones: overlap, soft-NMS, and every score of ActivityNet's protocol."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import segment_scores, segments
from models.metrics import bootstrap
from models.segments import Segments, from_rows

THRESHOLDS = (0.3, 0.5, 0.7)
Row = tuple[int, int, float, float, float]  # video, label, start, end, score


def unpack(found: Segments) -> list[Row]:
    return list(zip(*(column.tolist() for column in astuple(found)), strict=True))


# --- the same, one by one -------------------------------------------------------------------------------------------------


def iou_of(a: Row, b: Row) -> float:
    shared = max(0.0, min(a[3], b[3]) - max(a[2], b[2]))
    union = (a[3] - a[2]) + (b[3] - b[2]) - shared
    return shared / union if union > 0 else 0.0


def nms_of(rows: Sequence[Row], sigma: float, min_score: float) -> dict[int, float]:
    """Row number -> score after soft-NMS."""
    scores, left, done = [row[4] for row in rows], set(range(len(rows))), {}
    while left:
        best = max(left, key=lambda i: (scores[i], -i))
        left.remove(best)
        if scores[best] < min_score:
            continue
        done[best] = scores[best]
        for other in left:
            if rows[other][:2] == rows[best][:2]:
                scores[other] *= math.exp(-(iou_of(rows[other], rows[best]) ** 2) / sigma)
    return done


def right_of(rows: Sequence[Row], truth: Sequence[Row], threshold: float) -> list[bool]:
    """Whether each detection of one class, the best first, is right."""
    free, right = list(range(len(truth))), []
    for row in rows:
        near = [
            (-iou_of(row, truth[g]), g) for g in free if truth[g][0] == row[0] and iou_of(row, truth[g]) >= threshold
        ]
        right.append(bool(near))
        if near:
            free.remove(min(near)[1])
    return right


def ap_of(right: Sequence[bool], num_truth: int) -> float:
    """Area below precision made falling."""
    precisions = [sum(right[: k + 1]) / (k + 1) for k in range(len(right))]
    return sum(max(precisions[k:]) for k, hit in enumerate(right) if hit) / num_truth


def areas_of(found: Sequence[Row], truth: Sequence[Row]) -> dict[tuple[float, int], float]:
    """(threshold, class) -> average precision."""
    truth, areas = list(dict.fromkeys(truth)), {}
    for label in sorted({row[1] for row in truth}):
        own = sorted((row for row in found if row[1] == label), key=lambda row: -row[4])
        true = [row for row in truth if row[1] == label]
        for threshold in THRESHOLDS:
            areas[threshold, label] = ap_of(right_of(own, true, threshold), len(true))
    return areas


def check(found: Sequence[Row], truth: Sequence[Row], num_videos: int, num_classes: int) -> None:
    """The evaluator's areas are those of the loops, and NaN for a class that is not there."""
    matched = segment_scores.match(from_rows(found), from_rows(truth), THRESHOLDS, num_videos, num_classes)
    areas = segment_scores.average_precisions(matched, np.ones((1, num_videos)))[0]
    expected = np.full_like(areas, np.nan)
    for (threshold, label), area in areas_of(found, truth).items():
        expected[THRESHOLDS.index(threshold), label] = area
    np.testing.assert_allclose(areas, expected, rtol=0, atol=1e-12)
    mean = segment_scores.mean_average_precision(matched)(np.ones((1, num_videos)))[0]
    np.testing.assert_allclose(mean, np.nanmean(expected) if truth else np.nan, rtol=0, atol=1e-12)


def draw(seed: int, num: int, num_videos: int = 6, num_classes: int = 4) -> tuple[list[Row], list[Row]]:
    """Detections around true segments and anywhere.

    The last video has no truth, the first no detection; class 0 is never found, the last never there; some true segments
    stand twice, some detections have the same score.
    """
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 50, 30)
    columns = [rng.integers(0, num_videos - 1, 30), rng.integers(0, num_classes - 1, 30), start]
    truth = list(zip(*(c.tolist() for c in [*columns, start + rng.uniform(1, 9, 30), np.ones(30)]), strict=True))
    truth += truth[:3]
    found = []
    for score in rng.uniform(0, 1, num).round(2):
        video, label, begin, end, _ = truth[rng.integers(len(truth))]
        if rng.random() < 0.3:
            video, label, begin = int(rng.integers(num_videos)), int(rng.integers(num_classes)), rng.uniform(0, 50)
            end = begin + rng.uniform(0, 9)
        begin, end = sorted((begin + rng.normal(0, 0.5), end + rng.normal(0, 0.5)))
        found.append((max(video, 1), max(label, 1), begin, end, float(score)))
    return found, truth


GRID = st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 8), st.integers(1, 5))
SCORE = st.integers(1, 6).map(lambda k: k / 8)  # few, so that there are ties


# --- overlap and soft-NMS -------------------------------------------------------------------------------------------------


def test_overlap_of_pairs() -> None:
    a = np.array([[0, 10], [2, 4], [5, 5], [20, 30]], dtype=float)
    b = np.array([[0, 10], [5, 15], [5, 5], [10, 12]], dtype=float)
    expected = [[1, 1 / 3, 0, 0], [0.2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(segments.iou(a, b), expected, atol=1e-15)


def test_soft_nms_by_hand() -> None:
    rows: list[Row] = [(0, 0, 0, 10, 0.9), (0, 0, 0, 5, 0.8), (0, 1, 0, 5, 0.7), (1, 0, 0, 5, 0.6)]
    found = segments.soft_nms(from_rows(rows), 0.5, 0.001)
    np.testing.assert_allclose(found.score, [0.9, 0.8 * math.exp(-0.25 / 0.5), 0.7, 0.6], rtol=1e-14)
    assert found.score[[0, 2, 3]].tolist() == [0.9, 0.7, 0.6], "what does not decay keeps every bit"
    assert segments.soft_nms(from_rows(rows), 0.5, 0.5).score.tolist() == [0.9, 0.7, 0.6]


@pytest.mark.parametrize(("num", "min_score"), [(0, 0.001), (1, 0.001), (400, 0.001), (400, 0.0), (400, 0.2)])
def test_soft_nms_against_a_loop(num: int, min_score: float) -> None:
    rows, _ = draw(num, num)
    scores = np.random.default_rng(num).uniform(0, 1, num).tolist()  # without ties, which rounding may break either way
    rows = [(*row[:4], score) for row, score in zip(rows, scores, strict=True)]
    expected = {i: score for i, score in nms_of(rows, 0.7, min_score).items() if score > 0}
    found = unpack(segments.soft_nms(from_rows(rows), 0.7, min_score))
    assert [row[:4] for row in found] == [rows[i][:4] for i in sorted(expected)]
    np.testing.assert_allclose([row[4] for row in found], [expected[i] for i in sorted(expected)], rtol=1e-12)


@given(st.lists(GRID, max_size=30), st.sampled_from([0.3, 0.7]), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_soft_nms_of_anything(grid: list[tuple[int, int, int, int]], sigma: float, random) -> None:
    scores = random.sample(range(1, 1000), len(grid))
    rows = [(v, c, s, s + n, score / 1000) for (v, c, s, n), score in zip(grid, scores, strict=True)]
    expected = nms_of(rows, sigma, 0.01)
    found = segments.soft_nms(from_rows(rows), sigma, 0.01)
    np.testing.assert_allclose(found.score, [expected[i] for i in sorted(expected)], rtol=1e-12)


def test_soft_nms_of_one_large_group_and_many_small_ones() -> None:
    """Groups of very different sizes do not disturb each other."""
    rng = np.random.default_rng(0)
    size = np.array([300, *rng.integers(1, 6, 200)])
    video = np.repeat(np.arange(len(size)), size)
    start = rng.uniform(0, 30, len(video))
    columns = [
        video,
        np.zeros_like(video),
        start,
        start + rng.uniform(1, 5, len(video)),
        rng.uniform(0.1, 1, len(video)),
    ]
    order = rng.permutation(len(video))
    found = segments.soft_nms(Segments(*(column[order] for column in columns)), 0.5, 0.001)
    for one in (0, 7, 200):
        alone = segments.soft_nms(Segments(*(column[order][video[order] == one] for column in columns)), 0.5, 0.001)
        assert unpack(alone) == unpack(found[found.video == one])


# --- videos ---------------------------------------------------------------------------------------------------------------


def test_windows_once_and_the_best_of_each_video() -> None:
    assert segments.once(np.array([3, 0, 3, 3]), np.array([1.5, 1.5, 1.5, 2.0])).tolist() == [0, 1, 3]
    rows: list[Row] = [(1, 0, 0, 1, 0.2), (0, 0, 0, 1, 0.5), (1, 1, 0, 2, 0.9), (1, 1, 0, 3, 0.3)]
    assert unpack(segments.best_of_each(from_rows(rows), 2)) == [rows[1], rows[2], rows[3]]
    weighted = segments.weighted(from_rows(rows), np.array([[1, 0], [0.5, 0.1]]))
    np.testing.assert_allclose(weighted.score, [0.1, 0.5, 0.09, 0.03])


# --- evaluation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_evaluation_against_loops(seed: int) -> None:
    found, truth = draw(seed, 300)
    check(found, truth, 6, 4)


def test_evaluation_without_detections_or_truth() -> None:
    found, truth = draw(0, 40)
    check([], truth, 6, 4)
    check(found, [], 6, 4)


@given(st.lists(st.tuples(GRID, SCORE), max_size=25), st.lists(GRID, max_size=12))
@settings(max_examples=50, deadline=None)
def test_evaluation_of_anything(found, truth) -> None:
    """Ties of scores and overlaps, IoUs on the very threshold, duplicates, chains of segments that were taken."""
    rows = [(v, c, s, s + n, score) for (v, c, s, n), score in found]
    check(rows, [(v, c, s, s + n, 1.0) for v, c, s, n in truth], 3, 2)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    found, truth = draw(5, 200)
    monkeypatch.setattr(segment_scores, "CHUNK", 7)
    check(found, truth, 6, 4)


def test_a_video_drawn_twice_is_two_videos() -> None:
    """The weights of a bootstrap replicate against the evaluation of the videos that it drew."""
    found, truth = draw(1, 300)
    found = [(*row[:4], row[4] + k * 1e-6) for k, row in enumerate(found)]  # without ties between videos
    matched = segment_scores.match(from_rows(found), from_rows(truth), THRESHOLDS, 6, 4)
    statistic = segment_scores.mean_average_precision(matched)
    drawn = [[3, 1, 1, 2, 5, 3], [5, 5, 5, 5, 5, 5], [0, 1, 2, 3, 4, 5], [4, 4, 4, 4, 4, 4]]
    weights = np.array([np.bincount(videos, minlength=6) for videos in drawn], dtype=float)
    for videos, value in zip(drawn, statistic(weights), strict=True):
        chosen = [
            [(new, *row[1:]) for new, v in enumerate(videos) for row in rows if row[0] == v] for rows in (found, truth)
        ]
        areas = areas_of(chosen[0], chosen[1])
        np.testing.assert_allclose(value, np.mean(list(areas.values())) if areas else np.nan, atol=1e-12)
    low, high = bootstrap(statistic, [str(v) for v in range(6)], 50, 0)
    assert low < statistic(np.ones((1, 6)))[0] < high


def test_recall_against_loops() -> None:
    found, truth = draw(2, 200)
    found, once = [(*row[:4], row[4] + k * 1e-6) for k, row in enumerate(found)], list(dict.fromkeys(truth))
    matched = segment_scores.match(from_rows(found), from_rows(truth), THRESHOLDS, 6, 4)
    shares = segment_scores.recalls(matched, (1, 3))
    assert np.isnan(shares[..., 3]).all()
    for (k, multiple), (t, threshold), label in product(enumerate((1, 3)), enumerate(THRESHOLDS), range(3)):
        reached = total = 0
        for video in range(6):
            true = [row for row in once if row[:2] == (video, label)]
            best = sorted((row for row in found if row[:2] == (video, label)), key=lambda row: -row[4])
            best = best[: multiple * len(true)]
            reached += sum(any(iou_of(row, one) >= threshold for row in best) for one in true)
            total += len(true)
        assert shares[k, t, label] == pytest.approx(reached / total)


def test_precision_curves_against_loops() -> None:
    found, truth = draw(3, 200)
    once = list(dict.fromkeys(truth))
    recall = np.linspace(0, 1, 11)
    matched = segment_scores.match(from_rows(found), from_rows(truth), THRESHOLDS, 6, 4)
    curves = segment_scores.precision_curves(matched, recall)
    for t, threshold in enumerate(THRESHOLDS):
        expected = np.zeros(11)
        for label in range(3):
            own = sorted((row for row in found if row[1] == label), key=lambda row: -row[4])
            true = [row for row in once if row[1] == label]
            hits = np.cumsum(right_of(own, true, threshold))
            points = [(hit / len(true), hit / (k + 1)) for k, hit in enumerate(hits)]
            expected += [max((p for r, p in points if r >= asked - 1e-9), default=0.0) / 3 for asked in recall]
        np.testing.assert_allclose(curves[t], expected, atol=1e-12)


def test_kinds_of_errors() -> None:
    """One detection of each kind, as DETAD tells them apart."""
    truth: list[Row] = [(0, 0, 0, 10, 1), (0, 1, 20, 30, 1)]
    found: list[Row] = [
        (0, 0, 0, 9, 0.9),  # right
        (0, 0, 0, 10, 0.8),  # overlaps more, but the truth was taken
        (0, 1, 1, 10, 0.7),  # another class was there
        (0, 0, 6, 14, 0.6),  # IoU 4/14
        (0, 0, 26, 34, 0.5),  # the same of another class
        (0, 0, 9.5, 19, 0.4),  # IoU 0.5/19
        (1, 0, 0, 10, 0.3),  # no truth in this video
    ]
    matched = segment_scores.match(from_rows(found), from_rows(truth), (0.3, 0.5), 2, 2)
    kinds = [segment_scores.KINDS[k] for k in segment_scores.error_kinds(matched, 1)]
    by_score = dict(zip(matched.found.score.tolist(), kinds, strict=True))
    expected = ["right", "double detection", "wrong label", "localisation", "confusion", "background", "background"]
    assert [by_score[row[4]] for row in found] == expected


def test_thresholds_of_the_best_f1() -> None:
    found, truth = draw(4, 200)
    once = list(dict.fromkeys(truth))
    matched = segment_scores.match(from_rows(found), from_rows(truth), THRESHOLDS, 6, 4)
    chosen = segment_scores.best_thresholds(matched, 1)
    for label in (1, 2):
        own = sorted((row for row in found if row[1] == label), key=lambda row: -row[4])
        true = [row for row in once if row[1] == label]
        right = right_of(own, true, 0.5)

        def f1(cut: float, own=own, right=right, true=true) -> float:
            kept = [hit for row, hit in zip(own, right, strict=True) if row[4] >= cut]
            return 2 * sum(kept) / (len(kept) + len(true))

        assert f1(chosen[label]) == max(f1(row[4]) for row in own)
        assert chosen[label] not in [row[4] for row in own]
    assert chosen[0] == chosen[3] != chosen[1], "found nothing right: the threshold of all classes together"
    nothing = segment_scores.match(from_rows([]), from_rows(truth), THRESHOLDS, 6, 4)
    assert np.isnan(segment_scores.best_thresholds(nothing, 1)).all()
