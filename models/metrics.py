"""Scores of an evaluation: classification, calibration, retrieval, frozen features, the share of each modality."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

from models import tag_scores
from models.family import Batch

FULL_NAMES = {
    "top1": "Top-1 accuracy",
    "top5": "Top-5 accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro-F1",
    "weighted_f1": "Weighted F1",
    "mean_macro_f1": "Macro-F1, mean of the heads",
    "joint_top1": "All heads right",
    "map": "Mean average precision",
    "map_average": "Average mAP, tIoU 0.3 to 0.7",
    **{f"map_{k}0": f"mAP at tIoU 0.{k}" for k in range(3, 8)},
    **{f"recall_at_{k}x": f"Recall@{k}x at tIoU 0.5" for k in (1, 5)},
    "gap": "GAP",
    "gap_20": "GAP@20",
    "hit_at_1": "Hit@1",
    "perr": "PERR",
    "micro_f1": "Micro-F1",
    "ece": "Calibration error (ECE)",
    **{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)},
    "meteor": "METEOR, exact and stem",
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "entity_f1": "Nouns shared, F1",
    "entity_score": "EntityScore",
    "entity_score_legacy": "EntityScore, published code",
    "spice": "SPICE",
    "clip_score": "CLIPScore",
    "audio_score": "AudioScore",
    "audio_score_legacy": "AudioScore, published code",
    "heard": "Last sentence right",
    "r1": "R@1",
    "r1_v2a": "R@1, video to audio",
    "r1_a2v": "R@1, audio to video",
}
HIDING = {"audio": "audio only", "video": "video only", "late": "late fusion"}  # first word of a name -> what it says
ROUNDING = 1e-6  # of similarities of float32 embeddings
COLLAPSED = 0.95  # mean cosine between clips above which an embedding tells nothing apart


def full_name(name: str) -> str:
    """A metric's name as people write it: `audio_species_top1` is "Top-1 accuracy, species, audio only"."""
    if name in FULL_NAMES:
        return FULL_NAMES[name]
    first, _, rest = name.partition("_")
    if first in HIDING and (rest in FULL_NAMES or rest.partition("_")[2] in FULL_NAMES):
        return f"{full_name(rest)}, {HIDING[first]}"
    if rest in FULL_NAMES:
        return f"{FULL_NAMES[rest]}, {first}"
    return name.replace("_", " ")


