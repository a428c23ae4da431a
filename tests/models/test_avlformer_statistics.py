"""avlformer's numbers on the test split."""

from __future__ import annotations

import numpy as np
import pytest

from models.avlformer.evaluation import Answers, statistics
from models.entity_score import entity_overlap
from models.family import ClipInfo


def answers(captions: list[str], references: list[list[str]]) -> Answers:
    clips = [ClipInfo(str(row), str(row), {}) for row in range(len(captions))]
    return Answers(clips, references, captions, np.ones(len(captions)))


def test_clips_without_a_noun_do_not_count_among_shared_nouns() -> None:
    captions, references = ["a man", "it is", "a dog runs"], [["a man and a guitar"], ["it was"], ["a dog"]]
    found = statistics(answers(captions, references), np.ones(3, bool))["entity_f1"]
    each = entity_overlap(captions, references)["entity_f1"]
    assert np.isnan(each[1])
    weights = np.array([[1.0, 1, 1], [0, 3, 1], [2, 0, 1]])
    expected = [(each[0] + each[2]) / 2, each[2], (2 * each[0] + each[2]) / 3]
    assert found(weights) == pytest.approx(expected)


def test_where_no_clip_has_a_noun_nothing_is_said_of_them() -> None:
    assert "entity_f1" not in statistics(answers(["it is"], [["it was"]]), np.ones(1, bool))
