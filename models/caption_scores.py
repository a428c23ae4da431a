"""Scores of captions by the words that they share with references: BLEU, ROUGE-L and CIDEr-D as coco-caption has them.

No Java: the words are those of Stanford's PTB tokenizer 3.4.1, by a rule written for captions. METEOR is in models/meteor.py.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

ORDERS = 4  # n-grams of 1 to 4 words
PUNCTUATION = frozenset(("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:-;", "--", "..."))
# What the tokenizer writes in the place of a character. In lower case, as coco-caption asks for it, the names of brackets
# are no longer in its list of punctuation: they stay, there and here.
SUBSTITUTES = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "...", "€": "$", "£": "#", "«": '"', "»": '"'}
)
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
CLITICS = r"'(?:s|m|d|ll|re|ve)(?![\w'])"
ABBREVIATIONS = (
    "mr|mrs|ms|dr|prof|rev|gen|lt|sen|rep|gov|st|mt|jr|sr|vs|etc|inc|ltd|co|corp|dept|ave|blvd"
    "|jan|feb|aug|sept|oct|nov|dec"
)
TOKEN = re.compile(
    rf"""
    https?://\S+ | www\.\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+ | </?[a-z][^<>]*>  # addresses, tags
    | \b(?:(?:{ABBREVIATIONS}|ph\.d)\.(?!\w)|no\.(?=\s*\d)) | \b(?:[a-z]\.)+(?!\w) | \w+\.(?=[,;]) | -[lr][rsc]b-  # mr. u.s. a.
    | (?:can(?=not\b) | gon(?=na\b) | wan(?=na\b) | got(?=ta\b) | lem(?=me\b) | gim(?=me\b))
    | '(?:tis|twas|em|cause)\b | '\d\ds\b | 'n'(?!\s*$) | ol'(?!\w) | {CLITICS} | n't\b | c\+\+ | \b[cf]\#
    | \w+?(?=n't\b) | y'(?=all\b) | [+-]?(?<!\w)\d+(?:[.,:/-]\d+)+(?!\w)
    | (?:(?<!\w)[+-](?=\d))?\w+(?:(?:[/.-]|(?!{CLITICS}|'n'|(?<=\d)'\d)'(?!\s|$))\w+)*
    | @\w+ | \.{{3}} | -{{2,}} | [!?]+ | \S
    """,
    re.VERBOSE,
)


# --- words -----------------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """A caption's words in lower case without punctuation; "doesn't" is two, "t-shirt", "u.s." and "10:30" are one."""
    found: list[str] = []
    for token in map(str, TOKEN.findall(html.unescape(text).lower().translate(SUBSTITUTES))):
        if token[:2] in ("'t", "n'") and token in ("'tis", "'twas"):
            found += ["'t", token[2:]]
        elif token not in PUNCTUATION and token != '"':
            found.append(BRACKETS.get(token, token))
    return found


def _tokenised(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Each clip's candidate and references as words; every clip has a reference."""
    for candidate, texts in zip(candidates, references, strict=True):
        assert texts, "a clip without a reference has no score"
        yield words(candidate), [words(text) for text in texts]


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


# --- BLEU ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bleu:
    """What BLEU counts of N clips; the score of a corpus is made of sums of these counts, not of the clips' scores."""

    matches: np.ndarray  # (N, 4) n-grams of the candidate that a reference has as often
    guesses: np.ndarray  # (N, 4) n-grams of the candidate
    length: np.ndarray  # (N,) words of the candidate
    closest: np.ndarray  # (N,) words of the reference nearest to that in length, the shorter one of two

    def clips(self) -> np.ndarray:
        """(N, 4) BLEU-1 to BLEU-4 in [0, 1] of each clip by itself."""
        return _bleu(self.matches, self.guesses, self.length, self.closest)

    def corpus(self) -> np.ndarray:
        """(4,) BLEU-1 to BLEU-4 in [0, 1] of all clips together."""
        return _bleu(self.matches.sum(0), self.guesses.sum(0), self.length.sum(), self.closest.sum())

    def weighted(self, order: int) -> Callable[[np.ndarray], np.ndarray]:
        """BLEU-`order` of the corpus, 1 to 4, as a statistic for models.metrics.bootstrap."""
        return lambda weights: _bleu(
            weights @ self.matches, weights @ self.guesses, weights @ self.length, weights @ self.closest
        )[:, order - 1]


def _bleu(matches: np.ndarray, guesses: np.ndarray, length: np.ndarray, closest: np.ndarray) -> np.ndarray:
    """(..., 4) BLEU from counts (..., 4) and lengths (...), with coco-caption's guards against division by zero."""
    precision = (matches + 1e-15) / (guesses + 1e-9)
    ratio = (length + 1e-15) / (closest + 1e-9)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    return np.exp(np.log(precision).cumsum(-1) / np.arange(1, ORDERS + 1)) * np.asarray(brevity)[..., None]


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Bleu:
    """The counts of BLEU for N candidates and the references of each (Papineni et al. 2002)."""
    rows = []
    for candidate, truths in _tokenised(candidates, references):
        matches, guesses = [], []
        for n in range(1, ORDERS + 1):
            most: Counter[tuple[str, ...]] = Counter()
            for truth in truths:
                most |= _ngrams(truth, n)
            matches.append((_ngrams(candidate, n) & most).total())
            guesses.append(max(0, len(candidate) - n + 1))
        closest = min((len(truth) for truth in truths), key=lambda length: (abs(length - len(candidate)), length))
        rows.append([*matches, *guesses, len(candidate), closest])
    counts = np.array(rows, dtype=np.float64).reshape(-1, 2 * ORDERS + 2)
    return Bleu(counts[:, :ORDERS], counts[:, ORDERS:-2], counts[:, -2], counts[:, -1])


# --- ROUGE-L ---------------------------------------------------------------------------------------------------------------


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]], beta: float = 1.2) -> np.ndarray:
    """(N,) ROUGE-L in [0, 1] (Lin 2004); precision and recall are each the best over the references. Corpus: the mean."""
    scores = []
    for candidate, truths in _tokenised(candidates, references):
        common = [longest_common(candidate, truth) for truth in truths]
        precision = max(common) / max(len(candidate), 1)
        recall = max(shared / max(len(truth), 1) for shared, truth in zip(common, truths, strict=True))
        below = recall + beta**2 * precision
        scores.append((1 + beta**2) * precision * recall / below if precision and recall else 0.0)
    return np.array(scores, dtype=np.float64)


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time in the bits of one number (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(first)) - 1
    row = every
    for word in second:
        kept = row & places.get(word, 0)
        row = ((row + kept) | (row - kept)) & every
    return len(first) - row.bit_count()


