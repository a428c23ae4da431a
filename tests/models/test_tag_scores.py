"""Every score of tags against golden numbers, loops in plain Python, or scikit-learn."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from models import tag_scores
from models.metrics import bootstrap
from models.tag_scores import GlobalPrecision

SCORES = np.array([[0.9, 0.1, 0.4, 0.25], [0.3, 0.8, 0.7, 0.05], [0.2, 0.6, 0.15, 0.5]])
TRUTH = np.array([[1, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 1]], dtype=bool)

grids = st.tuples(st.integers(1, 6), st.integers(1, 7)).flatmap(
    lambda shape: st.lists(
        st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=shape[1], max_size=shape[1]),
        min_size=shape[0],
        max_size=shape[0],
    )
)  # clips of classes with (score in quarters, is it right?): many scores are equal


def arrays(grid: list[list[tuple[int, bool]]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([[s / 4 for s, _ in row] for row in grid]), np.array([[hit for _, hit in row] for row in grid])


def tagged(num: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.random((num, num_classes)) < rng.uniform(0.02, 0.4, num_classes)
    return 1 / (1 + np.exp(-rng.normal(size=truth.shape) - 2 * truth + 1)), truth


def gap_of(scores: np.ndarray, truth: np.ndarray, k: int) -> float:
    metric = GlobalPrecision(k)
    metric.update(scores, truth)
    return metric.compute()


def f1_of(truth: np.ndarray, believed: np.ndarray) -> float:
    return float(2 * (truth & believed).sum() / max(truth.sum() + believed.sum(), 1))


def f1_at(scores: np.ndarray, truth: np.ndarray, threshold: float) -> float:
    return f1_of(truth, scores >= threshold)


# --- by hand ---------------------------------------------------------------------------------------------------------------


def looped_best(row: np.ndarray, k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda label: (-row[label], label))[:k]


def looped_area(pairs: list[tuple[float, bool]], num_right: int) -> float:
    """Down the list, score by score; those of one score come in together."""
    area, seen, hits = 0.0, 0, 0
    for score in sorted({score for score, _ in pairs}, reverse=True):
        own = [hit for other, hit in pairs if other == score]
        seen, hits = seen + len(own), hits + sum(own)
        area += sum(own) * hits / seen
    return area / num_right if num_right else 0.0


def looped_gap(scores: np.ndarray, truth: np.ndarray, k: int) -> float:
    pairs = [(row[c], bool(t[c])) for row, t in zip(scores, truth, strict=True) for c in looped_best(row, k)]
    return looped_area(pairs, int(truth.sum()))


def looped_perr(scores: np.ndarray, truth: np.ndarray) -> float:
    shares = []
    for row, right in zip(scores, truth, strict=True):
        k = int(right.sum())
        shares.append(sum(right[c] and row[c] > 0 for c in looped_best(row, k)) / k if k else 0.0)
    return float(np.mean(shares))


def test_golden_numbers() -> None:
    """Those of the original's code."""
    assert tag_scores.hits_at(SCORES, TRUTH, 1).mean() == pytest.approx(0.666667, abs=1e-6)
    assert tag_scores.equal_recall_precision(SCORES, TRUTH).mean() == pytest.approx(0.5)
    assert gap_of(SCORES, TRUTH, 20) == pytest.approx(0.7683333, abs=1e-7)
    assert gap_of(SCORES, TRUTH, 2) == pytest.approx(0.6433333, abs=1e-7)
    pooled = tag_scores.pooled_average_precisions(tag_scores.top_pairs(SCORES, TRUTH, 20), TRUTH.sum(0))
    assert pooled.tolist() == [1, 0.5, 1, 1] == tag_scores.average_precisions(SCORES, TRUTH).tolist()


@settings(max_examples=150, deadline=None)
@given(grids, st.integers(1, 8))
def test_ranking_of_anything(grid, k: int) -> None:
    scores, truth = arrays(grid)
    expected = [looped_best(row, k) for row in scores]
    assert tag_scores.best_tags(scores, k).tolist() == expected
    hit = [any(t[c] for c in best) for t, best in zip(truth, expected, strict=True)]
    assert tag_scores.hits_at(scores, truth, k).tolist() == hit
    assert tag_scores.equal_recall_precision(scores, truth).mean() == pytest.approx(looped_perr(scores, truth))
    assert gap_of(scores, truth, k) == pytest.approx(looped_gap(scores, truth, k))


