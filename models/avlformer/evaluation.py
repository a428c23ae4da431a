"""What avlformer reports on the test split: scores of its captions, what each modality is worth, and clips to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np
import pandas as pd
import torch

from models import caption_scores, metrics, scoring
from models.avlformer.answers import coco, present, sentences
from models.avlformer.data import HEAD
from models.avlformer.writing import spell
from models.entity_score import entity_overlap
from models.family import Attention, Batch, ClipInfo, Evaluation, Example, Facts, InputError, Results, Table
from models.meteor import meteor
from models.scoring import HIDDEN

Statistic = Callable[[np.ndarray], np.ndarray]
MEASURES = ["cider_d", "bleu_4", "rouge_l", "heard"]  # of the table of modalities
NUM_CONSTANTS = 40  # training captions that are tried as the one answer to all clips
NUM_LENGTHS = 5  # rows of the table of lengths


class CaptionMetrics:
    """Scores written captions against the texts of the batch; it keeps captions, no tensors."""

    def __init__(self, facts: Facts) -> None:
        self.names = facts.labels[HEAD]
        self.captions: list[str] = []
        self.truth: list[str] = []

    def update(self, predictions: Batch, batch: Batch) -> None:
        """Take one batch."""
        self.captions += [spell(row, self.names) for row in predictions["tokens"].tolist()]
        self.truth += [spell(row, self.names) for row in batch["text"].tolist()]

    def compute(self) -> dict[str, float]:
        """CIDEr-D in [0, 10]; BLEU-4, ROUGE-L and how many last sentences are right in [0, 1]."""
        references = [[text] for text in self.truth]
        return {
            "cider_d": float(caption_scores.cider_d(self.captions, references).mean()),
            "bleu_4": float(caption_scores.bleu(self.captions, references).corpus()[3]),
            "rouge_l": float(caption_scores.rouge_l(self.captions, references).mean()),
            "heard": float(same_last(self.captions, references).mean()),
        }


@dataclass(frozen=True)
class Answers:
    """What was written about the test clips."""

    clips: list[ClipInfo]
    references: list[list[str]]  # of each clip, one or more
    captions: list[str]
    confidence: np.ndarray  # (N,)


def evaluate(run: Evaluation) -> Results:
    """Score the test split once: CIDEr-D in [0, 10], everything else in [0, 1] unless it is a count."""
    answers = {prefix: read(run, drop) for prefix, drop in HIDDEN.items()}
    whole, sounding = answers[""], run.predict("finetune", "test")["has_sound"] > 0
    found = {prefix: statistics(answer, sounding) for prefix, answer in answers.items()}
    everything = np.ones((1, len(whole.clips)))
    each = {prefix: {k: float(s(everything)[0]) for k, s in own.items()} for prefix, own in found.items()}
    values = {f"{prefix}_{k}" if prefix else k: v for prefix, own in each.items() for k, v in own.items()}
    values |= metrics.intervals(found[""], [clip.group for clip in whole.clips], run.num_bootstrap, run.seed)
    values |= {"constant_cider_d": best_constant(run, whole.references), "num_clips": float(len(whole.clips))}
    judged = run.judge("test", whole.captions, whole.references)
    values |= {name: float(np.nanmean(scores)) for name, scores in judged.items() if np.isfinite(scores).any()}
    tables = {
        "modalities": modality_table(each),
        "sentences": sentence_table(whole),
        "lengths": length_table(whole),
        "predictions": Table("Every clip", predictions(whole, judged)),
    }
    files = coco({clip.id: answer for clip, answer in zip(whole.clips, shown(whole), strict=True)}, run.facts)
    return Results({k: v for k, v in values.items() if np.isfinite(v)}, tables, examples(run, whole), files)


def read(run: Evaluation, drop: str) -> Answers:
    """Captions of the test clips with one modality hidden where `drop` names it."""
    clips, told = run.clips("test"), run.predict("finetune", "test", drop=drop)
    references = [list(clip.annotation.get("captions") or [clip.annotation.get("caption", "")]) for clip in clips]
    untold = [clip.id for clip, own in zip(clips, references, strict=True) if not all(own)]
    if untold:
        raise InputError(f"clip {untold[0]} of the test split has no caption; evaluation needs one to compare with")
    answers = present({name: torch.from_numpy(told[name]) for name in ("tokens", "confidence")}, run.facts)
    lost = np.flatnonzero(~np.isfinite(told["confidence"]))
    if len(lost):
        raise InputError(
            f"the checkpoint answers clip {clips[lost[0]].id} with NaN: it diverged; train it at a lower lr"
        )
    return Answers(clips, references, [answer["caption"] for answer in answers], told["confidence"].astype(np.float64))


def shown(found: Answers) -> list[dict[str, Any]]:
    """The answers as `present` gives them."""
    pairs = zip(found.captions, found.confidence.tolist(), strict=True)
    return [{"caption": caption, "confidence": confidence} for caption, confidence in pairs]


def cider(table: pd.DataFrame) -> Statistic:
    """The headline out of the table `predictions`, as a statistic for models.metrics.bootstrap."""
    return metrics.weighted_mean(table["cider_d"].to_numpy(float))


# --- numbers ---------------------------------------------------------------------------------------------------------------


def statistics(found: Answers, sounding: np.ndarray) -> dict[str, Statistic]:
    """The numbers that have intervals, as statistics of clips; `heard` counts those alone that are `sounding` (N,) bool."""
    captions, references = found.captions, found.references
    counts = caption_scores.bleu(captions, references)
    named: dict[str, Statistic] = {"cider_d": metrics.weighted_mean(caption_scores.cider_d(captions, references))}
    named |= {f"bleu_{order}": counts.weighted(order) for order in range(1, caption_scores.ORDERS + 1)}
    named["meteor"] = meteor(captions, references).weighted()
    named["rouge_l"] = metrics.weighted_mean(caption_scores.rouge_l(captions, references))
    shared = entity_overlap(captions, references)["entity_f1"]
    if (told := np.isfinite(shared)).any():
        named["entity_f1"] = lambda weights: weights @ np.nan_to_num(shared) / np.maximum(weights @ told, 1e-9)
    if sounding.any():
        right = same_last(captions, references)
        named["heard"] = lambda weights: weights @ (right & sounding) / np.maximum(weights @ sounding, 1e-9)
    return named


def same_last(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(N,) bool: is the last sentence, which tells the sound, that of a reference word by word?"""

    def last(text: str) -> list[str]:
        return caption_scores.words((sentences(text) or [""])[-1])

    pairs = zip(captions, references, strict=True)
    return np.array([last(caption) in [last(text) for text in own] for caption, own in pairs], dtype=bool)


