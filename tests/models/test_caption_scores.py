"""Caption scores against what coco-caption itself answered once, Java and all, and against the formulas in plain Python."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.caption_scores import bleu, cider_d, longest_common, rouge_l, words
from models.metrics import bootstrap

CANDIDATES = [
    "on stage a man speaks. on stage a man speaking had a white head, a black suit and a red tie. the man doesn't stop "
    "(he's loud) with a.",
    "a woman in a blue t-shirt plays the guitar at 10:30 p.m.",
    "the crowd cheers and the crowd claps.",
    "dogs.",
]
REFERENCES = [
    [
        "inside a man speaks into a microphone. a speech is given by a man with white hair, a black suit, a white shirt "
        "and a red tie. he's loud."
    ],
    [
        "a woman with a blue t-shirt is playing a guitar.",
        "a lady plays the guitar on the stage at 10:30 p.m. and sings. people cheer.",
    ],
    ["people cheer, and the crowd claps loudly!", "the crowd cheers."],
    ["two dogs run over the grass; they bark."],
]
captions = st.lists(st.sampled_from(["a", "man", "dog", "runs", "on", "the"]), max_size=9).map(" ".join)
corpora = st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=3)), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("text", "expected"),  # as Stanford's PTBTokenizer 3.4.1 parts them
    [
        ("A man doesn't stop; he's HAPPY!", "a man does n't stop he 's happy"),
        (
            "it's 10:30 a.m. and Dr. Smith's dog barks at U.S. cars",
            "it 's 10:30 a.m. and dr. smith 's dog barks at u.s. cars",
        ),
        ("3.5 of 1,000 cars at $5 or 50% off & more.", "3.5 of 1,000 cars at $ 5 or 50 % off & more"),
        ("she cannot, won't; they'll gonna sing", "she can not wo n't they 'll gon na sing"),
        ("well-known and/or x-ray 2-3 times -5 #1 @home", "well-known and/or x-ray 2-3 times -5 # 1 @home"),
        ("“quotes” — dash… 'hello' \"you\" the dogs' tails", "quotes dash hello you the dogs tails"),
        ("a woman (30) says: [music]", "a woman -lrb- 30 -rrb- says -lsb- music -rsb-"),
        ("a man speaks.another one. the end", "a man speaks.another one the end"),
        ("rock'n'roll o'clock y'all wow!!! 'tis the 90s", "rock 'n' roll o'clock y' all wow !!! 't is the 90s"),
        ("ok., the man speaks with a.", "ok. the man speaks with a."),
        ("café 你好 20km/h 1990's 5°", "café 你好 20km/h 1990 's 5 °"),
        (" . ,  -- ", ""),
    ],
)
def test_words_are_those_of_the_ptb_tokenizer(text: str, expected: str) -> None:
    assert words(text) == expected.split()


def test_bleu_is_that_of_coco_caption() -> None:
    counts = bleu(CANDIDATES, REFERENCES)
    expected = [0.6359217860221309, 0.5243495706619259, 0.3985621674564303, 0.23076254566307342]
    np.testing.assert_allclose(counts.corpus(), expected, rtol=1e-9)
    clips = [
        [0.5454545454380166, 0.916666666590278, 0.7142857140816329, 0.0009118819637307612],
        [0.4330127018788928, 0.7637626157594335, 0.6900655591369779, 9.118819641867017e-07],
        [0.31155629277736774, 0.5593444709895665, 0.658633755802396, 9.118819643386824e-08],
        [0.17818538589915064, 6.640471005577361e-05, 0.5169731537851542, 2.8836239647789742e-08],
    ]
    np.testing.assert_allclose(counts.clips().T, clips, rtol=1e-9)


def test_rouge_is_that_of_coco_caption() -> None:
    expected = [0.5123359580052493, 0.5930555555555556, 0.7648902821316614, 0.19488817891373802]
    np.testing.assert_allclose(rouge_l(CANDIDATES, REFERENCES), expected, rtol=1e-12)


def test_cider_is_that_of_coco_caption() -> None:
    expected = [2.562765324149466, 2.373273361969037, 3.465428550436589, 0.47697725279409137]
    np.testing.assert_allclose(cider_d(CANDIDATES, REFERENCES), expected, rtol=1e-9)


def grams(caption: str, n: int) -> list[str]:
    tokens = words(caption)
    return [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def looped_bleu(pairs: list[tuple[str, list[str]]], order: int) -> float:
    log, length, closest = 0.0, 0, 0
    for n in range(1, order + 1):
        right = total = 0
        for candidate, truths in pairs:
            for gram in set(grams(candidate, n)):
                right += min(grams(candidate, n).count(gram), max(grams(truth, n).count(gram) for truth in truths))
            total += len(grams(candidate, n))
        log += math.log((right + 1e-15) / (total + 1e-9)) / order
    for candidate, truths in pairs:
        num = len(words(candidate))
        length += num
        closest += sorted((len(words(truth)) for truth in truths), key=lambda found: (abs(found - num), found))[0]
    ratio = (length + 1e-15) / (closest + 1e-9)
    return math.exp(log) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1)


def looped_cider(pairs: list[tuple[str, list[str]]]) -> list[float]:
    def weight(gram: str, n: int) -> float:
        return math.log(len(pairs) / max(1, sum(any(gram in grams(t, n) for t in truths) for _, truths in pairs)))

    def one(candidate: str, truth: str, n: int) -> float:
        a, b = ({g: c * weight(g, n) for g, c in Counter(grams(x, n)).items()} for x in (candidate, truth))
        length = math.sqrt(sum(v**2 for v in a.values())) * math.sqrt(sum(v**2 for v in b.values()))
        apart = len(grams(candidate, 2)) - len(grams(truth, 2))
        dot = sum(min(a.get(g, 0), b[g]) * b[g] for g in b)
        return (dot / length if length else 0) * math.exp(-(apart**2) / 72)

    return [10 * float(np.mean([[one(c, t, n) for n in range(1, 5)] for t in truths])) for c, truths in pairs]


@settings(max_examples=60, deadline=None)
@given(corpora)
def test_bleu_and_cider_follow_their_formulas(pairs: list[tuple[str, list[str]]]) -> None:
    candidates, references = [c for c, _ in pairs], [r for _, r in pairs]
    counts = bleu(candidates, references)
    assert counts.corpus() == pytest.approx([looped_bleu(pairs, order) for order in range(1, 5)], rel=1e-6, abs=1e-12)
    assert cider_d(candidates, references) == pytest.approx(looped_cider(pairs), rel=1e-6, abs=1e-9)


@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
def test_the_longest_common_subsequence_follows_the_recurrence(first: list[str], second: list[str]) -> None:
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    assert longest_common(first, second) == table[-1, -1]


def test_the_weighted_bleu_of_drawn_clips_is_the_bleu_of_that_corpus() -> None:
    counts = bleu(CANDIDATES, REFERENCES)
    drawn = [0, 2, 2, 1]
    again = bleu([CANDIDATES[i] for i in drawn], [REFERENCES[i] for i in drawn])
    for order in range(1, 5):
        statistic = counts.weighted(order)
        assert statistic(np.array([[1.0, 1, 2, 0]])) == pytest.approx(again.corpus()[order - 1])
    low, high = bootstrap(counts.weighted(1), list("abcd"), 200, 0)
    assert low < counts.corpus()[0] < high


def test_the_same_words_score_full_marks_and_no_words_score_none() -> None:
    same = ["a man plays the guitar", "two dogs run over green grass", ""]
    truths = [["a man plays the guitar"], ["two dogs run over green grass"], ["a cat sleeps here"]]
    assert rouge_l(same, truths) == pytest.approx([1, 1, 0])
    assert bleu(same[:2], truths[:2]).corpus() == pytest.approx(np.ones(4))
    assert cider_d(same, truths) == pytest.approx([10, 10, 0])