@settings(max_examples=100, deadline=None)
@given(grids, st.integers(1, 8))
def test_average_precision_of_anything(grid, k: int) -> None:
    scores, truth = arrays(grid)
    num_classes, support = truth.shape[1], truth.sum(0)
    pairs = tag_scores.top_pairs(scores, truth, k)
    whole, pooled = (
        tag_scores.average_precisions(scores, truth),
        tag_scores.pooled_average_precisions(pairs, support),
    )
    for c in range(num_classes):
        if not support[c]:
            assert np.isnan([whole[c], pooled[c]]).all()
            continue
        assert whole[c] == pytest.approx(sklearn_metrics.average_precision_score(truth[:, c], scores[:, c]))
        own = [(row[c], bool(t[c])) for row, t in zip(scores, truth, strict=True) if c in looped_best(row, k)]
        assert pooled[c] == pytest.approx(looped_area(own, int(support[c])))


@pytest.mark.parametrize("k", [1, 5, 20, 60])
def test_gap_of_many_clips(k: int) -> None:
    scores, truth = tagged(60, 50, k)
    assert gap_of(scores, truth, k) == pytest.approx(looped_gap(scores, truth, k), abs=1e-12)


def test_clips_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, truth = tagged(50, 30, 0)
    scores = scores.round(1)
    pairs = tag_scores.top_pairs(scores, truth, 7)
    weights = np.random.default_rng(0).integers(0, 3, (9, 50)).astype(float)
    found = tag_scores.weighted_gap(pairs, truth.sum(1))(weights)
    macro = tag_scores.weighted_macro_f1(truth, scores > 0.5)(weights)
    monkeypatch.setattr(tag_scores, "CHUNK", 100)
    assert np.array_equal(tag_scores.top_pairs(scores, truth, 7).label, pairs.label)
    assert np.array_equal(tag_scores.weighted_gap(pairs, truth.sum(1))(weights), found)
    np.testing.assert_allclose(tag_scores.weighted_macro_f1(truth, scores > 0.5)(weights), macro, rtol=1e-14)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 40), max_size=6))
def test_gap_is_exact_in_any_batches_and_order(seed: int, cuts: list[int]) -> None:
    scores, truth = tagged(40, 30, 1)
    scores = scores.round(1)  # many are equal
    whole = gap_of(scores, truth, 5)
    order, metric = np.random.default_rng(seed).permutation(40), GlobalPrecision(5)
    for rows in np.split(order, sorted(cuts)):
        metric.update(scores[rows], truth[rows])
    assert metric.compute() == whole


def test_gap_keeps_the_best_of_each_clip_however_many_classes() -> None:
    metric, rng = GlobalPrecision(20), np.random.default_rng(0)
    tracemalloc.start()
    for _ in range(20):
        metric.update(rng.random((100, 2000)), rng.random((100, 2000)) < 0.01)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 20 * 100 * 20 * (8 + 1) * 1.2, "20 floats and flags a clip"


def test_clips_without_tags_and_nothing_at_all() -> None:
    nothing = np.zeros_like(TRUTH)
    assert gap_of(SCORES, nothing, 20) == 0
    assert tag_scores.equal_recall_precision(SCORES, nothing).tolist() == [0, 0, 0]
    pairs = tag_scores.top_pairs(SCORES, nothing, 2)
    assert tag_scores.weighted_gap(pairs, nothing.sum(1))(np.ones((2, 3))).tolist() == [0, 0]
    assert GlobalPrecision(5).compute() == 0


def test_a_class_that_scores_nothing_was_not_answered() -> None:
    assert tag_scores.equal_recall_precision(np.zeros((1, 3)), np.array([[True, True, False]])).tolist() == [0]


def test_precision_curve_against_a_loop() -> None:
    scores, truth = tagged(30, 12, 4)
    pairs, recall = tag_scores.top_pairs(scores, truth, 6), np.linspace(0, 1, 11)
    order = np.argsort(-pairs.score)
    hits, num = pairs.hit[order].cumsum(), int(truth.sum())
    expected = [max((h / n for n, h in enumerate(hits, 1) if h >= share * num - 1e-9), default=0.0) for share in recall]
    np.testing.assert_allclose(tag_scores.precision_curve(pairs, num, recall), expected)