def best_constant(run: Evaluation, references: list[list[str]]) -> float:
    """CIDEr-D of the training caption, of NUM_CONSTANTS from all over the split, that answers all test clips best."""
    train = sorted({clip.annotation["caption"] for clip in run.clips("train")})
    tried = [train[int(row)] for row in np.linspace(0, len(train) - 1, min(NUM_CONSTANTS, len(train)))]
    # One after the other: together, words that no reference has would count as rarer than they do for one system.
    return max(float(caption_scores.cider_d([text] * len(references), references).mean()) for text in tried)


# --- tables ----------------------------------------------------------------------------------------------------------------


def modality_table(each: dict[str, dict[str, float]]) -> Table:
    """Measures in rows; in columns what was hidden."""
    table = scoring.modality_table(each, [name for name in MEASURES if name in each[""]], "What each modality is worth")
    note = "The same model each time. CIDEr-D goes to 10. The last sentence, word by word, counts for clips with sound."
    return Table(table.title, table.frame, note)


def sentence_table(found: Answers) -> Table:
    """How many of the first, second … sentences are a reference's, word by word."""
    written = [[caption_scores.words(part) for part in sentences(text)] for text in found.captions]
    truth = [[caption_scores.words(part) for part in sentences(own[0])] for own in found.references]
    longest = max(map(len, truth))
    pairs = [list(zip_longest(mine, own)) for mine, own in zip(written, truth, strict=True)]
    rows = []
    for place in range(min(longest, 8)):
        asked = [pair[place] for pair, own in zip(pairs, truth, strict=True) if len(own) > place]
        rows.append((place + 1, len(asked), float(np.mean([mine == own for mine, own in asked]))))
    frame = pd.DataFrame(rows, columns=["sentence", "clips", "right"])
    return Table("Which sentences are right", frame, "Word by word against the first reference, in their places.")


def length_table(found: Answers) -> Table:
    """How long captions and references are, and the score by the reference's length."""
    own = np.array([len(caption_scores.words(text)) for text in found.captions])
    truth = np.array([len(caption_scores.words(texts[0])) for texts in found.references])
    scores = caption_scores.cider_d(found.captions, found.references)
    edges = np.unique(np.quantile(truth, np.linspace(0, 1, NUM_LENGTHS + 1)).round().astype(int))
    edges[-1] += 1
    rows = []
    for low, end in pairwise(edges if len(edges) > 1 else [edges[0] - 1, edges[0]]):
        here = (truth >= low) & (truth < end)
        if here.any():
            span = f"{low} to {end - 1}" if end - 1 > low else f"{low}"
            rows.append((span, int(here.sum()), own[here].mean(), scores[here].mean()))
    frame = pd.DataFrame(rows, columns=["words of the reference", "clips", "words written", "CIDEr-D"])
    return Table("Short and long descriptions", frame, "By the number of words of the first reference.")


def predictions(found: Answers, judged: dict[str, np.ndarray]) -> pd.DataFrame:
    """A row a clip: its references and what was written, with the scores of that."""
    frame = pd.DataFrame({"clip": [clip.id for clip in found.clips], "group": [clip.group for clip in found.clips]})
    frame["truth"] = [" | ".join(texts) for texts in found.references]
    frame["answer"], frame["confidence"] = found.captions, found.confidence
    frame["cider_d"] = caption_scores.cider_d(found.captions, found.references)
    frame["rouge_l"] = caption_scores.rouge_l(found.captions, found.references)
    return frame.assign(**judged)


def examples(run: Evaluation, found: Answers) -> list[Example]:
    """Clips to look at, and what each of their words was taken from."""
    truth = [texts[0] for texts in found.references]
    right = np.array([caption in texts for caption, texts in zip(found.captions, found.references, strict=True)])
    rows = scoring.choose_examples(right, found.confidence)
    seen, names = run.explain("finetune", "test", rows), run.facts.labels[HEAD]
    chosen = []
    for place, row in enumerate(rows):
        tokens = seen["tokens"][place].astype(int)
        tokens = tokens[tokens > 0][:-1]  # without [SEP]
        video, audio = (seen[f"{kind}_attention"][place][: len(tokens)] for kind in ("video", "audio"))
        attention = Attention([names[token] for token in tokens], video, audio)
        answer = [(found.captions[row], float(found.confidence[row]))]
        chosen.append(Example(found.clips[row].id, truth[row], answer, attention=attention))
    return chosen
