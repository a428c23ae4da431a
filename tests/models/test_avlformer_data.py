"""avlformer's samples: wordpieces against transformers' tokenizer, chances counted, and what training changes of a clip."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from models import passt
from models.avlformer import data
from models.avlformer.config import FinetuneConfig
from models.avlformer.model import tiny
from models.family import Facts, InputError, Sample
from models.parts_of_speech import tags, word_class

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [
    "a",
    "dog",
    "##gy",
    "##s",
    "bark",
    "##ing",
    ".",
    ",",
    "'",
    "s",
    "t",
    "don",
    "café",
    "cafe",
    "犬",
    "[",
    "]",
    "mask",
]
FACTS = Facts({"wordpiece": [*SPECIAL, *PIECES]}, 0.0, 1.0)
CAPTION = "a tall man slowly plays two old drums in the garden. he sings loudly. birds are heard."
CAPTIONS = [{"caption": CAPTION}, {"caption": "a dog barks at Ünal's car &amp; runs."}]


def config(**changes: Any) -> FinetuneConfig:
    """The tiny config; changes of its model, audio, text and augment too."""
    own = tiny()
    for part, kind in (("audio", own.model.audio), ("text", own.model.text), ("video", own.model.video)):
        inside = {key: changes.pop(key) for key in list(changes) if hasattr(kind, key)}
        changes[part] = replace(kind, **inside)
    own = replace(own, model=replace(own.model, **{k: changes.pop(k) for k in list(changes) if hasattr(own.model, k)}))
    inside = {key: changes.pop(key) for key in list(changes) if hasattr(own.augment, key)}
    return replace(own, augment=replace(own.augment, **inside), **changes)


def sample(seed: int = 0, **changes: Any) -> Sample:
    values: dict[str, Any] = {"id": "a", "frames": None, "wave": None, "annotation": {"caption": "a dog."}}
    values["rng"] = np.random.default_rng(seed)
    return Sample(**values | changes)


# --- the vocabulary ------------------------------------------------------------------------------------------------------


def test_the_datasets_own_vocabulary_is_the_label_map() -> None:
    names = [*SPECIAL, "dog"]
    assert data.labels(CAPTIONS, names) == {"wordpiece": names}
    moved = ["[PAD]", "dog", "[MASK]", "[SEP]", "[UNK]", "[CLS]"]
    assert data.labels([], moved) == {"wordpiece": moved}, "only [PAD] has a fixed place"


@pytest.mark.parametrize("lost", SPECIAL)
def test_a_vocabulary_without_its_special_words_is_refused(lost: str) -> None:
    with pytest.raises(InputError, match=r"vocab\.txt: it must begin with \[PAD\] and have"):
        data.labels(CAPTIONS, [name for name in [*SPECIAL, "dog"] if name != lost])
    with pytest.raises(InputError, match=r"vocab\.txt"):
        data.labels(CAPTIONS, ["dog", *SPECIAL])


def test_without_a_vocabulary_the_captions_words_are_it() -> None:
    names = data.labels(CAPTIONS, [])["wordpiece"]
    assert names[:5] == SPECIAL
    assert len(set(names)) == len(names)
    assert names[5] == ".", "the most frequent word"
    assert {"drums", "&", "unal", "'"} <= set(names), "as the tokenizer parts them, accents dropped"
    assert {"z", "##z"}.isdisjoint(names) and {"b", "##b", "##&"} <= set(names)
    with pytest.raises(InputError, match="no clip of the train split has a caption"):
        data.labels([{"caption": ""}, {}], [])


def test_unknown_words_are_spelt_by_their_letters() -> None:
    facts = Facts(data.labels(CAPTIONS, []), 0.0, 1.0)
    reader, names = data.build_tokenizer(facts), facts.labels["wordpiece"]
    ids, words = data.read_caption(reader, "bats sing Zoë.", 300)
    assert [names[i] for i in ids[1:-1]] == ["b", "##a", "##t", "##s", *["s", "##i", "##n", "##g"], "[UNK]", "."]
    assert words == [-1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 3, -1]
    for annotation in CAPTIONS:
        assert names.index("[UNK]") not in data.read_caption(reader, annotation["caption"], 300)[0]


# --- wordpieces ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer():
    from transformers import BertTokenizer

    return BertTokenizer(vocab={name: place for place, name in enumerate(FACTS.labels["wordpiece"])})


WORDS = st.sampled_from(
    ["a", "dogs", "Doggy", "don't", "CAFÉ", "犬dog", "zebra", "barking.", "x" * 120, "a,dog's", "dog—a"]
)


@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.one_of(WORDS, st.text(st.characters(exclude_categories=["Cs"]), max_size=6))).map(" ".join))
def test_ids_are_those_of_transformers(peer: Any, text: str) -> None:
    text = text.replace("&", "")  # entities are below
    ids, words = data.read_caption(data.build_tokenizer(FACTS), text, 300)
    assert ids == peer(text, truncation=True, max_length=300)["input_ids"]
    parted = data.words_of(text)
    assert [words[0], words[-1]] == [-1, -1]
    assert len(ids) == 300 or max(words) + 1 == len(parted), "a number for each word that `words_of` gives"


def test_a_caption_cut_short_ends_with_sep() -> None:
    ids, words = data.read_caption(data.build_tokenizer(FACTS), "a doggy barking. a dog.", 6)
    assert [FACTS.labels["wordpiece"][i] for i in ids] == ["[CLS]", "a", "dog", "##gy", "bark", "[SEP]"]
    assert words == [-1, 0, 1, 1, 2, -1]


def test_entities_are_read_as_what_they_stand_for() -> None:
    reader = data.build_tokenizer(FACTS)
    assert data.read_caption(reader, "caf&eacute; dog&#39;s", 300) == data.read_caption(reader, "café dog's", 300)
    assert data.words_of("dog&#39;s") == ["dog", "'", "s"]


def test_a_written_mask_is_no_mask() -> None:
    ids, _ = data.read_caption(data.build_tokenizer(FACTS), "a [MASK].", 300)
    assert [FACTS.labels["wordpiece"][i] for i in ids] == ["[CLS]", "a", "[", "mask", "]", ".", "[SEP]"]


# --- which words are asked for -------------------------------------------------------------------------------------------


def read(caption: str) -> tuple[list[str], list[int]]:
    """A caption's words, and the number of each piece's word; words of six letters and more have two pieces."""
    words = data.words_of(caption)
    return words, [-1, *(i for i, word in enumerate(words) for _ in range(1 + (len(word) > 5))), -1]


@given(
    share=st.floats(0.01, 1.0), most=st.integers(1, 80), length=st.integers(2, 320), seed=st.integers(0, 9),
    parts=st.booleans(),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_so_many_words_are_asked_for(share: float, most: int, length: int, seed: int, parts: bool) -> None:
    told = config(mask_prob=share, max_masked=most, masking="parts" if parts else "random")
    words, places = ["dog"] * (length - 2), [-1, *range(length - 2), -1]
    asked = data.choose_asked(words, places, told, np.random.default_rng(seed))
    assert len(asked) == min(max(round(share * length), 1), most, length - 1)
    assert asked.min() >= 1 and asked.max() < length, "[CLS] never"
    assert (np.diff(asked) > 0).all()


def test_every_place_but_the_first_is_asked_for_equally_often() -> None:
    words, places = read(CAPTION)
    told, rng = config(mask_prob=0.25), np.random.default_rng(3)
    counts = Counter(place for _ in range(4000) for place in data.choose_asked(words, places, told, rng).tolist())
    assert set(counts) == set(range(1, len(places)))
    # Places of one draw are without replacement, so that the statistic is below chi-square: the test is mild.
    assert chisquare([counts[place] for place in range(1, len(places))]).pvalue > 0.001


def test_words_of_the_asked_parts_come_first() -> None:
    words, places = read(CAPTION)
    kinds = [word_class(tag) for tag in tags(words)]
    fits = {at for at, word in enumerate(places) if word >= 0 and kinds[word] in ("noun", "adverb")}
    assert 5 <= len(fits) < 11
    for share, seed in [(share, seed) for share in (0.0, 0.3, 0.5, 1.0) for seed in range(30)]:
        told = config(mask_prob=0.5, masking="parts", parts=["noun", "adverb"], parts_share=share)
        asked = set(data.choose_asked(words, places, told, np.random.default_rng(seed)).tolist())
        number = round(0.5 * len(places))
        assert len(asked) == number
        assert len(asked & fits) >= min(int(number * share), len(fits))
    nobody = config(mask_prob=0.5, masking="parts", parts=["number"], parts_share=1.0)
    found = [data.choose_asked(words, places, nobody, np.random.default_rng(seed)).tolist() for seed in range(20)]
    two = places.index(words.index("two"))
    assert all(two in each and len(each) == round(0.5 * len(places)) for each in found), "others follow"


def test_hidden_words_are_berts_eighty_ten_ten() -> None:
    rng, vocab = np.random.default_rng(1), 1000
    ids, asked = np.full(40_001, 7), np.arange(1, 40_001)
    hidden = data.hide(ids, asked, 4, vocab, rng)
    assert (ids == 7).all(), "a copy"
    assert hidden[0] == 7
    drawn = hidden[(hidden != 4) & (hidden != 7)]
    counts = [(hidden == 4).sum(), len(drawn), (hidden[1:] == 7).sum()]
    assert chisquare(counts, np.array([0.8, 0.1, 0.1]) * len(asked)).pvalue > 0.001
    assert kstest(drawn / vocab, "uniform").pvalue > 0.001
    few = data.hide(ids, asked[:10], 4, vocab, rng)
    assert (few[11:] == 7).all(), "nobody else is hidden"


def test_the_text_of_a_clip() -> None:
    told = config(mask_prob=0.5)
    batch = data.transform(told, FACTS, True)(sample(annotation={"caption": "a doggy barking."}))
    assert {key: tuple(batch[key].shape) for key in ("text", "asked", "num_words", "num_asked")} == {
        "text": (8,), "asked": (4,), "num_words": (), "num_asked": (),
    }  # fmt: skip
    assert (batch["num_words"], batch["num_asked"]) == (7, 4)
    assert "read" not in batch
    legacy = data.transform(config(mask_prob=0.5, legacy=True), FACTS, True)
    many = [legacy(sample(seed, annotation={"caption": "a doggy barking."})) for seed in range(30)]
    for each in many:
        changed = (each["read"] != each["text"]).nonzero()[:, 0].tolist()
        assert set(changed) <= set(each["asked"].tolist())
    assert any((each["read"] == 4).any() for each in many)
    assert "text" not in data.transform(told, FACTS, False)(sample(annotation={}))


# --- pictures ------------------------------------------------------------------------------------------------------------


def ramp(height: int, width: int) -> np.ndarray:
    """(2, H, W, 3): red grows to the right, green downwards."""
    frames = np.full((2, height, width, 3), 9, np.uint8)
    frames[..., 0], frames[..., 1] = np.arange(width), np.arange(height)[:, None]
    return frames


@pytest.mark.parametrize("min_area", [1.0, 0.4])
def test_training_crops_lie_within_the_picture_and_are_never_flipped(min_area: float) -> None:
    apply = data.transform(config(min_area=min_area), FACTS, True)
    seen = [apply(sample(seed, frames=ramp(48, 96)))["frames"].int() for seed in range(60)]
    for each in seen:
        assert each.shape == (2, 3, 32, 32)
        assert (each[:, 0].diff(dim=-1) >= 0).all() and (each[:, 1].diff(dim=-2) >= 0).all(), "flipped"
        assert each[:, 0].max() <= 95 and each[:, 1].max() <= 47
        assert (each[0] == each[1]).all(), "one crop for the whole clip"
    lefts, widths = (
        {int(each[0, 0, 0, 0]) for each in seen},
        {int(each[0, 0, 0, -1] - each[0, 0, 0, 0]) for each in seen},
    )
    assert max(lefts) - min(lefts) > 30
    assert (max(widths) - min(widths) <= 1) == (min_area == 1.0), "1 is as wide as the short side is long"


def test_evaluation_sees_the_middle() -> None:
    apply = data.transform(config(min_area=0.4), FACTS, False)
    seen = apply(sample(frames=ramp(48, 96)))["frames"].int()
    assert torch.equal(seen, apply(sample(1, frames=ramp(48, 96)))["frames"].int())
    assert abs(seen[0, 0].float().mean() - 47.5) < 1 and abs(seen[0, 1].float().mean() - 23.5) < 1


# --- sound ---------------------------------------------------------------------------------------------------------------


def test_gain_lies_within_its_range() -> None:
    augment = config(gain=[-7.0, 6.0], roll=0).augment
    wave = np.linspace(-0.5, 0.5, 100, dtype=np.float32)
    rng = np.random.default_rng(0)
    decibels = np.array([20 * np.log10(data.vary(wave, augment, rng)[-1] / 0.5) for _ in range(500)])
    assert kstest(decibels, "uniform", args=(-7, 13)).pvalue > 0.001


def test_the_waveform_turns_by_no_more_than_asked() -> None:
    augment = config(gain=[0.0, 0.0], roll=3).augment
    wave, rng = np.arange(20, dtype=np.float32), np.random.default_rng(0)
    turns = Counter(int(data.vary(wave, augment, rng).argmin()) for _ in range(400))
    assert {(turn + 10) % 20 - 10 for turn in turns} == set(range(-3, 4))
    assert chisquare(list(turns.values())).pvalue > 0.001


def test_evaluation_hears_the_clip_as_it_is() -> None:
    wave = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    batch = data.transform(config(gain=[-7.0, 6.0], roll=50, fmin=9, fmax=1999), FACTS, False)(sample(wave=wave))
    assert torch.equal(batch["wave"][:5000], torch.from_numpy(wave)) and not batch["wave"][5000:].any()
    assert (batch["wave_length"], batch["has_audio"], batch["has_video"]) == (5000, True, False)
    assert not {"bands", "mel_ends"} & set(batch)


def test_the_mel_bank_moves_within_its_range() -> None:
    told = config(sample_rate=32_000, seconds=10.0, num_mel_bins=128, fmin=9, fmax=1999, time_mask=192, freq_mask=48)
    rng = np.random.default_rng(0)
    found = [data.bank(told.model.audio, told.augment, rng) for _ in range(600)]
    low, high = torch.stack([each["mel_ends"] for each in found]).T
    assert set(low.tolist()) == set(range(10))
    assert high.min() >= 14_000 and high.max() <= 16_000
    assert kstest(high.numpy(), "uniform", args=(14_000, 2_000)).pvalue > 0.001
    bands = torch.stack([each["bands"] for each in found])
    assert bands[:, 1].max() <= 192 and bands[:, 3].max() <= 48
    assert (bands[:, 0] + bands[:, 1]).max() <= 1000 and (bands[:, 2] + bands[:, 3]).max() <= 128


# --- patches of sound ----------------------------------------------------------------------------------------------------


@given(number=st.integers(1, 120), left_out=st.integers(0, 119))
def test_kept_rows_are_spread_evenly(number: int, left_out: int) -> None:
    left_out = min(left_out, number - 1)
    found = passt.kept(number, left_out, None)
    assert len(found) == number - left_out
    steps = found.diff()
    assert found.min() >= 0 and found.max() < number
    assert not len(steps) or ((steps >= 1).all() and steps.max() - steps.min() <= 1)
    assert abs(int(found[0]) - (number - 1 - int(found[-1]))) <= 1, "as far from one end as from the other"


PATCHES = {"num_mel_bins": 128, "seconds": 10.0, "patchout_freq": 4, "patchout_time": 40, "sample_rate": 32_000}


def chosen(training: bool, seed: int, **changes: Any) -> tuple[list[int], list[int]]:
    batch = data.transform(config(**PATCHES, **changes), FACTS, training)(sample(seed))
    return batch["rows"].tolist(), batch["columns"].tolist()


@pytest.mark.parametrize("legacy", [False, True])
def test_training_draws_the_patches_it_reads(legacy: bool) -> None:
    seen = [chosen(True, seed, legacy=legacy) for seed in range(300)]
    assert all(rows == sorted(set(rows)) and len(rows) == 8 for rows, _ in seen)
    assert all(columns == sorted(set(columns)) and len(columns) == 59 for _, columns in seen)
    assert len({tuple(columns) for _, columns in seen}) == 300
    assert {row for rows, _ in seen for row in rows} == set(range(12))
    assert {column for _, columns in seen for column in columns} == set(range(99))


def test_evaluation_reads_the_same_patches_of_all_clips() -> None:
    assert chosen(False, 0) == chosen(False, 1)
    rows, columns = chosen(False, 0)
    assert len(rows) * len(columns) == 472
    assert rows == passt.kept(12, 4, None).tolist() and columns == passt.kept(99, 40, None).tolist()


def test_legacy_evaluation_draws_but_the_same_each_time() -> None:
    assert chosen(False, 0, legacy=True) == chosen(False, 0, legacy=True)
    assert chosen(False, 0, legacy=True) != chosen(False, 1, legacy=True)
    caption = data.transform(config(**PATCHES, legacy=True), FACTS, False)
    asked = caption(sample(annotation={}))["columns"].tolist()
    assert asked == chosen(False, 0, legacy=True)[1], "with or without a caption"


def test_a_clips_draws_depend_on_its_seed_alone() -> None:
    apply = data.transform(config(**PATCHES, gain=[-7.0, 6.0], roll=50, min_area=0.5, mask_prob=0.3), FACTS, True)
    given = {"frames": ramp(48, 96), "wave": np.ones(9000, np.float32)}
    first = apply(sample(5, **given))
    for disturb in (random.seed, np.random.seed, torch.manual_seed):
        disturb(1)
    second = apply(sample(5, **given))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