# --- bootstrap -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(grids, st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_a_clip_drawn_twice_is_two_clips(grid, k: int, seed: int) -> None:
    scores, truth = arrays(grid)
    believed = scores > 0.5
    drawn = np.random.default_rng(seed).integers(0, 3, (4, len(scores)))
    gap = tag_scores.weighted_gap(tag_scores.top_pairs(scores, truth, k), truth.sum(1))(drawn.astype(float))
    micro = tag_scores.weighted_micro_f1(truth, believed)(drawn.astype(float))
    macro = tag_scores.weighted_macro_f1(truth, believed)(drawn.astype(float))
    for i, times in enumerate(drawn):
        rows = np.repeat(np.arange(len(scores)), times)
        t, b = truth[rows], believed[rows]
        assert gap[i] == pytest.approx(looped_gap(scores[rows], t, k))
        f1 = [f1_of(t[:, c], b[:, c]) for c in np.flatnonzero(t.any(0))]
        assert macro[i] == pytest.approx(np.mean(f1)) if f1 else np.isnan(macro[i])
        assert micro[i] == pytest.approx(f1_of(t, b))


def test_interval_of_gap_holds_it() -> None:
    scores, truth = tagged(200, 10, 2)
    statistic = tag_scores.weighted_gap(tag_scores.top_pairs(scores, truth, 20), truth.sum(1))
    low, high = bootstrap(statistic, [str(i // 2) for i in range(200)], 300, 0)
    assert low < gap_of(scores, truth, 20) < high
    assert high - low < 0.3


# --- decisions and calibration ---------------------------------------------------------------------------------------------


def test_thresholds_have_the_best_f1() -> None:
    scores, truth = tagged(400, 6, 5)
    truth[:, 0] = False
    found = tag_scores.class_thresholds(scores, truth, 20)
    assert (truth[:, 1:].sum(0) >= tag_scores.FEW).any()
    for c in np.flatnonzero(truth.sum(0) >= tag_scores.FEW):
        best = max(f1_at(scores[:, c], truth[:, c], value) for value in scores[:, c])
        assert f1_at(scores[:, c], truth[:, c], found[c]) == best
    best = max(f1_at(scores.ravel(), truth.ravel(), value) for value in np.sort(scores.ravel())[::-1][:1200:3])
    assert f1_at(scores.ravel(), truth.ravel(), found[0]) >= best


def test_classes_with_few_clips_lean_on_all_classes() -> None:
    scores, truth = tagged(400, 6, 5)
    own = tag_scores.class_thresholds(scores, truth, 20)[2]
    few, rows = truth.copy(), np.flatnonzero(truth[:, 2])
    few[rows[5:], 2] = False
    found = tag_scores.class_thresholds(scores, few, 20)
    few_alone = tag_scores.class_thresholds(scores[:, 2:3], few[:, 2:3], 20)[
        0
    ]  # where all classes are the class itself
    none = few.copy()
    none[:, 2] = False
    pooled = tag_scores.best_cut(*sorted_by_score(scores, few), int(few.sum()))
    assert found[2] == pytest.approx(5 / 20 * few_alone + 15 / 20 * pooled)
    shared = tag_scores.best_cut(*sorted_by_score(scores, none), int(none.sum()))
    assert tag_scores.class_thresholds(scores, none, 20)[2] == shared != own
    assert np.isnan(tag_scores.class_thresholds(scores, np.zeros_like(truth), 20)).all()


def sorted_by_score(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-scores, axis=None, kind="stable")
    return scores.ravel()[order], truth.ravel()[order]


@pytest.mark.parametrize("shape", [(0.5, 2.0), (1.0, 1.0), (0.3, 6.0)])
def test_of_calibrated_scores_the_best_threshold_is_half_the_best_f1(shape: tuple[float, float]) -> None:
    """Lipton, Elkan and Narayanaswamy 2014."""
    rng = np.random.default_rng(7)
    scores = rng.beta(*shape, size=(400_000, 1))
    truth = rng.random(scores.shape) < scores
    threshold = tag_scores.class_thresholds(scores, truth, 20)[0]
    best = f1_at(scores[:, 0], truth[:, 0], threshold)
    assert threshold == pytest.approx(best / 2, abs=0.015)
    assert tag_scores.calibration_error(scores[:, 0], truth[:, 0]) < 0.004


def test_calibration_error_against_a_loop() -> None:
    scores, truth = tagged(80, 5, 6)
    score, hit = scores.ravel(), truth.ravel()
    num, total, hits = tag_scores.reliability(score, hit)
    expected = 0.0
    for i in range(15):
        inside = [j for j in range(len(score)) if i / 15 < score[j] <= (i + 1) / 15]
        assert (num[i], hits[i]) == (len(inside), sum(hit[inside]))
        assert total[i] == pytest.approx(sum(score[inside]))
        expected += abs(sum(hit[inside]) - sum(score[inside])) / len(score)
    assert tag_scores.calibration_error(score, hit) == pytest.approx(expected)
    assert tag_scores.calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0
