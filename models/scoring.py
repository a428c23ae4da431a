"""What a report says of a classifier: its scores, what each modality is worth, its classes, and clips to look at.

Truth is (N,) int64, the index of the right class; rows are (N, C) probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import softmax

from models import metrics
from models.family import ClipInfo, Evaluation, InputError, Table

HIDDEN = {"": "", "audio": "video", "video": "audio"}  # metric prefix -> the modality to hide
COLUMNS = {"both": "", "audio only": "audio", "video only": "video", "late fusion": "late"}
NUM_EXAMPLES = 12


def probabilities(run: Evaluation, drop: str, key: str = "logits") -> np.ndarray:
    """(N, C) of the test clips from the fine-tuned model, with one modality hidden where `drop` names it."""
    logits = run.predict("finetune", "test", drop=drop)[key].astype(np.float64)
    lost = np.flatnonzero(~np.isfinite(logits).all(1))
    if len(lost):
        clip = run.clips("test")[lost[0]].id
        raise InputError(f"the finetune checkpoint answers clip {clip} with NaN: it diverged; train it at a lower lr")
    return softmax(logits, axis=1)


def class_indices(clips: Sequence[ClipInfo], head: str, labels: Sequence[str]) -> np.ndarray:
    """(N,) index of each clip's class, -1 where it is None; InputError for one that training never saw."""
    index: dict[str | None, int] = {name: i for i, name in enumerate(labels)}
    index[None] = -1
    for clip in clips:
        if clip.annotation[head] not in index:
            known = ", ".join(labels)
            raise InputError(f"clip {clip.id}: {head} {clip.annotation[head]!r} was not in training; known: {known}")
    return np.array([index[clip.annotation[head]] for clip in clips])


def scores(rows: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Every measure of a classifier, in [0, 1]."""
    counts = metrics.confusion(truth, rows.argmax(1), rows.shape[1])
    return {
        "top1": float(metrics.top_k(rows, truth, 1).mean()),
        "top5": float(metrics.top_k(rows, truth, 5).mean()),
        "balanced_accuracy": metrics.balanced_accuracy(counts),
        "macro_f1": metrics.macro_f1(counts),
        "weighted_f1": metrics.weighted_f1(counts),
        "map": float(np.nanmean(metrics.average_precisions(rows, truth))),
        "ece": metrics.calibration_error(rows, truth),
    }


def modality_table(each: dict[str, dict[str, float]], measures: Sequence[str], title: str) -> Table:
    """Measures in rows; in columns what was hidden, by metric prefix, and the late fusion where there is one."""
    frame = pd.DataFrame({"measure": [metrics.full_name(name) for name in measures]}).assign(
        **{column: [each[prefix][name] for name in measures] for column, prefix in COLUMNS.items() if prefix in each}
    )
    note = "The same fine-tuned model each time. Late fusion: the mean of audio-only and video-only probabilities."
    return Table(title, frame, note, "bars")


def shapley_table(split: dict[str, float], both: float, neither: float, measure: str) -> Table:
    """The parts that add up to the score with both modalities."""
    parts = {
        "most frequent class": neither,
        "audio adds": split["shapley_audio"],
        "video adds": split["shapley_video"],
        "both": both,
    }
    return Table(
        f"What each modality adds to {measure}",
        pd.DataFrame({"part": list(parts), measure: list(parts.values())}),
        "Two-player Shapley split: the first three rows add up to the last.",
    )


def confusion_of_modalities(astray: dict[str, float], num_clips: int, title: str) -> Table:
    """Clips that one modality alone gets right and both together wrong."""
    clips = [round(share * num_clips) for share in astray.values()]
    harmed = {"right with": ["audio", "video", "each alone"], "clips": clips, "share": list(astray.values())}
    note = "Clips on which the other modality did harm (modality confusion, as VGGSounder counts it)."
    return Table(title, pd.DataFrame(harmed), note)


def per_class(rows: np.ndarray, truth: np.ndarray, labels: list[str], title: str) -> Table:
    """Support, precision, recall, F1 and average precision of each class."""
    counts = metrics.confusion(truth, rows.argmax(1), len(labels))
    precision, recall, f1 = metrics.precision_recall_f1(counts)
    frame = pd.DataFrame(
        {"class": labels, "support": counts.sum(1), "precision": precision, "recall": recall, "F1": f1}
    )
    frame["AP"] = metrics.average_precisions(rows, truth)
    return Table(title, frame, "Both modalities. AP is one-vs-rest; empty where the test split lacks the class.")


def confusion(rows: np.ndarray, truth: np.ndarray, labels: list[str], title: str) -> Table:
    """Counts, a row a true class."""
    counts = metrics.confusion(truth, rows.argmax(1), len(labels))
    frame = pd.DataFrame(counts, columns=labels)
    frame.insert(0, "truth", labels, allow_duplicates=True)
    return Table(title, frame, "Rows are the truth, columns what was predicted.", "confusion")


def choose_examples(hit: np.ndarray, confidence: np.ndarray) -> list[int]:
    """Clips to look at, (N,) each: up to half are the most confident mistakes, last; the others are right answers spread
    evenly over the split.
    """
    wrong = np.flatnonzero(~hit)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][: NUM_EXAMPLES // 2]
    right = np.flatnonzero(hit)
    right = right[np.linspace(0, len(right) - 1, min(NUM_EXAMPLES - len(wrong), len(right))).astype(int)]
    return [*right.tolist(), *wrong.tolist()]
