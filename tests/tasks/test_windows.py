"""Long videos by windows: frames stored at steps in time, which windows there are, and that raw files give the same ones."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import models
from models.family import Batch, ClipSpec, Facts, InputError, Sample, WindowSpec
from tasks import predict, stores
from tasks.data import index, manifest, video
from tasks.data.batches import InOrder, build_loader, read_batches, stack
from tasks.data.frame_store import FrameStore
from tasks.data.loader import open_split
from tasks.data.video import Preparation
from tasks.data.windows import WindowDataset, window_starts

LENGTH, STRIDE = 4, 2
STORES = stores.Stores(0, 2, 32, 95, 16000, "pcm16", 2, 1, "processes", 0.0)


@pytest.mark.parametrize(
    ("stored", "stride", "expected"),
    [
        (1, 384, [0]),
        (767, 384, [0]),
        (768, 384, [0]),
        (769, 384, [0, 1]),
        (1000, 384, [0, 232]),
        (1152, 384, [0, 384]),
        (5000, 384, [*range(0, 4225, 384), 4232]),
        (5000, 576, [*range(0, 4033, 576), 4232]),
        (1344, 576, [0, 576]),
    ],
)
def test_windows_cover_every_frame_and_none_comes_twice(stored: int, stride: int, expected: list[int]) -> None:
    starts = window_starts(stored, 768, stride)
    assert starts == expected
    covered = {frame for start in starts for frame in range(start, min(start + 768, stored))}
    assert covered == set(range(stored)) and len(set(starts)) == len(starts)
    assert all(second - first <= stride for first, second in pairwise(starts))
    assert starts[-1] + 768 == stored or len(starts) == 1


# --- frames at steps in time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["long_gop.mp4", "short_gop.mp4", "open_gop.mp4", "uneven.mp4", "upright.mp4"])
@pytest.mark.parametrize("step", [1, 4, 200])
def test_every_such_frame_is_stored(media: Path, name: str, step: int) -> None:
    track, _ = video._sweep(media / name, 16000)
    everything = video.read_clip(media / name, Preparation(len(track.shown), 0, 100, 16000))
    stored = video.read_clip(media / name, Preparation(0, 0, 100, 16000, frame_step=step))
    assert stored.jpegs == everything.jpegs[::step] and len(stored.jpegs) == -(-len(track.shown) // step)
    probe = video.probe(media / name)
    assert (stored.duration, stored.fps) == (probe.duration, probe.fps)


def test_pictures_are_not_kept_as_they_are_decoded(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale, alive, most = video.scale, [0], [0]

    def counted(frame: Any, short_side: int) -> np.ndarray:
        image = np.array(scale(frame, short_side))
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(image, lambda: alive.__setitem__(0, alive[0] - 1))
        return image

    monkeypatch.setattr(video, "scale", counted)
    assert len(video.read_clip(media / "long_gop.mp4", Preparation(0, 0, 90, 16000, frame_step=1)).jpegs) == 90
    assert most[0] <= 2


def test_a_single_frame_without_a_rate_has_no_step(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "timing", lambda track: (0.0, 0.0))
    with pytest.raises(video.ClipError, match="too short"):
        video.read_clip(media / "one_frame.mp4", Preparation(0, 0, 90, 16000, frame_step=4))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, write_clip: Callable[..., Path], media: Path) -> Path:
    """Videos of 10, 10 and 90 frames, of which 5, 5 and 45 are stored."""
    root = tmp_path_factory.mktemp("project")
    raw = root / "data/toy/raw"
    paths = [write_clip(raw / "a.mp4", pitch=300.0), write_clip(raw / "b.mp4", pitch=500.0), raw / "c.mp4"]
    paths[2].write_bytes((media / "short_gop.mp4").read_bytes())
    rows = []
    for number, path in enumerate(paths):
        probe = video.probe(path)
        rows.append({
            "id": path.stem, "path": f"raw/{path.name}", "split": "train", "group": path.stem, "start": 0.0,
            **probe.__dict__, "has_video": True, "checksum": "", "annotation": f'{{"number": {number}}}',
        })  # fmt: skip
    before = Path.cwd()
    os.chdir(root)
    try:
        manifest.write(pd.DataFrame(rows), manifest.manifest_path("toy"))
        stores.stores("toy", STORES)
    finally:
        os.chdir(before)
    return root


def test_the_store_tells_its_steps(project: Path) -> None:
    store = FrameStore(project / "data/toy/stores")
    assert store.has_steps
    assert [store.num_frames(name) for name in "abc"] == [5, 5, 45]
    assert [store.step(name) for name in "abc"] == pytest.approx([0.2, 0.2, 2 / 30])


def test_frames_by_number_are_stored_as_ever(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    (project / "data/other").mkdir(exist_ok=True)
    table = manifest.read("toy")
    for name in ("clean", "raw"):
        if not (project / "data/other" / name).exists():
            (project / "data/other" / name).symlink_to(project / "data/toy" / name)
    stores.stores("other", replace(STORES, num_frames=3, frame_step=0))
    rows = index.read(project / "data/other/stores")
    assert rows.schema.names == [*stores.LISTED, *stores.KINDS]
    assert set(rows["num_frames"].to_pylist()) == {3} and len(rows) == len(table)
    with pytest.raises(InputError, match=r"needs them at steps in time; set stores\.other\.frame_step"):
        open_split("other", "train", SPEC, dict, 0)


@pytest.mark.parametrize("wrong", [{"frame_step": 0}, {"num_frames": 4}, {"frame_step": -1}])
def test_one_of_number_and_step(project: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, int]) -> None:
    monkeypatch.chdir(project)
    with pytest.raises(
        InputError, match=r"stores\.toy: one of num_frames and frame_step must be 1 or more, the other 0"
    ):
        stores.stores("toy", replace(STORES, **wrong))  # pyright: ignore


# --- windows from the stores -----------------------------------------------------------------------------------------------


def draw(stored: int, annotation: Any, step: float, rng: np.random.Generator) -> tuple[int, int]:
    first = int(rng.integers(0, stored - 2))
    return first, int(rng.integers(1, min(LENGTH, stored - first) + 1))


SPEC = ClipSpec(LENGTH, 16000, 0.0, window=WindowSpec(STRIDE, draw))


def transform(sample: Sample) -> Batch:
    """Everything that a sample tells, of fixed shapes."""
    assert sample.window is not None and sample.frames is not None and sample.wave is None
    place = sample.window
    frames = torch.from_numpy(sample.frames[:, :32, :32].copy())
    return {
        "frames": torch.cat([frames, frames[-1:].expand(LENGTH - len(frames), -1, -1, -1)]),
        "length": torch.tensor(len(frames)), "place": torch.tensor([place.first, place.clip]),
        "times": torch.tensor([place.step, place.duration]), "number": torch.tensor(sample.annotation.get("number", -1)),
    }  # fmt: skip


def windows(project: Path, monkeypatch: pytest.MonkeyPatch, training: bool = False) -> WindowDataset:
    monkeypatch.chdir(project)
    clips = open_split("toy", "train", SPEC, transform, 7, training)
    assert isinstance(clips, WindowDataset)
    return clips


def test_evaluation_sees_all_windows_of_all_videos(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = windows(project, monkeypatch)
    items = [clips[0, row] for row in range(len(clips))]
    expected = [(first, clip) for clip, stored in enumerate((5, 5, 45)) for first in window_starts(stored, 4, 2)]
    assert [tuple(item["place"].tolist()) for item in items] == expected
    assert [int(item["row"]) for item in items] == list(range(len(items)))
    assert [int(item["number"]) for item in items] == [clip for _, clip in expected]
    store = FrameStore(project / "data/toy/stores")
    for item, (first, clip) in zip(items, expected, strict=True):
        assert np.array_equal(item["frames"], store.decode("abc"[clip], range(first, first + 4))[:, :32, :32])
    assert items[-1]["times"].tolist() == pytest.approx([2 / 30, 3.0])


def test_training_draws_one_window_of_each_video(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = windows(project, monkeypatch, training=True)
    assert len(clips) == 3
    for epoch, row in ((0, 2), (1, 2), (5, 0)):
        item, rng = clips[epoch, row], np.random.default_rng([7, epoch, row])
        first, length = draw((5, 5, 45)[row], None, 0.0, rng)
        assert (item["place"].tolist(), int(item["length"]), int(item["row"])) == ([first, row], length, row)
    places = {tuple(clips[epoch, 2]["place"].tolist()) for epoch in range(12)}
    assert len(places) > 6, "each epoch another place"


def test_only_the_frames_of_the_window_are_decoded(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, asked = windows(project, monkeypatch), []
    read = FrameStore.read
    monkeypatch.setattr(
        FrameStore, "read", lambda self, clip, columns: asked.append(list(columns)) or read(self, clip, columns)
    )
    clips[0, len(clips) - 1]
    assert asked == [[41, 42, 43, 44]]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("training", [False, True])
def test_workers_change_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int, training: bool
) -> None:
    clips = windows(project, monkeypatch, training)
    batches = list(read_batches(build_loader(clips, InOrder(len(clips), 5), num_workers, torch.device("cpu"))))
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    expected = stack([clips[0, row] for row in range(len(clips))])
    assert all(torch.equal(whole[key], value) for key, value in expected.items())


# --- windows of a raw file -------------------------------------------------------------------------------------------------


class Echo(torch.nn.Module):
    """Gives back what it is given."""

    def forward(self, batch: Batch) -> Batch:
        return {**batch, "clip": batch["place"][:, 1]}


def merge(config: Any, predictions: Batch) -> Batch:
    """All windows of the one video behind each other."""
    assert config == "its config" and not predictions["clip"].any()
    return {key: value[None] for key, value in predictions.items()}


def predictor(monkeypatch: pytest.MonkeyPatch, seen: list[Batch], **meta: Any) -> predict.Predictor:
    phase = SimpleNamespace(
        clip=lambda config: SPEC, transform=lambda config, facts, training: transform, merge=merge,
        present=lambda predictions, facts: seen.append(predictions) or [{"windows": len(predictions["place"][0])}],
    )  # fmt: skip
    monkeypatch.setattr(models, "load", lambda family: SimpleNamespace(phases={"only": phase}))
    kept = {"num_frames": 0, "frame_step": 2, "short_side": 32, "quality": 95, "sample_rate": 16000, "codec": "pcm16"}
    trained: Any = SimpleNamespace(
        family="toy",
        phase="only",
        config="its config",
        facts=Facts({}, 0, 1),
        module=Echo,
        meta={"stores": kept | meta},
    )
    return predict.Predictor(trained)


def test_a_raw_video_gives_the_windows_of_training(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, seen = windows(project, monkeypatch), []
    path = project / "data/toy/raw/c.mp4"
    answers = predictor(monkeypatch, seen).predict([path, path.read_bytes(), project / "gone.mp4", project])
    whole = {"duration": 3.0, "windows": 22}
    assert answers == [whole, whole, {"error": "no such file"}, {"error": "no such file"}]
    expected = stack([clips[0, row] for row in range(len(clips)) if int(clips[0, row]["place"][1]) == 2])
    for found in seen:
        assert torch.equal(found["frames"][0], expected["frames"].float())
        assert torch.equal(found["times"][0], expected["times"])
        assert torch.equal(found["place"][0, :, 0], expected["place"][:, 0].float())


def test_a_video_shorter_than_a_window(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Batch] = []
    short = predictor(monkeypatch, seen, frame_step=5)
    assert short.predict([project / "data/toy/raw/a.mp4"]) == [{"duration": 1.0, "windows": 1}]
    assert seen[0]["length"].tolist() == [[2.0]]
