"""METEOR of captions: how many words two captions share, alike or by their stem, and in how few pieces.

The formula and the English parameters are those of METEOR 1.5 (Denkowski and Lavie 2014), but it is a measure of its own, not
to be compared with the original's numbers. That one also matches synonyms (WordNet) and paraphrases (a table of 60 MB) and
so scores higher; its function words are those frequent in news, ours are written down below; and told to match "exact stem"
only, it leaves out matches by stem for which there is a choice ("dog" where the reference has "dogs" twice), ours takes one.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from models.caption_scores import words

if TYPE_CHECKING:
    from nltk.stem.snowball import EnglishStemmer

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
EXACT, STEM = 1.0, 0.6  # what a match of either kind is worth
WHOLE, HALF = 10, 4  # tenths of a match that a word loses: left out, or matched by its stem
BEAM = 40  # partial alignments that are kept after each word, as many as in the original
COMMON = """
a about after again all also an and another any are as at be because been before being but by can could did do does down
each for from had has have he her here him his how i if in into is it its just may me more most my no not of off on one only
or other our out over own said she should so some such than that the their them then there these they this those through
to under until up was we were what when where which while who will with would you your 's n't
"""
FUNCTION_WORDS = frozenset(COMMON.split())  # that tie others together: they count less


@dataclass(frozen=True)
class Meteor:
    """What METEOR counts of N clips; the score of a corpus is made of sums of these counts, as in the original."""

    counts: np.ndarray  # (N, 6): see `_counts`

    def clips(self) -> np.ndarray:
        """(N,) scores in [0, 1] of each clip by itself."""
        return _score(self.counts)

    def corpus(self) -> float:
        """The score in [0, 1] of all clips together."""
        return float(_score(self.counts.sum(0)))

    def weighted(self) -> Callable[[np.ndarray], np.ndarray]:
        """The score of the corpus as a statistic for models.metrics.bootstrap."""
        return lambda weights: _score(weights @ self.counts)


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Meteor:
    """The counts of METEOR for N candidates, each with that of its references that scores best."""
    rows = []
    for candidate, texts in zip(candidates, references, strict=True):
        assert texts, "a clip without a reference has no score"
        own = words(candidate)
        rows.append(max((_counts(own, words(text)) for text in texts), key=lambda counts: float(_score(counts))))
    return Meteor(np.array(rows, dtype=np.float64).reshape(-1, 6))


def _score(counts: np.ndarray) -> np.ndarray:
    """(...) METEOR from counts (..., 6); 0 where nothing matches."""
    own_right, truth_right, own_all, truth_all, matches, chunks = np.moveaxis(counts, -1, 0)
    precision, recall = own_right / np.maximum(own_all, 1e-9), truth_right / np.maximum(truth_all, 1e-9)
    mean = precision * recall / np.maximum(ALPHA * precision + (1 - ALPHA) * recall, 1e-9)
    return mean * (1 - GAMMA * (chunks / np.maximum(matches, 1e-9)) ** BETA)


def _counts(candidate: Sequence[str], truth: Sequence[str]) -> np.ndarray:
    """(6,) what matches of the candidate and of the reference, both in all, how many words match, in how many chunks.

    The first four are weighted: content words count DELTA, function words 1 - DELTA, matches EXACT or STEM besides.
    """
    pairs = align(candidate, truth)
    weights = [EXACT if candidate[i] == truth[j] else STEM for i, j in pairs]
    chunks = sum(pair not in {(i + 1, j + 1) for i, j in pairs} for pair in pairs)
    if chunks == 1 and len(pairs) == len(candidate) == len(truth):
        chunks = 0  # nothing to find fault with: no penalty
    own_right = sum(_share(candidate[i]) * weight for (i, _), weight in zip(pairs, weights, strict=True))
    truth_right = sum(_share(truth[j]) * weight for (_, j), weight in zip(pairs, weights, strict=True))
    return np.array([own_right, truth_right, sum(map(_share, candidate)), sum(map(_share, truth)), len(pairs), chunks])


def _share(word: str) -> float:
    return 1 - DELTA if word in FUNCTION_WORDS else DELTA


# --- alignment -------------------------------------------------------------------------------------------------------------


# Of the candidate's first words, in the order in which it ranks: what they lost, in tenths of a match; chunks; the sum over the
# matches of how far apart the two places are; the place in the reference that would go on with the last chunk; the places
# that are taken, a bit each; and the pairs. The fourth is -1 where the next word does not match there, and the fifth tells
# only places that a later word matches: alignments that differ in nothing else have the same future.
_Partial = tuple[int, int, int, int, int, tuple[tuple[int, int], ...]]


def align(candidate: Sequence[str], truth: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Pairs of places (candidate, reference) of words that match, each place once, in the candidate's order.

    Most matches, those by the stem counting STEM, then fewest chunks, then places nearest to each other, found by a search
    that keeps the BEAM best partial alignments after each word: exact unless more than BEAM alignments compete.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, word in enumerate(truth):
        places[stem(word)].append(place)
    stems = [stem(word) for word in candidate]
    to_come, own = Counter(stems), [places.get(each, ()) for each in stems]
    open_bits = sum(1 << j for each in set(stems) for j in places.get(each, ()))
    beam: list[_Partial] = [(0, 0, 0, -1, 0, ())]
    for i, word in enumerate(candidate):
        to_come[stems[i]] -= 1
        following = frozenset(own[i + 1]) if i + 1 < len(candidate) else frozenset[int]()
        if not to_come[stems[i]]:
            open_bits &= ~sum(1 << j for j in own[i])
        matching = [(j, 1 << j, 0 if truth[j] == word else HALF) for j in own[i]]
        found: dict[tuple[int, int], _Partial] = {}  # of those with the same future the best
        for lost, chunks, distance, going_on, used, pairs in beam:
            free = [match for match in matching if not used & match[1]]
            steps: list[_Partial] = [
                (lost + loss, chunks + (j != going_on), distance + abs(i - j), j + 1 if j + 1 in following else -1,
                 (used | bit) & open_bits, (*pairs, (i, j)))
                for j, bit, loss in free
            ]  # fmt: skip
            if len(free) <= to_come[stems[i]]:  # else to leave the word out would lose a match
                steps.append((lost + WHOLE, chunks, distance, -1, used & open_bits, pairs))
            for step in steps:
                if (key := step[3:5]) not in found or step < found[key]:
                    found[key] = step
        beam = sorted(found.values())[:BEAM]
    return beam[0][5]


@functools.cache
def stem(word: str) -> str:
    """The word's stem by Snowball's English stemmer ("Porter 2"), as METEOR 1.5 takes it; equal words have equal stems."""
    return _stemmer().stem(word)


@functools.cache
def _stemmer() -> EnglishStemmer:
    from nltk.stem.snowball import EnglishStemmer  # takes seconds, and only scores are in need of it

    return EnglishStemmer()
