"""Which clips make up a step, and how a clip is read from real stores."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.family import Batch, ClipSpec, InputError, Sample
from tasks import stores
from tasks.data import index, manifest, video
from tasks.data.batches import GlobalBatches, InOrder, TensorClips, build_loader, read_batches, stack
from tasks.data.frame_store import shard_name, write_frames
from tasks.data.loader import ClipDataset, frame_columns, open_split

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_zeros_follow_shorter_samples_up_to_the_longest() -> None:
    long, short = torch.arange(6).view(3, 2) + 1, torch.ones(1, 2, dtype=torch.long)
    batch = stack([{"text": long, "row": 0}, {"text": short, "row": 1}])
    assert batch["text"].tolist() == [[[1, 2], [3, 4], [5, 6]], [[1, 1], [0, 0], [0, 0]]]
    assert batch["row"].tolist() == [0, 1]


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_ranks_share_each_step_and_epochs_never_repeat_a_clip(n: int, local: int, world: int, seed: int) -> None:
    size = local * world
    if n < size:
        return
    steps = n // size
    ranks = [list(GlobalBatches(n, size, seed, 0, 2 * steps, rank, world)) for rank in range(world)]
    whole = list(GlobalBatches(n, size, seed, 0, 2 * steps))
    assert [[key for rank in ranks for key in rank[step]] for step in range(2 * steps)] == whole
    for epoch in range(2):
        keys = [key for batch in whole[epoch * steps : (epoch + 1) * steps] for key in batch]
        assert {key[0] for key in keys} == {epoch} and len({row for _, row in keys}) == steps * size


def test_a_restart_goes_on_without_replaying() -> None:
    whole = list(GlobalBatches(23, 4, 9, 0, 15))
    assert list(GlobalBatches(23, 4, 9, 7, 15)) == whole[7:]
    assert whole[:5] != list(GlobalBatches(23, 4, 10, 0, 5)), "the seed decides the order"
    assert whole[:5] != [[(0, row) for _, row in batch] for batch in whole[5:10]], "so does the epoch"


FREQUENCIES = np.array([0.0, 1.0, 1.0, 2.5, 0.3, 8.0, 1.2])


def test_clips_are_drawn_as_often_as_they_are_frequent() -> None:
    epochs, n = 400, len(FREQUENCIES)
    counts = np.zeros((epochs, n))
    for batch in GlobalBatches(n, 1, 3, 0, epochs * n, frequencies=FREQUENCIES):
        ((draw, row),) = batch
        counts[draw // n, row] += 1
    expected = n * FREQUENCIES / FREQUENCIES.sum()
    assert (np.abs(counts - expected) < 1).all(), "in each epoch the share rounded up or down"
    np.testing.assert_allclose(counts.mean(0), expected, atol=4 * 0.5 / np.sqrt(epochs))
    assert not counts[:, 0].any()


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99), st.integers(0, 60))
@settings(deadline=None, max_examples=40)
def test_frequent_clips_are_drawn_alike_by_all_ranks_and_after_a_restart(
    n: int, local: int, world: int, seed: int, first: int
) -> None:
    size = local * world
    if n < size:
        return
    last, frequencies = 3 * (n // size), np.random.default_rng(seed).random(n) ** 4
    whole = list(GlobalBatches(n, size, seed, 0, last, frequencies=frequencies))
    ranks = [list(GlobalBatches(n, size, seed, 0, last, rank, world, frequencies)) for rank in range(world)]
    assert [[key for rank in ranks for key in rank[step]] for step in range(last)] == whole
    assert list(GlobalBatches(n, size, seed, min(first, last), last, frequencies=frequencies)) == whole[first:]
    keys = [key for batch in whole for key in batch]
    assert len(set(keys)) == len(keys), "a clip that comes again has other random choices"


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_evaluation_covers_every_clip_once_in_order(n: int, size: int, world: int) -> None:
    ranks = [list(InOrder(n, size, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1, "ranks would wait for each other"
    seen: list[int] = []
    for step in range(len(ranks[0])):
        for rank in ranks:
            assert rank[step]
            seen += [row for _, row in rank[step] if not seen or row > seen[-1]]
    assert seen == list(range(n))


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [(8, 4, [0, 2, 5, 7]), (8, 8, list(range(8))), (5, 1, [2]), (1, 3, [0, 0, 0]), (10, 2, [0, 9])],
)
def test_frames_are_chosen_evenly(stored: int, wanted: int, expected: list[int]) -> None:
    assert frame_columns(stored, wanted) == expected


# --- from real files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, write_clip: Callable[..., Path]) -> Path:
    """A project with four prepared clips, the last one without sound."""
    root = tmp_path_factory.mktemp("project")
    rows = []
    for number in range(4):
        path = write_clip(root / "data/toy/raw" / f"{number}.mp4", pitch=300.0 + 100 * number, sound=number < 3)
        rows.append({
            "id": f"clip{number}", "path": f"raw/{path.name}", "split": "train", "group": str(number), "start": 0.0,
            "duration": 1.0, "fps": 10.0, "frames": 10, "width": 48, "height": 32, "has_audio": number < 3,
            "has_video": True, "sample_rate": 16000, "checksum": "", "silent": False, "still": False,
            "annotation": f'{{"label": "class {number}"}}',
        })  # fmt: skip
    before = Path.cwd()
    os.chdir(root)
    try:
        manifest.write(pd.DataFrame(rows), manifest.manifest_path("toy"))
        stores.stores("toy", stores.Stores(5, 0, 32, 95, 16000, "pcm16", 1, 1, "processes", 0.0))
    finally:
        os.chdir(before)
    return root


def transform(sample: Sample) -> Batch:
    frames = torch.zeros(3, 32, 48, 3, dtype=torch.uint8) if sample.frames is None else torch.from_numpy(sample.frames)
    wave = np.zeros(8000, np.float32) if sample.wave is None else sample.wave
    return {
        "frames": frames, "wave": torch.from_numpy(wave.copy()), "has_audio": sample.wave is not None,  # type: ignore
        "noise": torch.from_numpy(sample.rng.random(3)), "label": torch.tensor(int(sample.annotation["label"][-1])),
    }  # fmt: skip


def open_toy(dataset: Path, monkeypatch: pytest.MonkeyPatch, **spec: Any) -> ClipDataset:
    monkeypatch.chdir(dataset)
    chosen = {"num_frames": 3, "sample_rate": 16000, "audio_seconds": 0.5} | spec
    return open_split("toy", "train", ClipSpec(**chosen), transform, 7)


def test_a_clip_as_the_stores_have_it(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = open_toy(dataset, monkeypatch)
    item = clips[0, 1]
    assert item["frames"].shape == (3, 32, 48, 3) and item["wave"].shape == (8000,) and int(item["row"]) == 1
    assert np.array_equal(item["frames"], clips.frame_store.decode("clip1", [0, 2, 4]))
    assert np.array_equal(item["wave"], clips.audio_store.read("clip1")[0][:8000])
    assert torch.equal(item["noise"], torch.from_numpy(np.random.default_rng([7, 0, 1]).random(3)))
    assert not torch.equal(item["noise"], clips[1, 1]["noise"]), "another epoch, other random numbers"


def test_a_missing_modality_is_none(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not open_toy(dataset, monkeypatch)[0, 3]["has_audio"]
    assert not open_toy(dataset, monkeypatch, audio_seconds=0.0)[0, 0]["has_audio"]
    assert not open_toy(dataset, monkeypatch, num_frames=0)[0, 0]["frames"].any()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_nothing(dataset: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    clips = open_toy(dataset, monkeypatch)
    clips[0, 0]  # the stores are open in this process before the workers are forked
    before = torch.get_rng_state()
    batches = list(read_batches(build_loader(clips, GlobalBatches(4, 2, 1, 1, 5), num_workers, CPU)))
    assert torch.equal(before, torch.get_rng_state()), "loading must not draw from the training's random numbers"
    expected = [stack([clips[key] for key in keys]) for keys in GlobalBatches(4, 2, 1, 1, 5)]
    assert all(
        torch.equal(found[k], value) for found, e in zip(batches, expected, strict=True) for k, value in e.items()
    )
    assert batches[0]["has_audio"].dtype == torch.bool and batches[0]["row"].dtype == torch.int64


# --- a resumed run --------------------------------------------------------------------------------------------------------


NUM_CLIPS, NUM_SHARDS, LEVELS = 24, 4, 10  # clip k's pictures have the level 10 k


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny pictures in several shards, dealt out as the stage `stores` does."""
    root = tmp_path_factory.mktemp("sharded")
    clips = [f"clip{number:02d}" for number in range(NUM_CLIPS)]
    same = dict.fromkeys(manifest.COLUMNS, 0) | {"path": "x.mp4", "split": "train", "has_video": True}
    table = pd.DataFrame([same | {"id": clip, "annotation": f'{{"label": "{clip[-1]}"}}'} for clip in clips])
    folder, stored = root / "data/toy/stores", []
    for shard in range(NUM_SHARDS):
        rows = range(shard, NUM_CLIPS, NUM_SHARDS)
        pictures = {row: video.encode_jpeg(np.full((32, 48, 3), LEVELS * row, np.uint8), 95) for row in rows}
        path = folder / shard_name("frames", shard, NUM_SHARDS, "tsv")
        write_frames(path, [(clips[row], 48, 32, [pictures[row]] * 3) for row in rows])
        stored += [{"id": clips[row], "shard": shard, "row": place} for place, row in enumerate(rows)]
    with contextlib.chdir(root):
        manifest.write(table, manifest.manifest_path("toy"))
        listed = table[stores.LISTED].merge(pd.DataFrame(stored), on="id")
        listed = listed.assign(num_frames=3, has_audio=False, audio_row=-1)
        index.write(listed, folder, manifest.digest("toy"))
    return root


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_broken_at_any_step_goes_on_with_the_same_clips(
    sharded: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    clips, size, epoch = open_toy(sharded, monkeypatch), 6, NUM_CLIPS // 6

    def steps(first: int) -> Iterator[Batch]:
        return read_batches(build_loader(clips, GlobalBatches(NUM_CLIPS, size, 1, first, 2 * epoch), num_workers, CPU))

    whole = list(steps(0))
    for broken in (1, epoch - 1, epoch, epoch + 2):
        begun = steps(0)
        joined = [*(next(begun) for _ in range(broken)), *steps(broken)]  # what workers had fetched beyond is lost
        assert len(joined) == len(whole)
        for found, expected in zip(joined, whole, strict=True):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    for batch in whole:
        levels = batch["frames"].float().mean((1, 2, 3, 4))
        torch.testing.assert_close(levels, LEVELS * batch["row"].float(), atol=2.0, rtol=0.0)
        assert len(set((batch["row"] % NUM_SHARDS).tolist())) > 1, "the order crosses shards"
    orders = [torch.cat([batch["row"] for batch in whole[start : start + epoch]]).tolist() for start in (0, epoch)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(NUM_CLIPS)) and orders[0] != orders[1]


def test_another_sample_rate_is_one_line_even_from_a_worker(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = open_toy(dataset, monkeypatch, sample_rate=22050)
    with pytest.raises(InputError, match="stored at 16000 Hz and the phase hears 22050 Hz") as error:
        list(read_batches(build_loader(clips, InOrder(4, 2), 1, CPU)))
    assert "\n" not in str(error.value)


def test_a_worker_outlives_one_sigterm_but_not_two() -> None:
    loader = build_loader(TensorClips({"x": torch.arange(64.0)}), InOrder(64, 1), 1, CPU)
    batches: Any = iter(loader)
    next(batches)
    worker = batches._workers[0]
    os.kill(worker.pid, signal.SIGTERM)
    time.sleep(0.3)
    assert worker.is_alive() and float(next(batches)["x"]) == 1.0
    del batches, loader  # sends the second one
    worker.join(30)
    assert not worker.is_alive()


def test_a_defect_ends_the_trainer_with_its_workers() -> None:
    code = """
import torch
from tasks.data.batches import InOrder, TensorClips, build_loader
batches = iter(build_loader(TensorClips({"x": torch.arange(64.0)}), InOrder(64, 1), 1, torch.device("cpu")))
next(batches)
raise RuntimeError("a defect")
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("RuntimeError: a defect")
