"""Which frames videotag takes, how it cuts them, and what it makes of a clip: tables, and the original's own numbers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.family import Facts, InputError, Sample
from models.videotag import config as configs
from models.videotag import data
from models.videotag.model import tiny_tagger
from models.videotag.tsn import tiny_tsn

FACTS = Facts({"tag": ["dog", "cat #1", "cat #2", "bee"]}, -5.0, 4.0)
EXTRACTOR = replace(tiny_tsn(), max_frames=300, short_size=256, target_size=224)


def sample(**changes: Any) -> Sample:
    values: dict[str, Any] = {"id": "a", "frames": None, "wave": None, "annotation": {"tags": [0, 3]}}
    values["rng"] = np.random.default_rng(0)
    return Sample(**values | changes)


# --- classes -------------------------------------------------------------------------------------------------------------


def test_names_that_occur_twice_carry_their_id() -> None:
    clips = [{"tags": [0, 2]}, {"tags": []}]
    assert data.labels(clips, ["cat", "dog", "cat"]) == {"tag": ["cat #0", "dog", "cat #2"]}
    assert data.labels(clips, []) == {"tag": ["0", "1", "2"]}
    assert data.unique(["cat", "cat #0", "cat"]) == ["cat #0", "cat #0 #1", "cat #2"]
    assert data.unique(["cat", "cat #2", "cat"]) == ["cat #0", "cat #2 #1", "cat #2"]
    with pytest.raises(InputError, match="tag 2, but the label file has 2 names"):
        data.labels(clips, ["cat", "dog"])
    with pytest.raises(InputError, match="no clip of the train split has a tag"):
        data.labels([{"tags": []}], ["cat"])


def test_tags_as_a_vector() -> None:
    assert data.multi_hot(sample(), FACTS).tolist() == [1, 0, 0, 1]
    assert data.multi_hot(sample(annotation={"tags": []}), FACTS).tolist() == [0, 0, 0, 0]
    for tags in ([4], [-1]):
        with pytest.raises(InputError, match="clip a: tags"):
            data.multi_hot(sample(annotation={"tags": tags}), FACTS)


# --- which frames --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num", "expected", "coverage"),
    [
        (120, [*range(120), *range(120), *range(60)], 1.0),
        (450, list(range(300)), 0.67),
        (599, list(range(300)), 0.50),
        (600, list(range(0, 600, 2)), 1.0),
        (899, list(range(0, 600, 2)), 0.67),
        (1800, list(range(2, 1800, 6)), 1.0),
    ],
)
def test_the_originals_choice(num: int, expected: list[int], coverage: float) -> None:
    chosen = data.choose_features(replace(EXTRACTOR, sampling="legacy"), num, 25.0)
    assert chosen == expected
    assert min(1.0, 300 * max(num // 300, 1) / num) == pytest.approx(coverage, abs=0.005)
    assert chosen == data.legacy_frames(num, 300, 1, None)


def test_the_originals_choice_in_training() -> None:
    seen = [data.legacy_frames(11, 3, 2, np.random.default_rng(seed)) for seed in range(200)]
    starts = np.array(seen)[:, ::2] - [0, 3, 6]
    assert sorted(np.unique(starts)) == [0, 1], "parts of 3 frames hold runs of 2 at 2 places"
    assert all(run[1::2] == [i + 1 for i in run[::2]] for run in seen)
    assert data.legacy_frames(4, 3, 2, np.random.default_rng(0)) == [0, 1, 1, 2, 2, 3]
    assert data.legacy_frames(2, 3, 1, np.random.default_rng(0)) == [0, 1, 0]


@given(st.integers(1, 2000))
def test_uniform_frames_are_real_and_reach_the_ends(num: int) -> None:
    found = data.uniform_frames(num, 300)
    assert found == [int((i + 0.5) * num / min(num, 300)) for i in range(min(num, 300))]
    assert found == sorted(set(found)) and found[0] >= 0 and found[-1] < num
    assert found[0] == num - 1 - found[-1] or num > 300


def test_uniform_tables() -> None:
    assert data.choose_features(EXTRACTOR, 120, 25.0) == list(range(120))
    assert data.choose_features(EXTRACTOR, 450, 25.0)[:4] == [0, 2, 3, 5]
    assert data.choose_features(EXTRACTOR, 599, 25.0)[-2:] == [596, 598]


def test_frames_by_time() -> None:
    timed = replace(EXTRACTOR, sampling="fps", fps=1.0)
    assert data.choose_features(timed, 250, 25.0) == [12, 37, 62, 87, 112, 137, 162, 187, 212, 237]
    assert data.choose_features(timed, 10, 25.0) == [5], "less than a stretch has a frame all the same"
    assert data.choose_features(timed, 5, 0.5) == [0, 1, 2, 3, 4], "no frame twice"
    assert data.choose_features(timed, 25 * 301, 25.0) == data.uniform_frames(25 * 301, 300)


def test_a_place_of_each_part_of_a_clip() -> None:
    tsn = replace(tiny_tsn(), seg_num=3)
    assert data.choose(tsn, 10, None) == [1, 5, 8]
    assert data.choose(tsn, 2, None) == [0, 1, 1]
    assert data.choose(replace(tsn, seg_len=3), 10, None) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert data.choose(replace(tsn, seg_len=3), 2, None) == [0, 1, 1] * 3
    assert data.choose(replace(tsn, sampling="legacy"), 10, None) == [1, 4, 7]
    seen = np.array([data.choose(tsn, 10, np.random.default_rng(seed)) for seed in range(300)])
    assert [sorted(set(column)) for column in seen.T] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]


def test_each_frame_belongs_to_one_part() -> None:
    seen = np.array([data.segment_frames(12, 3, 1, np.random.default_rng(seed)) for seed in range(300)])
    assert set(seen.flatten().tolist()) == set(range(12))


# --- pictures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "legacy", "keep"),
    [
        ((720, 1280), (256, 341), (256, 455)),
        ((1280, 720), (341, 256), (455, 256)),
        ((500, 500), (256, 341), (256, 256)),
        ((256, 900), (256, 900), (256, 900)),
        ((900, 256), (900, 256), (900, 256)),
        ((120, 160), (256, 341), (256, 341)),
    ],
)
def test_sizes_before_the_crop(shape: tuple[int, int], legacy: tuple[int, int], keep: tuple[int, int]) -> None:
    assert data.resized_shape(*shape, 256, "legacy") == legacy
    assert data.resized_shape(*shape, 256, "keep") == keep
    frame = np.zeros((*shape, 3), np.uint8)
    for resize in ("legacy", "keep"):
        assert data.prepare(replace(EXTRACTOR, resize=resize), frame).shape == (224, 224, 3)


def test_the_crop_stands_where_the_originals_did() -> None:
    """341 -> 58 (halves go to even), 256 -> 16: of a picture that is not resized the crop tells its own place."""
    rows, columns = np.meshgrid(np.arange(256), np.arange(341), indexing="ij")
    frame = np.stack([rows, columns % 256, columns // 256], -1).astype(np.uint8)
    assert data.prepare(EXTRACTOR, frame)[0, 0].tolist() == [16, 58, 0]


def test_a_clip_for_tsn() -> None:
    frames = np.random.default_rng(1).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    config = tiny_tsn()
    still = data.tsn_transform(config, FACTS, False)(sample(frames=frames))
    assert (still["frames"].shape, still["frames"].dtype) == ((2, 3, 32, 32), torch.uint8)
    np.testing.assert_array_equal(still["frames"].permute(0, 2, 3, 1).numpy(), frames[:, 4:36, 14:46])
    flipping = data.tsn_transform(replace(config, flip=True), FACTS, True)
    seen = [flipping(sample(frames=frames, rng=np.random.default_rng(i)))["frames"] for i in range(40)]
    turned = [torch.equal(each, still["frames"].flip(-1)) for each in seen]
    assert all(turn or torch.equal(each, still["frames"]) for turn, each in zip(turned, seen, strict=True))
    assert 10 < sum(turned) < 30
    crop = data.tsn_transform(replace(config, min_area=0.3), FACTS, True)(sample(frames=frames))["frames"]
    assert crop.shape == still["frames"].shape and not torch.equal(crop, still["frames"])
    seeds = [np.random.default_rng(i) for i in range(20)]
    both = [
        [
            data.tsn_transform(replace(config, min_area=0.3, flip=flip), FACTS, True)(
                sample(frames=frames, rng=copy.deepcopy(rng))
            )["frames"]
            for flip in (False, True)
        ]
        for rng in seeds
    ]
    turned = [torch.equal(second, first.flip(-1)) for first, second in both]
    assert 3 < sum(turned) < 17
    assert all(turn or torch.equal(*pair) for turn, pair in zip(turned, both, strict=True))
    with pytest.raises(InputError, match="clip a has 2 tags; loss softmax"):
        data.tsn_transform(replace(config, loss="softmax"), FACTS, False)(sample(frames=frames))
    with pytest.raises(InputError, match="clip a has no picture"):
        data.tsn_transform(config, FACTS, False)(sample())


# --- features ------------------------------------------------------------------------------------------------------------


def test_a_clip_for_the_tagger() -> None:
    features = np.arange(4 * 512, dtype=np.float32).reshape(4, 512)
    given = {"features": features, "feature_times": np.arange(4, dtype=np.float32), "wave": np.ones(9, np.float32)}
    config = tiny_tagger()
    batch = data.tagger_transform(config, FACTS, False)(sample(**given))
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "features": (6, 512), "length": (), "times": (6,), "wave": (32000,), "wave_length": (), "has_audio": (),
        "tags": (4,),
    }  # fmt: skip
    assert (batch["length"], batch["wave_length"], batch["has_audio"]) == (4, 9, True)
    np.testing.assert_array_equal(batch["features"].numpy(), np.concatenate([features, np.zeros((2, 512))]))
    short = data.tagger_transform(replace(config, max_frames=2, segment_frames=2), FACTS, False)(sample(**given))
    assert short["times"].tolist() == [1, 3]
    dropping = data.tagger_transform(replace(config, frame_dropout=0.5, mixup=0.4), FACTS, True)
    seen = [dropping(sample(**given, rng=np.random.default_rng(i))) for i in range(200)]
    assert {int(each["length"]) for each in seen} == {1, 2, 3, 4}
    assert all((each["times"][: each["length"]].diff() > 0).all() for each in seen)
    assert all(0 <= each["mix"] <= 1 and each["num_tags"] == 2 for each in seen)
    with pytest.raises(InputError, match="its frames have 512 features; set videotag"):
        wrong = replace(config, model=replace(config.model, feature_dim=2048))
        data.tagger_transform(wrong, FACTS, False)(sample(**given))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"short_size": 20}, r"tsn.short_size is 20; it must be target_size \(32\) or more"),
        ({"seg_num": 0}, "tsn.seg_num is 0; it must be 1 or more"),
        ({"min_area": 0.0}, "tsn.min_area is 0.0; it must be above 0 and at most 1"),
        ({"fps": 0.0}, "tsn.fps is 0.0"),
    ],
)
def test_values_of_tsn_out_of_range_are_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        configs.check_tsn(replace(tiny_tsn(), **changes))


@pytest.mark.parametrize(
    ("changes", "model", "words"),
    [
        ({"segment_frames": 7}, {}, "tagger.segment_frames is 7; it must be from 0 to max_frames"),
        ({"margin": 1.0}, {}, "tagger.margin is 1.0"),
        ({}, {"dropout": 1.0}, "tagger.model.dropout is 1.0"),
        ({}, {"hidden": [4, 0]}, r"tagger.model.hidden is \[4, 0\]"),
        ({}, {"pooling": "nextvlad", "groups": 3}, r"model.groups is 3; it must be a divisor of .*\(1024\)"),
        ({}, {"pooling": "transformer", "heads": 3}, r"model.embedding_size is 16; .* a multiple of heads \(3\)"),
    ],
)
def test_values_of_the_tagger_out_of_range_are_one_line(
    changes: dict[str, Any], model: dict[str, Any], words: str
) -> None:
    config = tiny_tagger()
    with pytest.raises(InputError, match=words):
        configs.check_tagger(replace(config, model=replace(config.model, **model), **changes))