# --- CIDEr-D ---------------------------------------------------------------------------------------------------------------

Vectors = list[dict[tuple[str, ...], float]]  # of the orders 1 to 4: n-gram -> how often, times how rare


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]], sigma: float = 6.0) -> np.ndarray:
    """(N,) CIDEr-D in [0, 10] (Vedantam et al. 2015); how rare an n-gram is, these references tell. Corpus: the mean.

    One clip alone scores 0: all its n-grams are in every clip. In a bootstrap the rarity stays that of all N clips.
    """
    tokens = list(_tokenised(candidates, references))
    frequency: Counter[tuple[str, ...]] = Counter()
    for _, truths in tokens:
        frequency.update({ngram for truth in truths for n in range(1, ORDERS + 1) for ngram in _ngrams(truth, n)})
    rarity = {ngram: np.log(len(tokens)) - np.log(count) for ngram, count in frequency.items()}
    unseen = np.log(max(len(tokens), 1))

    def vectors(caption: list[str]) -> Vectors:
        return [
            {ngram: count * rarity.get(ngram, unseen) for ngram, count in _ngrams(caption, n).items()}
            for n in range(1, ORDERS + 1)
        ]

    scores = []
    for candidate, truths in tokens:
        own = vectors(candidate)
        similar = []
        for truth in truths:
            # Lengths in bigrams, as coco-caption takes them: one less than words, but 0 for no word as for one.
            apart = max(len(candidate) - 1, 0) - max(len(truth) - 1, 0)
            similar.append(_similarity(own, vectors(truth)) * np.exp(-(apart**2) / (2 * sigma**2)))
        scores.append(10 * np.mean(similar))
    return np.array(scores, dtype=np.float64)


def _similarity(candidate: Vectors, truth: Vectors) -> float:
    """Mean over the orders of the cosine of two captions, where an n-gram counts at most as much as in the reference."""
    cosines = []
    for own, other in zip(candidate, truth, strict=True):
        shared = sum(min(value, other[ngram]) * other[ngram] for ngram, value in own.items() if ngram in other)
        lengths = np.sqrt(sum(v * v for v in own.values()) * sum(v * v for v in other.values()))
        cosines.append(shared / lengths if lengths else 0.0)
    return float(np.mean(cosines))
