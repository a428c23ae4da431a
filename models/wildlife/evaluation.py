"""What wildlife reports on the test split: both heads, the share of each modality, and clips to look at.

"Audio only" and "video only" are the fine-tuned model itself with the other modality hidden, not models trained on one.
A clip counts for a head that it is annotated for, and for the joint accuracy when it is annotated for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd

from models import metrics, scoring
from models.family import ClipInfo, Evaluation, Example, InputError, Results, Table
from models.wildlife.config import HEADS

NUM_DELETION = 32  # test clips, spread over the split, on which the overlays are put to the test
MAPS = ("video_relevance", "audio_relevance")
MEASURES = ("top1", "balanced_accuracy", "macro_f1", "weighted_f1", "map", "ece")


@dataclass(frozen=True)
class Head:
    """One head's answers for the test split."""

    name: str
    labels: list[str]
    truth: np.ndarray  # (N,), -1 where not annotated
    rows: dict[str, np.ndarray]  # metric prefix ("" = both modalities) -> (N, C) probabilities
    majority: int  # the most frequent class of the train split: what a model without inputs would answer

    @property
    def known(self) -> np.ndarray:
        """(N,) bool, which clips are annotated."""
        return self.truth >= 0

    def hits(self, prefix: str) -> np.ndarray:
        """(N,) bool; False where not annotated."""
        return self.rows[prefix].argmax(1) == self.truth


def evaluate(run: Evaluation) -> Results:
    """Score the test split once: all numbers flat, in [0, 1] unless they are counts."""
    clips = run.clips("test")
    heads = [read_head(run, name, clips) for name in HEADS]
    told = [head for head in heads if head.known.any()]
    if not told:
        raise InputError(
            "no clip of the test split is annotated; evaluation needs species or activities to compare with"
        )
    values: dict[str, float] = {"num_clips": float(len(clips))}
    tables: dict[str, Table] = {}
    for head in told:
        part = score_head(head)
        values |= part[0]
        tables |= part[1]
    for prefix in told[0].rows:
        of_heads = [values[f"{prefix}_{head.name}_macro_f1".lstrip("_")] for head in told]
        values[f"{prefix}_mean_macro_f1".lstrip("_")] = float(np.mean(of_heads))
    values |= joint(heads) | intervals(run, heads, told)
    chosen, spread = example_rows(heads, clips), np.unique(np.linspace(0, len(clips) - 1, NUM_DELETION).astype(int))
    seen = run.explain("finetune", "test", [*chosen, *spread.tolist()])
    falling, tables["deletion"] = deletion({name: rows[len(chosen) :] for name, rows in seen.items()}, run, spread)
    note = "The most probable class of each head for every test clip; no truth where it is not annotated."
    tables["predictions"] = Table("Every clip", predictions(heads, clips), note)
    shown = [
        replace(example(heads, row, clips[row].id), **{key: seen[key][i] for key in MAPS})
        for i, row in enumerate(chosen)
    ]
    return Results(values | falling, tables, shown)


def mean_macro_f1(table: pd.DataFrame) -> Callable[[np.ndarray], np.ndarray]:
    """Mean of the heads' macro-F1 out of the table `predictions`, as a statistic for models.metrics.bootstrap."""
    parts = []
    for head in HEADS:
        truth = table[f"{head}_truth"].fillna("").astype(str).to_numpy(dtype=object)
        known = np.flatnonzero(truth != "")
        if len(known):
            predicted = table[f"{head}_prediction"].astype(str).to_numpy(dtype=object)
            names, codes = np.unique(np.concatenate([truth[known], predicted[known]]), return_inverse=True)
            parts.append((known, metrics.weighted_macro_f1(codes[: len(known)], codes[len(known) :], len(names))))
    return lambda weights: np.mean([statistic(weights[:, known]) for known, statistic in parts], axis=0)


