"""What t3av reports on the test split: classes, the share of each modality, retrieval, and the worth of pre-training.

"Audio only" and "video only" are the fine-tuned model itself with the other modality hidden, not models trained on one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from models import metrics, scoring, tag_scores
from models.family import ClipInfo, Evaluation, Example, Results, Table

MEASURES = ("top1", "top5", "balanced_accuracy", "macro_f1", "map", "ece")
PROBES = {
    "probe_a": "linear probe, audio",
    "probe_v": "linear probe, video",
    "probe_av": "linear probe, both",
    "knn_a": "kNN, audio",
    "knn_v": "kNN, video",
    "knn_av": "kNN, both",
}


def evaluate(run: Evaluation) -> Results:
    """Score the test split once: all numbers flat, in [0, 1] unless they are counts or ranks."""
    labels, clips = run.facts.labels["label"], run.clips("test")
    truth = _truth(clips, labels)
    scores = {prefix: scoring.probabilities(run, drop) for prefix, drop in scoring.HIDDEN.items()}
    scores["late"] = (scores["audio"] + scores["video"]) / 2
    values, tables = _modalities(run, scores, truth)
    for part in (_retrieval(run), _pretraining(run)):
        values |= part[0]
        tables |= part[1]
    both = scores[""]
    tables |= {
        "per_class": scoring.per_class(both, truth, labels, "Per class"),
        "confusion": scoring.confusion(both, truth, labels, "Confusion of classes"),
        "predictions": _predictions(both, truth, labels, clips),
    }
    return Results(values, tables, _examples(both, truth, labels, clips))


def top1(predictions: pd.DataFrame) -> Callable[[np.ndarray], np.ndarray]:
    """Top-1 accuracy out of the table `predictions`, as a statistic for models.metrics.bootstrap."""
    return metrics.weighted_mean((predictions["truth"] == predictions["prediction_1"]).to_numpy())


def _truth(clips: Sequence[ClipInfo], labels: Sequence[str]) -> np.ndarray:
    return scoring.class_indices(clips, "label", labels)


# --- classification and the share of each modality --------------------------------------------------------------------


def _modalities(
    run: Evaluation, scores: dict[str, np.ndarray], truth: np.ndarray
) -> tuple[dict[str, float], dict[str, Table]]:
    """Both, audio only, video only and their late fusion, and what each modality is worth."""
    each = {prefix: scoring.scores(probabilities, truth) for prefix, probabilities in scores.items()}
    hits = {prefix: metrics.top_k(probabilities, truth, 1) for prefix, probabilities in scores.items()}
    values = {f"{prefix}_{name}".lstrip("_"): each[prefix][name] for prefix in each for name in MEASURES}
    values |= _intervals(run, scores[""], hits, truth)
    values |= {"num_clips": float(len(truth)), "majority_top1": _majority(run, truth)}
    shares, tables = _shares(hits, values)
    modalities = scoring.modality_table(each, MEASURES, "With both modalities, and with one hidden")
    return values | shares, {"modalities": modalities} | tables


def _shares(hits: dict[str, np.ndarray], values: dict[str, float]) -> tuple[dict[str, float], dict[str, Table]]:
    """The Shapley split of top-1 and modality confusion."""
    both, neither = values["top1"], values["majority_top1"]
    split = metrics.shapley(both, values["audio_top1"], values["video_top1"], neither)
    astray = metrics.modality_confusion(hits[""], hits["audio"], hits["video"])
    return split | astray, {
        "shapley": scoring.shapley_table(split, both, neither, "top-1 accuracy"),
        "modality_confusion": scoring.confusion_of_modalities(
            astray, len(hits[""]), "Right with one modality, wrong with both"
        ),
    }


def _intervals(run: Evaluation, both: np.ndarray, hits: dict[str, np.ndarray], truth: np.ndarray) -> dict[str, float]:
    """95 % bootstrap intervals of the main numbers; clips cut from one video are drawn together."""
    groups = [clip.group for clip in run.clips("test")]
    statistics = {
        "top1": metrics.weighted_mean(hits[""]),
        "audio_top1": metrics.weighted_mean(hits["audio"]),
        "video_top1": metrics.weighted_mean(hits["video"]),
        "macro_f1": metrics.weighted_macro_f1(truth, both.argmax(1), both.shape[1]),
    }
    return metrics.intervals(statistics, groups, run.num_bootstrap, run.seed)


def _majority(run: Evaluation, truth: np.ndarray) -> float:
    """Accuracy of always answering the most frequent class of the train split: what a model without inputs can do."""
    counts = np.bincount(_truth(run.clips("train"), run.facts.labels["label"]))
    return float(np.mean(truth == counts.argmax()))


# --- what the phases before fine-tuning learned -----------------------------------------------------------------------


def _retrieval(run: Evaluation) -> tuple[dict[str, float], dict[str, Table]]:
    title = "Finding a clip's sound by its picture, and the reverse"
    if "contrastive" not in run.trained:
        return {}, {"retrieval": Table(title, pd.DataFrame(), "Left out: there is no contrastive checkpoint.")}
    found = run.predict("contrastive", "test")
    video, audio = found["video_embedding"], found["audio_embedding"]
    pairs = _present(video) & _present(audio)
    if not pairs.any():
        return {"gallery": 0.0}, {"retrieval": Table(title, pd.DataFrame(), "Left out: no test clip has both.")}
    values = metrics.retrieval(video[pairs], audio[pairs]) | {"gallery": float(pairs.sum())}
    rows = {"direction": ["video to audio", "audio to video"]}
    rows |= {f"R@{k}": [values[f"r{k}_v2a"], values[f"r{k}_a2v"]] for k in (1, 5, 10)}
    rows |= {"median rank": [values["median_rank_v2a"], values["median_rank_a2v"]]}
    note = f"Gallery of {pairs.sum()} clips; chance R@1 is {1 / pairs.sum():.4f}. Ties count against the model."
    return values, {"retrieval": Table(title, pd.DataFrame(rows), note)}


def _pretraining(run: Evaluation) -> tuple[dict[str, float], dict[str, Table]]:
    """Linear probe and kNN of frozen features: the last phase before fine-tuning, an earlier one, random weights."""
    title = "Frozen features before fine-tuning"
    sources = [phase for phase in ("contrastive", "pretrain") if phase in run.trained]
    if not sources:
        return {}, {"probes": Table(title, pd.DataFrame(), "Left out: fine-tuning began without pre-training.")}
    values = _probe(run, sources[0])
    columns = {sources[0]: values}
    for phase in sources[1:]:
        columns[phase] = _probe(run, phase)
        values |= {f"{name}_{phase}": value for name, value in columns[phase].items()}
    columns["random weights"] = random = _probe(run, sources[0], untrained=True)
    values |= {f"{name}_random": value for name, value in random.items()}
    if "probe_av" in values:
        values["probe_gain"] = values["probe_av"] - random["probe_av"]
    frame = pd.DataFrame({"features": list(PROBES.values())}).assign(
        **{source: [scores.get(name, np.nan) for name in PROBES] for source, scores in columns.items()}
    )
    note = (
        "Top-1 of a logistic regression, and of the 20 nearest neighbours, fitted to the train split's frozen features; "
        "empty where no test clip has the modality, or train clips of fewer than two classes do."
    )
    return values, {"probes": Table(title, frame, note, "bars")}


def _probe(run: Evaluation, phase: str, untrained: bool = False) -> dict[str, float]:
    """probe_a, knn_a, ...: test features by a fit on train features; clips that lack the modality are left out."""
    labels = run.facts.labels["label"]
    splits = []
    for split in ("train", "test"):
        found = run.predict(phase, split, untrained=untrained)
        audio, video = found["audio_feature"].astype(np.float64), found["video_feature"].astype(np.float64)
        both = np.concatenate([_unit(audio), _unit(video)], axis=1)
        splits.append(({"a": audio, "v": video, "av": both}, _truth(run.clips(split), labels)))
    (train, train_truth), (test, truth) = splits
    values = {}
    for name in ("a", "v", "av"):
        seen, asked = _present(train[name]), _present(test[name])
        if not asked.any() or len(np.unique(train_truth[seen])) < 2:
            continue
        data = train[name][seen], train_truth[seen], test[name][asked], truth[asked]
        values |= {f"probe_{name}": metrics.probe_accuracy(*data), f"knn_{name}": metrics.knn_accuracy(*data)}
    return values


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length one, so that neither modality outweighs the other; absent ones become NaN."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, np.nan)


def _present(features: np.ndarray) -> np.ndarray:
    """(N,) bool: a clip without the modality has no finite, non-zero row."""
    return np.isfinite(features).all(1) & (features != 0).any(1)


# --- tables and examples ----------------------------------------------------------------------------------------------


def _predictions(probabilities: np.ndarray, truth: np.ndarray, labels: list[str], clips: Sequence[ClipInfo]) -> Table:
    names, best = np.array(labels, dtype=object), tag_scores.best_tags(probabilities, 5)
    frame = pd.DataFrame({"clip": [c.id for c in clips], "group": [c.group for c in clips], "truth": names[truth]})
    for rank, column in enumerate(best.T, start=1):
        frame[f"prediction_{rank}"] = names[column]
        frame[f"score_{rank}"] = probabilities[np.arange(len(truth)), column]
    return Table("Every clip", frame, "The five most probable classes of every test clip.")


def _examples(
    probabilities: np.ndarray, truth: np.ndarray, labels: list[str], clips: Sequence[ClipInfo]
) -> list[Example]:
    examples = []
    for row in scoring.choose_examples(metrics.top_k(probabilities, truth, 1), probabilities.max(1)):
        best = np.argsort(-probabilities[row], kind="stable")[:5]
        predictions = [(labels[i], float(probabilities[row, i])) for i in best]
        examples.append(Example(clips[row].id, labels[truth[row]], predictions))
    return examples
