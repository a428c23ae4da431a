"""Parts of speech, the entities made of them, EntityScore and the JSON that captions come in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from models.caption_json import captions_by_clip, clip_id
from models.entity_score import entities, entity_overlap, entity_score, legacy_likeness, likeness
from models.family import InputError
from models.parts_of_speech import tags, word_class

PREDICTION = (
    "on stage a man speaks. on stage a man speaking had a white head a black suit a white shirt and a red tie. behind the "
    "man is a white wall."
)


def test_words_have_the_tags_of_the_penn_treebank() -> None:
    sentence = ["two", "dogs", "quickly", "run", "over", "the", "green", "grass"]
    assert tags(sentence) == ["CD", "NNS", "RB", "VB", "IN", "DT", "JJ", "NN"]
    assert [word_class(tag) for tag in tags(sentence)] == [
        "number",
        "noun",
        "adverb",
        "verb",
        "other",
        "other",
        "adjective",
        "noun",
    ]


@pytest.mark.parametrize(("tag", "name"), [("PRP$", "noun"), ("VBN", "other"), ("WRB", "adverb"), ("JJS", "adjective")])
def test_classes_are_those_of_the_published_masking(tag: str, name: str) -> None:
    assert word_class(tag) == name


@given(st.lists(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1), max_size=8))
def test_every_word_has_one_tag(sentence: list[str]) -> None:
    found = tags(sentence)
    assert len(found) == len(sentence)
    assert all(found)


def test_entities_are_the_stems_of_nouns_each_once() -> None:
    assert entities(PREDICTION) == ["stage", "man", "head", "suit", "shirt", "tie", "wall"]
    assert entities("it runs.") == []


def test_overlap_counts_stems_of_the_first_reference() -> None:
    found = entity_overlap(
        [PREDICTION, "a man walks", "it runs"], [["a man in suits by walls and a microphone"], ["it runs"], ["a man"]]
    )
    np.testing.assert_allclose(found["entity_recall"], [3 / 4, np.nan, 0])
    np.testing.assert_allclose(found["entity_precision"], [3 / 7, 0, np.nan])
    np.testing.assert_allclose(found["entity_f1"], [6 / 11, 0, 0])


def test_entity_score_is_the_harmonic_mean_and_legacy_adds_a_little() -> None:
    recall, alike = np.array([0.5, 0.0, 0.0, np.nan]), np.array([0.8, 0.8, 0.0, 0.8])
    np.testing.assert_allclose(entity_score(recall, alike), [0.8 / 1.3, 0, 0, np.nan])
    np.testing.assert_allclose(
        entity_score(recall[:2], alike[:2], legacy=True), [2 * 0.5001 * 0.8 / 1.3001, 2e-4 * 0.8 / 0.8001]
    )


def test_likeness_is_half_the_cosine_and_a_half() -> None:
    a = torch.tensor([1.0, 0.0])
    assert [likeness(a, b) for b in (a, torch.tensor([0.0, 2.0]), -a)] == pytest.approx([1, 0.5, 0])


def test_legacy_likeness_follows_the_published_loop() -> None:
    torch.manual_seed(0)
    own, truth = torch.randn(3, 6, 8), torch.randn(2, 6, 8)
    best = [
        min(1.0, max((float(functional.cosine_similarity(p, r, dim=-1).mean()) + 1) / 2 for r in truth)) for p in own
    ]
    assert legacy_likeness(own, truth) == pytest.approx(sum(best) / 3)
    assert legacy_likeness(own, own) == pytest.approx(1)


@pytest.mark.parametrize(
    "content",
    [
        [{"image_id": "test/a_0_5.mp4", "caption": "a man"}, {"image_id": "b.c", "caption": "a dog"}],
        {
            "annotations": [{"image_id": "/x/a_0_5.MP4", "caption": "a man"}, {"image_id": "b.c", "caption": "a dog"}],
            "type": 1,
        },
        {"a_0_5": "a man", "b.c": ["a dog"]},
    ],
)
def test_captions_come_by_clip_whatever_the_shape(content: object) -> None:
    assert captions_by_clip(content, "p.json") == {"a_0_5": ["a man"], "b.c": ["a dog"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image_id": "a", "caption": "x"}, {"image_id": "b"}], "p.json: entry 1 is"),
        ({"annotations": [3]}, "p.json: annotations: entry 0"),
        ({"a": 3}, "p.json: a has no caption"),
        ("text", "p.json: a str;"),
    ],
)
def test_what_is_no_caption_is_named(content: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        captions_by_clip(content, "p.json")


def test_ids_lose_their_folder_and_a_video_extension_only() -> None:
    assert [clip_id(key) for key in ("a.b", "x\\a.webm", "val/-05w_1_2.mp4", "")] == ["a.b", "a", "-05w_1_2", ""]
