"""METEOR against what meteor-1.5.jar answered when told to match "exact stem" only, and against brute force."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.meteor import align, meteor, stem

lines = st.lists(st.sampled_from(["a", "dog", "dogs", "runs", "running"]), max_size=5)


@pytest.mark.parametrize(
    ("candidate", "truth", "expected"),
    [
        ("a man speaks", "a man speaks", 1.0),
        ("a man speaks on stage", "a man is speaking on a stage", 0.3536270035818179),
        ("dogs run", "the dog runs fast", 0.18293731737025232),
        ("a b c", "x y z", 0.0),
        ("the man the", "the man", 0.46040449351549445),
        ("dog man playing", "dogs quickly playing", 0.21333333333333335),
        ("dogs man", "dogs white dog", 0.14035087719298242),
    ],
)
def test_a_score_is_that_of_the_original_with_its_first_two_stages(candidate: str, truth: str, expected: float) -> None:
    counts = meteor([candidate], [[truth]])
    assert counts.clips()[0] == pytest.approx(expected, rel=1e-9)
    assert counts.corpus() == pytest.approx(expected, rel=1e-9)


def test_the_best_reference_counts_and_a_corpus_adds_up_counts() -> None:
    candidates, truths = ["a man speaks", "dogs run"], [["two cats", "a man speaks"], ["the dog runs fast"]]
    counts = meteor(candidates, truths)
    assert counts.clips() == pytest.approx([1, 0.18293731737025232])
    assert counts.weighted()(np.array([[1.0, 1], [0, 2]])) == pytest.approx([counts.corpus(), counts.clips()[1]])


def every_alignment(candidate: list[str], truth: list[str]):
    """(loss of unmatched and half-matched words, chunks, distance) of every way to pair words of one stem."""
    for num in range(min(len(candidate), len(truth)) + 1):
        for own in combinations(range(len(candidate)), num):
            for other in permutations(range(len(truth)), num):
                pairs = list(zip(own, other, strict=True))
                if all(stem(candidate[i]) == stem(truth[j]) for i, j in pairs):
                    worth = sum(1.0 if candidate[i] == truth[j] else 0.6 for i, j in pairs)
                    chunks = num - sum((i + 1, j + 1) in pairs for i, j in pairs)
                    yield round(-worth, 6), chunks, sum(abs(i - j) for i, j in pairs)


@settings(max_examples=80, deadline=None)
@given(lines, lines)
def test_the_alignment_is_the_best_of_all(candidate: list[str], truth: list[str]) -> None:
    pairs = align(candidate, truth)
    worth = sum(1.0 if candidate[i] == truth[j] else 0.6 for i, j in pairs)
    chunks = len(pairs) - sum((i + 1, j + 1) in pairs for i, j in pairs)
    found = round(-worth, 6), chunks, sum(abs(i - j) for i, j in pairs)
    assert found == min(every_alignment(candidate, truth))


def test_a_long_caption_of_repeated_words_is_aligned_with_itself() -> None:
    caption = "the man plays the guitar and the crowd claps and the man sings to the crowd " * 8
    assert meteor([caption], [[caption]]).clips() == pytest.approx([1])