def read_head(run: Evaluation, name: str, clips: Sequence[ClipInfo]) -> Head:
    """The head's probabilities with both modalities, with either hidden, and the mean of the two latter."""
    labels = run.facts.labels[name]
    rows = {prefix: scoring.probabilities(run, drop, f"{name}_logits") for prefix, drop in scoring.HIDDEN.items()}
    rows["late"] = (rows["audio"] + rows["video"]) / 2
    train = scoring.class_indices(run.clips("train"), name, labels)
    majority = int(np.bincount(train[train >= 0], minlength=len(labels)).argmax())
    return Head(name, labels, scoring.class_indices(clips, name, labels), rows, majority)


def score_head(head: Head) -> tuple[dict[str, float], dict[str, Table]]:
    """Scores of one head with both modalities, audio only, video only and their late fusion, and what each is worth."""
    name, known = head.name, head.known
    truth, both = head.truth[known], head.rows[""][known]
    each = {prefix: scoring.scores(rows[known], truth) for prefix, rows in head.rows.items()}
    values = {f"{prefix}_{name}_{m}".lstrip("_"): each[prefix][m] for prefix in each for m in MEASURES}
    hits = {prefix: head.hits(prefix)[known] for prefix in head.rows}
    neither = float(np.mean(truth == head.majority))
    split = metrics.shapley(each[""]["top1"], each["audio"]["top1"], each["video"]["top1"], neither)
    astray = metrics.modality_confusion(hits[""], hits["audio"], hits["video"])
    values |= {f"{name}_{key}": value for key, value in (split | astray).items()}
    values |= {f"{name}_num_clips": float(len(truth)), f"{name}_majority_top1": neither}
    shapley = scoring.shapley_table(split, each[""]["top1"], neither, f"{name} top-1 accuracy")
    tables = {
        "modalities": scoring.modality_table(
            each, MEASURES, f"{name.title()} with both modalities, and with one hidden"
        ),
        "per_class": scoring.per_class(both, truth, head.labels, f"{name.title()}, per class"),
        "confusion": scoring.confusion(both, truth, head.labels, f"Confusion of {name}"),
        "shapley": shapley,
        "shapley_per_class": class_shares(head),
        "modality_confusion": scoring.confusion_of_modalities(
            astray, len(truth), f"{name.title()} right with one modality, wrong with both"
        ),
    }
    return values, {f"{name}_{key}": table for key, table in tables.items()}


def class_shares(head: Head) -> Table:
    """The Shapley split of each class's recall, for the classes that the test split has."""
    rows = []
    for index, label in enumerate(head.labels):
        own = head.truth == index
        if own.any():
            both, audio, video = (float(head.hits(prefix)[own].mean()) for prefix in ("", "audio", "video"))
            split = metrics.shapley(both, audio, video, float(index == head.majority))
            shares = {"audio adds": split["shapley_audio"], "video adds": split["shapley_video"]}
            recalls = {"recall": both, "audio only": audio, "video only": video}
            rows.append({"class": label, "support": int(own.sum())} | recalls | shares)
    note = "Recall of each class; what a modality adds starts at always answering the most frequent class of training."
    return Table(f"What each modality adds to each {head.name}", pd.DataFrame(rows), note)


def joint(heads: Sequence[Head]) -> dict[str, float]:
    """Share of the clips annotated for all heads of which every head is right, by what was hidden."""
    known = np.all([head.known for head in heads], axis=0)
    if not known.any():
        return {}
    right = {prefix: np.all([head.hits(prefix) for head in heads], axis=0)[known] for prefix in heads[0].rows}
    return {f"{prefix}_joint_top1".lstrip("_"): float(values.mean()) for prefix, values in right.items()}


def intervals(run: Evaluation, heads: Sequence[Head], told: Sequence[Head]) -> dict[str, float]:
    """95 % bootstrap intervals of the main numbers; clips of one event are drawn together."""
    clips = run.clips("test")
    groups = np.array([clip.group for clip in clips])
    everything = np.arange(len(clips))
    statistics = {
        f"{prefix}_mean_macro_f1".lstrip("_"): (everything, mean_macro_f1(predictions(heads, clips, prefix)))
        for prefix in scoring.HIDDEN
    }
    for head in told:
        known = np.flatnonzero(head.known)
        best, truth = head.rows[""].argmax(1)[known], head.truth[known]
        statistics[f"{head.name}_macro_f1"] = known, metrics.weighted_macro_f1(truth, best, len(head.labels))
        statistics[f"{head.name}_top1"] = known, metrics.weighted_mean(best == truth)
    both = np.flatnonzero(np.all([head.known for head in heads], axis=0))
    if len(both):
        right = np.all([head.hits("")[both] for head in heads], axis=0)
        statistics["joint_top1"] = both, metrics.weighted_mean(right)
    values = {}
    for name, (rows, statistic) in statistics.items():
        values |= metrics.intervals({name: statistic}, groups[rows].tolist(), run.num_bootstrap, run.seed)
    return values


