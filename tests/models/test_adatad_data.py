"""adatad's samples: where training windows lie, the time grid from an MP4 to the batch, and pictures changed on the device."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from models import transforms
from models.adatad import data, targets
from models.adatad.config import Augmentation, BackboneConfig, DetectorConfig, FinetuneConfig, ModelConfig
from models.family import Facts, InputError, Sample, Window
from tasks import stores
from tasks.data import manifest, video
from tasks.data.batches import stack
from tasks.data.loader import open_split

FACTS = Facts({"label": ["flash", "jump"]}, 0.0, 1.0)
STILL = Augmentation(min_area=1.0, rand_ops=0, color=0.0, hue=0.0)


def configure(window: int = 16, scale_factor: int = 1, augment: Augmentation = STILL, **changes: Any) -> FinetuneConfig:
    backbone = BackboneConfig(
        model_name="none", mode="adapter", dim=8, num_layers=1, num_heads=2, mlp_dim=8, patch_size=8, tubelet=2,
        chunk_frames=4, frame_size=16, pretrained_grid=2, adapter_dim=4, first_adapter=0, drop_path=0.0,
        checkpointing=False, chunks_at_once=0,
    )  # fmt: skip
    detector = DetectorConfig(dim=8, num_heads=2, mlp_dim=8, stem_layers=1, num_levels=3, drop_path=0.0)
    config = FinetuneConfig(
        model=ModelConfig(backbone, detector, window, scale_factor, max_segments=4), augment=augment,
        keep_threshold=0.75, crop_ratio=[0.9, 1.0], overlap=0.5, center_radius=1.5, label_smoothing=0.0,
        normalizer=100.0, adapter_lr=2.0, min_score=0.001, max_per_window=10, max_per_video=10, nms_sigma=0.7,
        classifier_top=0,
    )  # fmt: skip
    return replace(config, **changes)


def annotation(*segments: tuple[float, float], label: str = "flash") -> dict[str, Any]:
    return {"segments": [[start, end, label] for start, end in segments], "duration": 1e4, "frame": None}


class Scripted:
    """A generator that gives the numbers it was given, and notes between what they were drawn."""

    def __init__(self, *numbers: int) -> None:
        self.numbers, self.asked = list(numbers), list[tuple[int, int]]()

    def integers(self, low: int, high: int, endpoint: bool) -> int:
        assert endpoint and low <= self.numbers[0] <= high
        self.asked.append((low, high))
        return self.numbers.pop(0)


def drawn(config: FinetuneConfig, stored: int, known: dict[str, Any], *numbers: int) -> tuple[tuple[int, int], list]:
    rng: Any = Scripted(*numbers)
    place = data.draw_window(config, stored, known, 1.0, rng)
    assert not rng.numbers
    return place, rng.asked


# --- training windows, one stored frame a second -------------------------------------------------------------------------


def test_a_video_as_long_as_a_window_may_stay_whole() -> None:
    assert drawn(configure(768), 768, annotation((3, 9)), 768) == ((0, 768), [(691, 768)])
    assert drawn(configure(768), 100, annotation((3, 9)), 100) == ((0, 100), [(90, 100)])
    assert drawn(configure(768), 1, annotation((0, 1)), 1) == ((0, 1), [(1, 1)])


def test_a_shorter_one_is_cropped_where_a_segment_is() -> None:
    # 75 of the segment's 100 steps lie within 91 steps from 5 on, and fewer from any step after.
    place, asked = drawn(configure(768), 100, annotation((-20 + 20, 20)), 91, 6, 5)
    assert place == (5, 91) and asked == [(90, 100), (0, 9), (0, 9)]


def test_a_longer_one_is_cut_to_a_window_at_the_first_place_that_shows_enough() -> None:
    # Three of the first segment's four steps are enough, and six of the second's eight.
    config, known = configure(16), annotation((40, 44), (90, 98))
    place, asked = drawn(config, 100, known, 0, 25, 26, 27)
    assert place == (27, 16) and asked == [(0, 84)] * 4, "up to step 43; at 26 only two are seen"
    assert drawn(config, 100, known, 41)[0] == (41, 16)
    assert drawn(config, 100, known, 42, 79, 80)[0] == (80, 16)


def test_after_200_tries_the_last_one_is_taken() -> None:
    place, asked = drawn(
        configure(16), 60, annotation((0, 60)), *range(40), *range(40), *range(40), *range(40), *range(40)
    )
    assert place == (39, 16) and len(asked) == 200
    assert drawn(configure(16), 60, annotation(), *[7] * 200)[0] == (7, 16)


def test_stored_frames_of_a_grid_step_stay_together() -> None:
    config = configure(16, scale_factor=4)
    known = annotation((100, 108))  # 25 to 27 grid steps
    assert drawn(config, 201, known, 25)[0] == (100, 64)
    assert drawn(config, 201, known, 35, 35, 20)[0] == (80, 64), "51 grid steps, the last one of a single frame"
    assert drawn(config, 62, annotation((0, 62)), 15, 1)[0] == (4, 58)
    assert drawn(config, 62, annotation((0, 62)), 16)[0] == (0, 62)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 90),
    st.integers(0, 99),
    st.integers(1, 3),
    st.lists(st.tuples(st.floats(0, 80), st.floats(1, 30)), max_size=4),
)
def test_windows_lie_within_the_video(stored: int, seed: int, scale: int, spans: list[tuple[float, float]]) -> None:
    config, known = configure(16, scale), annotation(*[(start, start + length) for start, length in spans])
    first, length = data.draw_window(config, stored, known, 0.5, np.random.default_rng(seed))
    total = math.ceil(stored / scale)
    assert first % scale == 0 and 0 <= first < first + length <= stored
    steps = math.ceil(length / scale)
    assert steps == 16 if total > 16 else max(round(0.9 * total), 1) <= steps <= total


# --- samples -------------------------------------------------------------------------------------------------------------


def sample(
    frames: int, *segments: tuple[float, float], first: int = 0, step: float = 0.5, seed: int = 0, **more: Any
) -> Sample:
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (frames, 20, 24, 3), dtype=np.uint8)
    place = Window(first, step, duration=1e4, clip=3)
    return Sample("v", pictures, None, annotation(*segments, **more), rng, window=place)


def test_a_batch_has_what_it_should() -> None:
    config = configure(16, augment=Augmentation(0.5, 2, 0.4, 0.1))
    taken = data.transform(config, FACTS, True)
    batch = stack([taken(sample(16, (1.0, 3.0), seed=1)), taken(sample(11, (0.5, 2.0), seed=2))])
    assert batch["frames"].shape == (2, 16, 3, 16, 16) and batch["frames"].dtype == torch.uint8
    assert batch["mask"].tolist() == [[True] * 16, [True] * 11 + [False] * 5]
    assert (batch["frames"][1, 11:] == batch["frames"][1, 10]).all()
    assert batch["segments"].dtype == torch.float32 and batch["classes"].dtype == batch["clip"].dtype == torch.int64
    assert batch["segments"][:, 0].tolist() == [[2.0, 6.0], [1.0, 4.0]] and not batch["segments"][:, 1:].any()
    assert batch["classes"].tolist() == [[0, -1, -1, -1]] * 2 and batch["clip"].tolist() == [3, 3]
    assert batch["color"].shape == (2, 4) and batch["affine"].shape == (2, 2, 3) and batch["solarize"].shape == (2,)
    assert all(value.dtype != torch.float64 for value in batch.values())
    assert data.pictures(batch).shape == batch["frames"].shape
    plain = stack([data.transform(config, FACTS, False)(sample(16, (1.0, 3.0)))])
    assert "color" not in plain and data.pictures(plain) is plain["frames"]


def test_segments_are_cut_to_the_window_in_training_alone() -> None:
    # Half a second a step: steps 12 to 28, 19 to 24, 33 to 37 and 80 to 82, in a window from 20 to 36.
    spans = ((6.0, 14.0), (9.5, 12.0), (16.5, 18.5), (40.0, 41.0))
    one = data.transform(configure(), FACTS, True)(sample(16, *spans, first=20))
    assert one["segments"][:2].tolist() == [[0.0, 4.0], [13.0, 16.0]], "8 of 16 are too few, 4 of 5 and 3 of 4 are not"
    assert one["classes"].tolist() == [0, 0, -1, -1] and float(one["start"]) == 10.0 and float(one["step"]) == 0.5
    whole = data.transform(configure(), FACTS, False)(sample(16, *spans, first=20))
    assert whole["segments"].tolist() == [[-8.0, 8.0], [-1.0, 4.0], [13.0, 17.0], [60.0, 62.0]]
    truth = torch.stack([whole["truth_starts"], whole["truth_ends"]], 1)
    assert truth.tolist() == [list(span) for span in spans] and whole["truth_classes"].tolist() == [0] * 4
    short = data.transform(configure(), FACTS, True)(sample(10, (3.0, 6.0)))
    assert short["segments"][0].tolist() == [0.0, 0.0], "the video ends before: 4 of 6 steps"


def test_a_window_of_several_frames_a_step() -> None:
    one = data.transform(configure(16, scale_factor=4), FACTS, True)(sample(50, (6.0, 14.0), first=8, step=0.25))
    assert one["frames"].shape[0] == 64 and int(one["mask"].sum()) == 13
    assert (float(one["start"]), float(one["step"])) == (2.0, 1.0)
    assert one["segments"][0].tolist() == [4.0, 12.0]


def test_positive_points_are_counted() -> None:
    config = configure()
    one = data.transform(config, FACTS, True)(sample(14, (0.5, 2.5), (1.0, 6.5)))
    assigned = targets.assign(
        targets.points(16, 3), one["segments"][None], one["classes"][None], one["mask"][None], 2, config.center_radius
    )
    assert one["num_positive"] == assigned.positive.sum() > 0


def test_without_annotation_there_is_no_truth() -> None:
    bare = replace(sample(16), annotation={})
    assert set(data.transform(configure(), FACTS, False)(bare)) == {
        "frames",
        "mask",
        "start",
        "step",
        "duration",
        "clip",
    }


def test_what_cannot_be_is_one_line() -> None:
    taken = data.transform(configure(), FACTS, True)
    with pytest.raises(InputError, match=r"video v has 5 segments; set adatad\.model\.max_segments to that or more"):
        taken(sample(16, *[(k, k + 1.0) for k in range(5)]))
    with pytest.raises(InputError, match=r"video v: label 'wave' is not among the 2 of training: \['flash', 'jump'\]"):
        taken(sample(16, (1.0, 2.0), label="wave"))
    for key, value in {"overlap": 1.0, "keep_threshold": 0.0, "crop_ratio": [1.0, 0.9]}.items():
        with pytest.raises(InputError, match=rf"adatad\.finetune\.{key} is"):
            data.clip(configure(**{key: value}))


def test_labels_are_the_sorted_names() -> None:
    videos = [annotation((0, 1), label="b"), annotation((0, 1), (2, 3), label="a"), annotation()]
    assert data.labels(videos) == {"label": ["a", "b"]}
    with pytest.raises(InputError, match="no video of the train split has a segment"):
        data.labels([annotation()])


@pytest.mark.parametrize(("overlap", "scale", "stride"), [(0.5, 1, 384), (0.25, 1, 576), (0.5, 2, 768), (0.0, 1, 768)])
def test_windows_of_evaluation_overlap(overlap: float, scale: int, stride: int) -> None:
    spec = data.clip(configure(768, scale, overlap=overlap))
    assert spec.window is not None and (spec.num_frames, spec.window.stride) == (768 * scale, stride)


# --- the time grid, from a file to the batch -------------------------------------------------------------------------------

FLASH = (7.3, 12.9)  # seconds


@pytest.fixture(scope="module", params=[Fraction(30), Fraction(30000, 1001), Fraction(25, 2)], ids=str)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 20 s, dark but for FLASH, every fourth frame of it stored."""
    root, rate = tmp_path_factory.mktemp("project"), request.param
    path = root / "data/toy/raw/v.mp4"
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("h264", rate=rate, options={"preset": "ultrafast"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(round(20 * rate)):
            shown = FLASH[0] <= number / rate < FLASH[1]
            picture = np.full((32, 32, 3), 220 if shown else 20, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    row = {
        "id": "v", "path": "raw/v.mp4", "split": "train", "group": "v", "start": 0.0, **video.probe(path).__dict__,
        "has_video": True, "checksum": "", "annotation": json.dumps(annotation(FLASH)),
    }  # fmt: skip
    before = Path.cwd()
    os.chdir(root)
    try:
        manifest.write(pd.DataFrame([row]), manifest.manifest_path("toy"))
        stores.stores("toy", stores.Stores(0, 4, 0, 95, 16000, "pcm16", 1, 1, "processes", 0.0))
    finally:
        os.chdir(before)
    return root


@pytest.mark.parametrize(("training", "scale"), [(True, 1), (False, 1), (True, 2), (False, 2)])
def test_an_event_lands_where_its_frames_are(
    project: Path, monkeypatch: pytest.MonkeyPatch, training: bool, scale: int
) -> None:
    monkeypatch.chdir(project)
    config = configure(48 // scale, scale, keep_threshold=0.2)
    clips = open_split("toy", "train", data.clip(config), data.transform(config, FACTS, training), 3, training)
    items = [clips[epoch, row] for epoch in range(8 if training else 1) for row in range(len(clips))]
    assert len({float(item["start"]) for item in items}) > 1, "windows from several places"
    edges = 0
    for item in items:
        bright = item["frames"].float().mean((1, 2, 3)) > 120
        step, valid = float(item["step"]) / scale, int(item["mask"].sum()) * scale
        times = float(item["start"]) + step * np.arange(len(bright))
        for k in range(1, min(valid, len(bright))):
            if bright[k] != bright[k - 1]:
                edge = FLASH[0] if bright[k] else FLASH[1]
                assert times[k - 1] < edge + 1e-4 and edge <= times[k] + 1e-4
                place = (edge - float(item["start"])) / float(item["step"])
                assert place == pytest.approx(float(item["segments"][0, 0 if bright[k] else 1]), abs=1e-3)
                edges += 1
        assert float(item["duration"]) == pytest.approx(20.0, abs=0.05)
    assert edges >= 2


# --- pictures changed on the device ----------------------------------------------------------------------------------------


def pictures(low: int = 60, high: int = 180) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(low, high, (2, 3, 3, 8, 10), dtype=np.uint8))


def color(brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0, hue: float = 0.0) -> Tensor:
    return torch.tensor([[brightness, contrast, saturation, hue], [1.0, 1.0, 1.0, 0.0]])


@pytest.mark.parametrize("factor", [0.6, 1.3])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_are_torchvisions(name: str, factor: float) -> None:
    frames = pictures().float()
    found = transforms.recolored(frames, color(**{name: factor}))
    expected = getattr(reference, f"adjust_{name}")(frames[0] / 255, factor) * 255
    torch.testing.assert_close(found[0], expected, atol=0.15, rtol=0)
    torch.testing.assert_close(found[1], frames[1], atol=0.1, rtol=0)


def test_the_hue_turns_and_luma_stays() -> None:
    frames = pictures().float()
    turned = transforms.recolored(frames, color(hue=0.1))
    luma = torch.tensor(transforms.TO_YIQ[0])
    torch.testing.assert_close(
        torch.einsum("btchw,c->bthw", turned, luma), torch.einsum("btchw,c->bthw", frames, luma), atol=0.05, rtol=0
    )
    assert (turned[0] - frames[0]).abs().mean() > 5
    torch.testing.assert_close(transforms.recolored(frames, color(hue=1.0)), frames, atol=0.1, rtol=0)
    grey = frames[:, :, :1].expand(-1, -1, 3, -1, -1)
    torch.testing.assert_close(transforms.recolored(grey, color(hue=0.3)), grey, atol=0.1, rtol=0)
    twice = transforms.recolored(transforms.recolored(frames, color(hue=0.1)), color(hue=-0.1))
    torch.testing.assert_close(twice, frames, atol=0.1, rtol=0)


def test_points_are_moved() -> None:
    frames = torch.rand(2, 3, 3, 8, 8) * 255
    identity = np.eye(3)
    quarter = transforms._affine("rotate", 90.0)
    affine = torch.tensor(np.stack([quarter[:2], identity[:2]]), dtype=torch.float32)
    found = transforms.moved(frames, affine)
    torch.testing.assert_close(found[0], torch.rot90(frames[0], 1, (-2, -1)), atol=0.01, rtol=0)
    torch.testing.assert_close(found[1], frames[1], atol=0.01, rtol=0)
    half = torch.tensor(np.stack([transforms._affine("translate_x", 0.5)[:2]] * 2), dtype=torch.float32)
    found = transforms.moved(frames, half)
    torch.testing.assert_close(found[..., :4], frames[..., 4:], atol=0.01, rtol=0)
    assert (found[..., 4:] == 127.5).all()


def test_levels_are_inverted() -> None:
    frames = pictures(0, 256).float()
    found = transforms.solarized(frames, torch.tensor([100.0, 256.0]))
    torch.testing.assert_close(found[0].byte(), reference.solarize(frames[0].byte(), 100))
    assert torch.equal(found[1], frames[1])


def test_each_clip_has_its_own_change_and_all_its_frames_the_same() -> None:
    rng = np.random.default_rng(5)
    changes = stack([transforms.draw_changes(rng, 0.5, 0.1, 2) for _ in range(4)])
    still = torch.randint(0, 256, (4, 1, 3, 12, 12), dtype=torch.uint8).expand(-1, 70, -1, -1, -1)
    found = transforms.change(still, changes)
    assert found.dtype == torch.uint8 and (found == found[:, :1]).all(), "over the border between pieces too"
    for k in range(4):
        alone = transforms.change(still[k : k + 1], {key: value[k : k + 1] for key, value in changes.items()})
        assert torch.equal(alone[0], found[k]) and not torch.equal(found[k], still[k])
    compiled = torch.compile(transforms.change, backend="eager", fullgraph=True)
    assert torch.equal(compiled(still, changes), found)


def test_what_is_drawn_stays_within_bounds() -> None:
    assert transforms.draw_changes(np.random.default_rng(0), 0.0, 0.0, 0) == {}
    drawn = [transforms.draw_changes(np.random.default_rng(seed), 0.5, 0.1, 0) for seed in range(300)]
    colors = torch.stack([one["color"] for one in drawn])
    assert set(drawn[0]) == {"color"}
    assert (colors[:, :3] >= 0.5).all() and (colors[:, :3] <= 1.5).all() and (colors[:, 3].abs() <= 0.1).all()
    assert (colors[:, :3].amin(0) < 0.55).all() and (colors[:, :3].amax(0) > 1.45).all()
    strong = [transforms.draw_changes(np.random.default_rng(seed), 0.0, 0.0, 1) for seed in range(300)]
    kinds = {(bool((one["affine"] != torch.eye(3)[:2]).any()), bool(one["solarize"] < 256)) for one in strong}
    assert kinds == {(True, False), (False, True), (False, False)}, "one operation each"
    assert all(float(one["solarize"]) >= 0 and float(one["color"].min()) >= 0 for one in strong)
