"""Every score against brute force, a closed form or scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from models import metrics


@pytest.fixture
def scored() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, 3, 5, 6], size=90)  # classes 4 and 7 do not occur
    scores = rng.normal(size=(90, 8)) + 1.5 * np.eye(8)[truth]
    return scores, truth


def test_mean_ignores_absent_modalities() -> None:
    metric = metrics.MeanMetric(["loss_video", "loss_audio"])
    metric.update({"loss_video": torch.tensor([1.0, float("nan")]), "loss_audio": torch.tensor([float("nan")] * 2)}, {})
    metric.update({"loss_video": torch.tensor([4.0]), "loss_audio": torch.tensor([float("nan")])}, {})
    values = metric.compute()
    assert values["loss_video"] == 2.5
    assert math.isnan(values["loss_audio"])


def test_classification_matches_sklearn(scored: tuple[np.ndarray, np.ndarray]) -> None:
    scores, truth = scored
    metric = metrics.Classification("label", 8)
    for rows in np.array_split(np.arange(90), 4):
        metric.update({"logits": torch.tensor(scores[rows])}, {"label": torch.tensor(truth[rows])})
    values, predicted = metric.compute(), scores.argmax(1)
    probabilities = torch.tensor(scores).softmax(1).numpy()
    assert values["top1"] == pytest.approx(sklearn_metrics.accuracy_score(truth, predicted))
    assert values["top5"] == pytest.approx(sklearn_metrics.top_k_accuracy_score(truth, scores, k=5, labels=range(8)))
    recalls = sklearn_metrics.recall_score(truth, predicted, labels=np.unique(truth), average=None, zero_division=0)
    assert values["balanced_accuracy"] == pytest.approx(recalls.mean())
    f1 = sklearn_metrics.f1_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0)
    assert values["macro_f1"] == pytest.approx(f1)
    assert values["loss"] == pytest.approx(sklearn_metrics.log_loss(truth, probabilities, labels=range(8)), rel=1e-6)


def test_equal_logits_are_wrong_not_right() -> None:
    truth = np.array([0, 1])
    assert metrics.top_k(np.zeros((2, 6)), truth, 1).tolist() == [False, False]
    assert metrics.top_k(np.zeros((2, 6)), truth, 5).tolist() == [False, False]
    assert metrics.top_k(np.zeros((2, 6)), truth, 6).tolist() == [True, True]


def test_average_precision_matches_sklearn(scored: tuple[np.ndarray, np.ndarray]) -> None:
    scores, truth = scored
    values = metrics.average_precisions(scores, truth)
    assert np.flatnonzero(np.isnan(values)).tolist() == [4, 7]
    present = np.unique(truth)
    onehot = truth[:, None] == present
    expected = sklearn_metrics.average_precision_score(onehot, scores[:, present], average="macro")
    assert np.nanmean(values) == pytest.approx(expected)


def test_calibration_error_against_a_loop(scored: tuple[np.ndarray, np.ndarray]) -> None:
    scores, truth = scored
    probabilities = torch.tensor(scores).softmax(1).numpy()
    expected = 0.0
    for i in range(15):
        inside = [j for j in range(90) if i / 15 < probabilities[j].max() <= (i + 1) / 15]
        if inside:
            accuracy = np.mean([probabilities[j].argmax() == truth[j] for j in inside])
            expected += len(inside) / 90 * abs(accuracy - np.mean([probabilities[j].max() for j in inside]))
    assert metrics.calibration_error(probabilities, truth) == pytest.approx(expected)


def test_ranks_against_a_loop() -> None:
    rng = np.random.default_rng(1)
    queries, gallery = rng.integers(-2, 3, size=(2, 40, 3)).astype(float)  # small integers: many exact ties
    expected = []
    for i, query in enumerate(queries):
        scores = [float(query @ other) for other in gallery]
        better = sum(s > scores[i] for s in scores)
        ties = sum(s == scores[i] for j, s in enumerate(scores) if j != i)
        expected.append(1 + better + ties)
    assert metrics.retrieval_ranks(queries, gallery).tolist() == expected


def test_a_collapsed_embedding_ranks_last() -> None:
    rng = np.random.default_rng(2)
    point = rng.normal(size=(1, 48)).repeat(37, axis=0)
    assert metrics.retrieval_ranks(rng.normal(size=(37, 48)), point).tolist() == [37] * 37


def test_retrieval_both_ways() -> None:
    # Video 0 hears audio 1 best and audio 0 second; the others are right.
    video, audio = np.eye(3), np.array([[1.0, 0, 0], [2.0, 1, 0], [0, 0, 1]])
    values = metrics.retrieval(video, audio)
    assert values["r1_v2a"] == pytest.approx(2 / 3)
    assert values["r5_v2a"] == values["r10_v2a"] == values["r5_a2v"] == 1
    assert values["median_rank_v2a"] == 1
    assert values["r1_a2v"] == pytest.approx(2 / 3)  # audio 1 prefers video 0


def test_contrastive_metric_sees_alignment_and_collapse() -> None:
    rng = np.random.default_rng(3)
    z = torch.nn.functional.normalize(torch.tensor(rng.normal(size=(30, 16))), dim=1)
    flags = torch.ones(30, dtype=torch.bool)
    flags[4] = False
    broken = z.clone()
    broken[4] = float("nan")  # the clip without sound
    metric = metrics.Contrastive()
    for rows in torch.arange(30).split(8):
        batch = {"has_video": torch.ones(len(rows), dtype=torch.bool), "has_audio": flags[rows]}
        metric.update({"video_embedding": z[rows], "audio_embedding": broken[rows]}, batch)
    values = metric.compute()
    assert values["r1"] == values["r1_v2a"] == values["r1_a2v"] == 1
    assert values["alignment"] == 0
    assert values["collapse"] == 0
    kept = z[flags].float().double()
    assert values["uniformity"] == pytest.approx(float(torch.pdist(kept).pow(2).mul(-2).exp().mean().log()))
    pairs = [float(kept[i] @ kept[j]) for i in range(29) for j in range(29) if i != j]
    assert values["cosine"] == pytest.approx(np.mean(pairs))

    collapsed = metrics.Contrastive()
    same = z[:1].expand(30, -1)
    collapsed.update({"video_embedding": same, "audio_embedding": same}, {"has_video": flags, "has_audio": flags})
    values = collapsed.compute()
    assert values["collapse"] == 1
    assert values["r1"] == 0


def test_bootstrap_of_a_mean_is_the_normal_interval() -> None:
    hits = np.arange(1000) % 4 > 0  # accuracy 0.75, every clip its own group
    low, high = metrics.bootstrap(metrics.weighted_mean(hits), list(map(str, range(1000))), 2000, 0)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 1000)
    assert low == pytest.approx(0.75 - half, abs=0.003)
    assert high == pytest.approx(0.75 + half, abs=0.003)
    assert (low, high) == metrics.bootstrap(metrics.weighted_mean(hits), list(map(str, range(1000))), 2000, 0)


def test_bootstrap_draws_whole_groups() -> None:
    hits = np.arange(1000) % 4 > 0
    alone = metrics.bootstrap(metrics.weighted_mean(hits), list(map(str, range(1000))), 1000, 0)
    hits = np.sort(hits)  # twenty groups of fifty clips that are right or wrong together
    grouped = metrics.bootstrap(metrics.weighted_mean(hits), [str(i // 50) for i in range(1000)], 1000, 0)
    assert grouped[1] - grouped[0] > 5 * (alone[1] - alone[0])


def test_weighted_macro_f1_equals_sklearn_on_the_drawn_clips(scored: tuple[np.ndarray, np.ndarray]) -> None:
    scores, truth = scored
    predicted = scores.argmax(1)
    weights = np.random.default_rng(4).integers(0, 3, size=(5, 90))
    values = metrics.weighted_macro_f1(truth, predicted, 8)(weights.astype(float))
    for row, value in zip(weights, values, strict=True):
        drawn = np.repeat(np.arange(90), row)
        labels = np.unique(truth[drawn])
        expected = sklearn_metrics.f1_score(
            truth[drawn], predicted[drawn], labels=labels, average="macro", zero_division=0
        )
        assert value == pytest.approx(expected)


def test_shapley_shares_add_up_and_treat_both_alike() -> None:
    split = metrics.shapley(both=0.9, audio=0.6, video=0.5, neither=0.1)
    assert split["shapley_audio"] + split["shapley_video"] == pytest.approx(0.8)
    assert split["shapley_audio"] == pytest.approx(0.5 * ((0.9 - 0.5) + (0.6 - 0.1)))
    assert split["cooperation"] == pytest.approx(-0.1)
    swapped = metrics.shapley(both=0.9, audio=0.5, video=0.6, neither=0.1)
    assert swapped["shapley_audio"] == pytest.approx(split["shapley_video"])


def test_modality_confusion_counts() -> None:
    both = np.array([1, 0, 0, 0, 0], dtype=bool)
    audio = np.array([0, 1, 1, 0, 0], dtype=bool)
    video = np.array([1, 1, 0, 1, 0], dtype=bool)
    assert metrics.modality_confusion(both, audio, video) == {"mu_a": 0.4, "mu_v": 0.4, "mu_av": 0.2}


def test_knn_against_a_loop() -> None:
    rng = np.random.default_rng(5)
    train, train_truth = rng.normal(size=(60, 4)), rng.integers(0, 3, size=60)
    test, truth = rng.normal(size=(25, 4)), rng.integers(0, 3, size=25)
    hits = 0
    for query, right in zip(test, truth, strict=True):
        cosine = [query @ row / np.linalg.norm(query) / np.linalg.norm(row) for row in train]
        votes = [0.0] * 3
        for index in np.argsort(cosine)[-20:]:
            votes[train_truth[index]] += math.exp(cosine[index] / 0.07)
        hits += int(np.argmax(votes) == right)
    assert metrics.knn_accuracy(train, train_truth, test, truth) == hits / 25


def test_probe_reads_features_that_separate_and_not_noise() -> None:
    rng = np.random.default_rng(6)
    truth = rng.integers(0, 4, size=200)
    features = 100 + np.eye(4)[truth] * [1e-3, 1, 10, 1000] + rng.normal(size=(200, 4)) * [1e-4, 0.1, 1, 100]
    assert metrics.probe_accuracy(features[:150], truth[:150], features[150:], truth[150:]) > 0.95
    noise = rng.normal(size=(200, 4))
    assert metrics.probe_accuracy(noise[:150], truth[:150], noise[150:], truth[150:]) < 0.5