class MeanMetric:
    """Averages per-sample predictions; NaN marks a clip that lacks the modality and does not count."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.totals = {key: [0.0, 0] for key in keys}

    def update(self, predictions: Batch, batch: Batch) -> None:
        """Take predictions[key] of shape (B,) for every key."""
        for key, total in self.totals.items():
            values = predictions[key].double()
            values = values[~values.isnan()]
            total[0] += float(values.sum())
            total[1] += len(values)

    def compute(self) -> dict[str, float]:
        """Key -> mean; NaN where no clip had a value."""
        return {key: total / count if count else float("nan") for key, (total, count) in self.totals.items()}


class Classification:
    """Scores predictions["logits"] (B, C) against batch[head] (B,), the index of the right class."""

    def __init__(self, head: str, num_classes: int) -> None:
        self.head = head
        self.num_classes = num_classes
        self.logits: list[Tensor] = []
        self.truth: list[Tensor] = []

    def update(self, predictions: Batch, batch: Batch) -> None:
        """Take one batch."""
        self.logits.append(predictions["logits"].float())
        self.truth.append(batch[self.head].long())

    def compute(self) -> dict[str, float]:
        """top1, top5, balanced_accuracy, macro_f1 in [0, 1]; loss is the mean negative log-likelihood in nats."""
        logits, truth = torch.cat(self.logits), torch.cat(self.truth)
        scores, right = logits.numpy(), truth.numpy()
        counts = confusion(right, scores.argmax(1), self.num_classes)
        return {
            "top1": float(top_k(scores, right, 1).mean()),
            "top5": float(top_k(scores, right, 5).mean()),
            "balanced_accuracy": balanced_accuracy(counts),
            "macro_f1": macro_f1(counts),
            "loss": float(functional.cross_entropy(logits.double(), truth)),
        }


class HeadScores:
    """Scores predictions["<head>_logits"] (B, C) against batch[head] (B,) for several heads; label -1 does not count."""

    def __init__(self, num_classes: Mapping[str, int]) -> None:
        self.heads = {head: Classification(head, num) for head, num in num_classes.items()}

    def update(self, predictions: Batch, batch: Batch) -> None:
        """Take one batch."""
        for head, scores in self.heads.items():
            known = batch[head] >= 0
            scores.update({"logits": predictions[f"{head}_logits"][known]}, {head: batch[head][known]})

    def compute(self) -> dict[str, float]:
        """<head>_top1, <head>_macro_f1, <head>_loss, and mean_macro_f1 over the heads; NaN for a head without a label."""
        found: dict[str, float] = {}
        for head, scores in self.heads.items():
            values = scores.compute() if sum(map(len, scores.truth)) else {}
            found |= {f"{head}_{name}": values.get(name, float("nan")) for name in ("top1", "macro_f1", "loss")}
        return found | {"mean_macro_f1": float(np.mean([found[f"{head}_macro_f1"] for head in self.heads]))}


class Contrastive:
    """Judges predictions["video_embedding"] and ["audio_embedding"] (B, E), unit length, over the whole split.

    Alignment and uniformity are those of Wang and Isola 2020. A clip that lacks one modality is left out.
    """

    def __init__(self) -> None:
        self.video: list[Tensor] = []
        self.audio: list[Tensor] = []

    def update(self, predictions: Batch, batch: Batch) -> None:
        """Take one batch; has_video and has_audio (B,) tell which clips are pairs."""
        pairs = batch["has_video"].bool() & batch["has_audio"].bool()
        self.video.append(predictions["video_embedding"][pairs].float())
        self.audio.append(predictions["audio_embedding"][pairs].float())

    def compute(self) -> dict[str, float]:
        """r1 (both ways), r1_v2a, r1_a2v, cosine of different clips, alignment, uniformity, collapse (0 or 1)."""
        video, audio = torch.cat(self.video).double().numpy(), torch.cat(self.audio).double().numpy()
        v2a = float(np.mean(retrieval_ranks(video, audio) == 1))
        a2v = float(np.mean(retrieval_ranks(audio, video) == 1))
        cosine = max(mean_cosine(video), mean_cosine(audio))
        return {
            "r1": (v2a + a2v) / 2,
            "r1_v2a": v2a,
            "r1_a2v": a2v,
            "cosine": cosine,
            "alignment": float(np.mean(np.sum((video - audio) ** 2, axis=1))),
            "uniformity": (uniformity(video) + uniformity(audio)) / 2,
            "collapse": float(cosine > COLLAPSED),
        }


def top_k(scores: np.ndarray, truth: np.ndarray, k: int) -> np.ndarray:
    """(N,) bool: is the right class among the k best of (N, C) scores? It loses every tie but with itself."""
    own = scores[np.arange(len(truth)), truth][:, None]
    return np.sum(~(scores < own), axis=1) <= k  # written so that NaN is wrong, too


def confusion(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) counts, row = truth, column = prediction."""
    return np.bincount(truth * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def precision_recall_f1(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per class of (..., C, C) or summarised counts from `confusion`; 0 where nothing was predicted or present."""
    hits, support, predicted = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)
    return tag_scores.precision_recall_f1(hits, predicted, support)


def balanced_accuracy(counts: np.ndarray) -> float:
    """Mean recall over the classes that occur in the truth."""
    return float(precision_recall_f1(counts)[1][counts.sum(1) > 0].mean())


def macro_f1(counts: np.ndarray) -> float:
    """Mean F1 over the classes that occur in the truth."""
    return float(precision_recall_f1(counts)[2][counts.sum(1) > 0].mean())


def weighted_f1(counts: np.ndarray) -> float:
    """Mean F1 over the classes, weighted by how often they occur in the truth."""
    support = counts.sum(1)
    return float(precision_recall_f1(counts)[2] @ support / support.sum())


def average_precisions(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(C,) one-vs-rest average precision of (N, C) scores; NaN for classes absent from the truth."""
    return tag_scores.average_precisions(scores, np.eye(scores.shape[1], dtype=bool)[truth])


def calibration_error(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error of the most probable class."""
    return tag_scores.calibration_error(probabilities.max(1), probabilities.argmax(1) == truth)


def retrieval_ranks(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """(N,) rank, from 1, of gallery row i for query row i, by dot product of (N, E) embeddings of unit length.

    Ties count against the model: rank = 1 + #(better) + #(equal, itself aside): a collapsed embedding scores last, not
    first. Equal is what differs by no more than rounding does, for the same clip may differ so much from batch to batch.
    """
    ranks = np.empty(len(queries), dtype=np.int64)
    rows = np.asarray(gallery, dtype=np.float64)
    for start in range(0, len(queries), 1024):  # 1024 x N similarities at a time
        scores = np.asarray(queries[start : start + 1024], dtype=np.float64) @ rows.T
        own = np.diagonal(scores, offset=start)[:, None]
        ranks[start : start + 1024] = (scores >= own - ROUNDING).sum(1)
    return ranks


def retrieval(video: np.ndarray, audio: np.ndarray) -> dict[str, float]:
    """r1, r5, r10 in [0, 1] and median_rank, each with _v2a and _a2v; row i of both (N, E) is one clip."""
    metrics: dict[str, float] = {}
    for name, ranks in (("v2a", retrieval_ranks(video, audio)), ("a2v", retrieval_ranks(audio, video))):
        metrics |= {f"r{k}_{name}": float(np.mean(ranks <= k)) for k in (1, 5, 10)}
        metrics[f"median_rank_{name}"] = float(np.median(ranks))
    return metrics


def mean_cosine(embeddings: np.ndarray) -> float:
    """Mean cosine between different rows of unit-length (N, E); 0 for a single row."""
    num = len(embeddings)
    total = embeddings.sum(0)
    return float((total @ total - np.sum(embeddings**2)) / (num * (num - 1))) if num > 1 else 0.0


def uniformity(embeddings: np.ndarray) -> float:
    """log mean exp(-2 |x - y|^2) over different rows of unit length (Wang and Isola 2020); 0 = one point."""
    num, total = len(embeddings), 0.0
    for start in range(0, num, 1024):  # |x - y|^2 = 2 - 2 x.y; 1024 x N similarities at a time
        total += float(np.exp(4 * (embeddings[start : start + 1024] @ embeddings.T) - 4).sum())
    itself = np.exp(4 * np.sum(embeddings**2, axis=1) - 4).sum()
    return float(np.log((total - itself) / (num * (num - 1)))) if num > 1 else 0.0


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], groups: Sequence[str], num_bootstrap: int, seed: int
) -> tuple[float, float]:
    """95 % percentile interval of a statistic when whole groups are drawn with replacement.

    `statistic` maps (R, N) weights, how often each clip was drawn in each of R replicates, to (R,) values.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    rng = np.random.default_rng(seed)
    values = []
    step = max(1, min(100, tag_scores.CHUNK // len(member)))  # rounds at once: what they weigh is held as numbers
    for start in range(0, num_bootstrap, step):
        rounds = min(step, num_bootstrap - start)
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=rounds)
        values.append(statistic(drawn[:, member].astype(np.float64)))
    low, high = np.nanpercentile(np.concatenate(values), [2.5, 97.5])
    return float(low), float(high)


def intervals(
    statistics: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    groups: Sequence[str],
    num_bootstrap: int,
    seed: int,
) -> dict[str, float]:
    """`bootstrap` of each statistic under its name: name_low and name_high."""
    found = {name: bootstrap(statistic, groups, num_bootstrap, seed) for name, statistic in statistics.items()}
    return {
        f"{name}_{end}": value for name, pair in found.items() for end, value in zip(("low", "high"), pair, strict=True)
    }


def weighted_mean(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The mean of (N,) values, such as hits, as a statistic for `bootstrap`."""
    return lambda weights: weights @ values.astype(np.float64) / weights.sum(1)


def weighted_macro_f1(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> Callable[[np.ndarray], np.ndarray]:
    """Macro-F1 over the classes drawn, as a statistic for `bootstrap`."""
    eye = np.eye(num_classes, dtype=bool)
    return tag_scores.weighted_macro_f1(eye[truth], eye[predicted])


def shapley(both: float, audio: float, video: float, neither: float) -> dict[str, float]:
    """Two-player Shapley split of a score (SHAPE, Hu et al. 2022): the shares add up to both - neither.

    cooperation > 0: together they give more than the sum of what each gives alone.
    """
    return {
        "shapley_audio": ((both - video) + (audio - neither)) / 2,
        "shapley_video": ((both - audio) + (video - neither)) / 2,
        "cooperation": both - video - audio + neither,
    }


def modality_confusion(both: np.ndarray, audio: np.ndarray, video: np.ndarray) -> dict[str, float]:
    """Shares of clips that one modality alone gets right and both together get wrong (VGGSounder); (N,) bool each."""
    return {
        "mu_a": float(np.mean(audio & ~both)),
        "mu_v": float(np.mean(video & ~both)),
        "mu_av": float(np.mean(audio & video & ~both)),
    }


def knn_accuracy(
    train: np.ndarray,
    train_truth: np.ndarray,
    test: np.ndarray,
    truth: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Weighted nearest-neighbour vote on cosine similarity, weights exp(s / T) (Wu et al. 2018); features (N, D)."""
    bank = functional.normalize(torch.from_numpy(np.asarray(train, dtype=np.float64)), dim=1)
    classes = functional.one_hot(torch.from_numpy(train_truth).long()).double()
    hits = 0
    for start in range(0, len(test), 1024):
        queries = functional.normalize(
            torch.from_numpy(np.asarray(test[start : start + 1024], dtype=np.float64)), dim=1
        )
        near, index = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.einsum("qk,qkc->qc", (near / temperature).exp(), classes[index])
        hits += int(np.sum(votes.argmax(1).numpy() == truth[start : start + 1024]))
    return hits / len(test)


def probe_accuracy(train: np.ndarray, train_truth: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    """Accuracy of a logistic regression on standardised features (N, D); one C for all, so that features compare."""
    scaler = StandardScaler().fit(train)
    classifier = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(train), train_truth)
    return float(classifier.score(scaler.transform(test), truth))