def predictions(heads: Sequence[Head], clips: Sequence[ClipInfo], prefix: str = "") -> pd.DataFrame:
    """Truth, answer and its probability of every test clip and head; no truth where not annotated."""
    frame = pd.DataFrame({"clip": [clip.id for clip in clips], "group": [clip.group for clip in clips]})
    for head in heads:
        names, rows = np.array([*head.labels, ""], dtype=object), head.rows[prefix]
        frame[f"{head.name}_truth"] = names[head.truth]  # -1 takes the last, which is empty
        frame[f"{head.name}_prediction"] = names[rows.argmax(1)]
        frame[f"{head.name}_score"] = rows.max(1)
    return frame


def deletion(seen: dict[str, np.ndarray], run: Evaluation, rows: np.ndarray) -> tuple[dict[str, float], Table]:
    """Whether hiding what attention rollout calls relevant hurts more than hiding at random: areas, curves, and a verdict."""
    curves = {"most relevant first": seen["deletion"], "random order": seen["deletion_random"]}
    areas = {name: np.trapezoid(curve, dx=1 / (curve.shape[1] - 1), axis=1) for name, curve in curves.items()}
    first, random = areas.values()
    groups = [clip.group for clip in run.clips("test")]
    gain = float((random - first).mean())
    low, high = metrics.bootstrap(
        metrics.weighted_mean(random - first), [groups[row] for row in rows], run.num_bootstrap, run.seed
    )
    verdict = "better than chance" if low > 0 else "worse than chance" if high < 0 else "no better than chance"
    note = (
        f"Mean probability of the predicted classes over {len(rows)} test clips, while places of picture and sound are "
        f"hidden. Area {first.mean():.3f} by attention rollout, {random.mean():.3f} at random: {gain:.3f} less "
        f"[{low:.3f}, {high:.3f}], so the overlays below tell what the answer rests on {verdict}."
    )
    share = np.linspace(0, 1, seen["deletion"].shape[1])
    frame = pd.DataFrame({"share hidden": share} | {name: curve.mean(0) for name, curve in curves.items()})
    values = {"deletion_area": float(first.mean()), "deletion_random_area": float(random.mean())}
    return values, Table("Do the overlays show what matters?", frame, note, "lines")


def example_rows(heads: Sequence[Head], clips: Sequence[ClipInfo]) -> list[int]:
    """Clips to look at: right answers from all over the split, and the most confident mistakes."""
    known = [[head for head in heads if head.known[i]] for i in range(len(clips))]
    hit = np.array([bool(own) and all(head.hits("")[i] for head in own) for i, own in enumerate(known)])
    sure = np.array([np.prod([head.rows[""][i].max() for head in own]) for i, own in enumerate(known)])
    told = np.flatnonzero([bool(own) for own in known])
    return told[scoring.choose_examples(hit[told], sure[told])].tolist()


def example(every: Sequence[Head], row: int, clip: str) -> Example:
    """One clip with the five most probable answers of the heads it is annotated for: their probabilities multiplied."""
    heads = [head for head in every if head.known[row]]
    best = [np.argsort(-head.rows[""][row], kind="stable")[:5] for head in heads]
    answers = [
        (
            " · ".join(head.labels[k] for head, k in zip(heads, pair, strict=True)),
            float(np.prod([head.rows[""][row][k] for head, k in zip(heads, pair, strict=True)])),
        )
        for pair in product(*best)
    ]
    truth = " · ".join(head.labels[head.truth[row]] for head in heads)
    return Example(clip, truth, sorted(answers, key=lambda answer: -answer[1])[:5])
