"""EntityScore of FAVDBench: how many of the things that a reference names a caption names too, and how near the others are.

ES = 2RC / (R + C), where R is the share of the reference's nouns that the caption has and C says how alike the nouns of both
are to a T5 encoder (specification in Metrics/EntityScore of FAVDBench). R and the overlap need no weights; C does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.nn import functional

from models.caption_scores import words
from models.parts_of_speech import tags

SENTENCE = re.compile(r"[.!?]+\s+")
LEGACY_FLOOR = 1e-4  # which the published code adds to R


def entities(text: str) -> list[str]:
    """The stems of a caption's nouns, each once, in the order in which they come."""
    from nltk.stem.porter import PorterStemmer  # takes seconds, and only scores are in need of it

    stemmer = PorterStemmer()
    found: dict[str, None] = {}
    for sentence in SENTENCE.split(text):
        tokens = words(sentence)
        nouns = (word for word, tag in zip(tokens, tags(tokens), strict=True) if tag.startswith("NN"))
        found |= dict.fromkeys(stemmer.stem(noun) for noun in nouns)
    return list(found)


def entity_overlap(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """`entity_recall` (R of EntityScore), `entity_precision` and `entity_f1`, each (N,) in [0, 1].

    A clip's reference is its first one. Recall is NaN where that names no thing, precision where the caption names none, F1
    where neither does.
    """
    rows = []
    for candidate, texts in zip(candidates, references, strict=True):
        own, truth = set(entities(candidate)), set(entities(texts[0]))
        rows.append((len(own & truth), len(own), len(truth)))
    shared, own, truth = np.array(rows, dtype=np.float64).reshape(-1, 3).T
    nothing = np.full(len(shared), np.nan)
    return {
        "entity_recall": np.divide(shared, truth, out=nothing.copy(), where=truth > 0),
        "entity_precision": np.divide(shared, own, out=nothing.copy(), where=own > 0),
        "entity_f1": np.divide(2 * shared, own + truth, out=nothing.copy(), where=own + truth > 0),
    }


def entity_score(recall: np.ndarray, likeness: np.ndarray, legacy: bool = False) -> np.ndarray:
    """(N,) EntityScore in [0, 1] from R and C, both (N,); 0 where both are 0, NaN where one is NaN.

    `legacy` adds 1e-4 to R, as the published code does.
    """
    recall = recall + LEGACY_FLOOR * legacy
    total = recall + likeness
    return np.divide(2 * recall * likeness, total, out=np.where(np.isnan(total), np.nan, 0.0), where=total > 0)


def likeness(candidate: Tensor, truth: Tensor) -> float:
    """C of the paper in [0, 1] from one T5 embedding (E,) of the nouns of either caption."""
    return float((functional.cosine_similarity(candidate, truth, dim=0) + 1) / 2)


def legacy_likeness(candidate: Tensor, truth: Tensor) -> float:
    """C of the published code in [0, 1] from T5's states (nouns, L, E) of each noun by itself, padded to a common L.

    The cosine of two nouns is the mean over positions, padding included; each of the candidate's nouns counts with the
    nearest of the truth.
    """
    cosine = functional.cosine_similarity(candidate[:, None], truth[None], dim=-1).mean(-1)  # (nouns, nouns)
    return float(((cosine.amax(1) + 1) / 2).clamp(max=1).mean())
