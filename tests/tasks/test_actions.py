"""The demo dataset of actions: what is seen and when, its plan and its files."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest

from models.family import InputError
from tasks import storage
from tasks.datasets import actions, activitynet, demo, playground
from tasks.datasets.demo import Clip, Demo
from tasks.datasets.playground import ACTIONS, Play

DEMO = Demo(kind="actions", seed=7, clips=36, seconds=64.0, workers=2)
SHORT = dataclasses.replace(DEMO, seconds=30.0)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return actions.plan(DEMO)


def play(clip: Clip) -> Play:
    return playground.draw_play(clip.shows.seconds, clip.shows.events, np.random.default_rng(3))


def test_videos_are_untrimmed(clips: list[Clip]) -> None:
    good = [clip for clip in clips if not clip.fault]
    assert len(good) == 36 and [clip.fault for clip in clips[36:]] == list(actions.FAULTS)
    assert set(actions.FAULTS) <= set(demo.FAULTS)
    assert all(60 <= clip.shows.seconds <= 71 for clip in good)
    shares = [sum(end - start for start, end, _ in clip.shows.events) / clip.shows.seconds for clip in good]
    assert 0.4 < np.mean(shares) < 0.75 and max(shares) < 0.9
    lengths = [end - start for clip in good for start, end, _ in clip.shows.events]
    assert max(lengths) > 1.7 * min(lengths), "events of different lengths"


def test_events_lie_within_the_video_and_apart(clips: list[Clip]) -> None:
    for clip in clips:
        edges = np.array([edge for start, end, _ in clip.shows.events for edge in (start, end)])
        gaps = np.diff([0.0, *edges, clip.shows.seconds])
        assert (gaps[::2] >= playground.REST - 0.02).all() and (gaps[1::2] > 2).all()
    assert len(playground.draw_events(30.0, ["hopping"] * 2, np.random.default_rng(0))) == 2


def test_every_split_has_every_action(clips: list[Clip]) -> None:
    for split, least in (("train", 20), ("test", 10)):
        counts = Counter(
            label for clip in clips for *_, label in clip.shows.events if clip.row["split"] == split and not clip.fault
        )
        assert set(counts) == set(ACTIONS) and min(counts.values()) >= least
    assert Counter(clip.row["split"] for clip in clips if not clip.fault) == {"train": 27, "test": 9}


def test_its_size_is_another_during_events_alone(clips: list[Clip]) -> None:
    for clip in clips[:6]:
        shown = play(clip)
        times = np.arange(0, shown.seconds, 0.1)
        x, y, size, angle = playground.pose(shown, times)
        during = np.zeros(len(times), bool)
        for start, end, _ in shown.events:
            during |= (times >= start) & (times < end)
        assert (np.abs(size / shown.size - 1) > 0.3).tolist() == during.tolist()
        assert max(np.abs(np.diff(values)).max() for values in (x, y, angle / 4)) < 0.01


def test_actions_differ_in_size() -> None:
    events = tuple((2.0 + 14 * k, 14.0 + 14 * k, name) for k, name in enumerate(ACTIONS))
    shown = playground.draw_play(60.0, events, np.random.default_rng(1))
    size = {name: playground.pose(shown, np.arange(start, end, 0.05))[2] / shown.size for start, end, name in events}
    assert size["deflated"].max() < 0.45 and size["inflated"].min() > 1.5 and (size["gone"] == 0).all()


def test_the_balloon_is_where_and_as_large_as_it_is_said_to_be(clips: list[Clip]) -> None:
    shown = dataclasses.replace(play(clips[0]), seconds=16.0)
    frames = playground.render_frames(shown).astype(int)
    assert frames.shape == (192, playground.SIDE, playground.SIDE, 3)
    changed = np.abs(frames - playground.render_frames(dataclasses.replace(shown, size=1e-3))).max(-1) > 10
    axis = np.linspace(-1, 1, playground.SIDE)
    x, y, size, _ = playground.pose(shown, np.arange(192) / 12)
    inside = np.flatnonzero((size > 0) & (np.abs(x) + size < 0.95) & (np.abs(y) + size < 0.95))
    assert len(inside) > 100
    for k in inside[::20]:
        rows, columns = np.nonzero(changed[k])
        assert (axis[columns].max() + axis[columns].min()) / 2 == pytest.approx(x[k], abs=0.06)
        assert -(axis[rows].max() + axis[rows].min()) / 2 == pytest.approx(y[k], abs=0.06)
        assert (axis[columns].max() - axis[columns].min()) / 2 == pytest.approx(size[k], abs=0.06)


def test_the_size_shows_in_the_pattern_and_not_in_the_mean(clips: list[Clip]) -> None:
    shown = dataclasses.replace(play(clips[0]), seconds=32.0)
    frames = playground.render_frames(shown) / 255.0
    _, _, size, _ = playground.pose(shown, np.arange(384) / 12)
    level = np.corrcoef(frames.mean((1, 2, 3)), size**2)[0, 1]
    pattern = np.corrcoef(np.abs(frames - playground.GROUND).mean((1, 2, 3)), size**2)[0, 1]
    assert abs(level) < 0.6 and pattern > 0.9


def test_something_is_heard_during_events_alone(clips: list[Clip]) -> None:
    shown = dataclasses.replace(play(clips[0]), noise=(1e-4, 0.5))
    wave = playground.render_wave(shown)
    assert wave.dtype == np.float32 and np.abs(wave).max() <= 0.8 and len(wave) == round(shown.seconds * 16000)
    for start, end, _ in shown.events:
        assert wave[int(start * 16000) : int(end * 16000)].std() > 30 * wave[int(start * 16000) - 16000 :][:15000].std()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four good videos and one of each fault, made as all are."""
    folder, clips = tmp_path_factory.mktemp("demo"), actions.plan(SHORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actions, "plan", lambda given: [*clips[:3], clips[30], *clips[36:]])
        assert demo.build_demo(SHORT, folder) == 7
    return folder


def test_files_and_annotations(built: Path) -> None:
    clips = actions.plan(SHORT)
    table = activitynet.read(built)
    assert table["id"].tolist()[:4] == [f"video_validation_000000{k}" for k in (1, 2, 3)] + ["video_test_0000031"]
    assert table["split"].tolist() == ["train"] * 3 + ["test"] + ["train"] * 3
    assert (built / "category_idx.txt").read_text().split() == sorted(ACTIONS)
    with av.open(str(built / table["path"][1])) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        frames = round(clips[1].shows.seconds * 12)
        assert (video.width, video.height, len(list(container.decode(video)))) == (64, 64, frames)
    for text, clip in zip(table["annotation"], [*clips[:3], clips[30]], strict=False):
        known = json.loads(text)
        assert [tuple(segment) for segment in known["segments"]] == list(clip.shows.events)
        assert known["duration"] == clip.shows.seconds
    assert [path for path in table["path"] if not (built / path).exists()] == [table["path"][6]]


def test_clean_tells_of_what_is_odd(built: Path) -> None:
    from tasks.clean import probe_clip

    table = activitynet.read(built)
    probes = pd.DataFrame([probe_clip(built / path) for path in table["path"]])
    review = activitynet.check(pd.concat([table, probes], axis=1), built)
    said = {finding.clip: finding.text for finding in review.findings}
    assert all(finding.severity == "warning" for finding in review.findings) and len(said) == 5
    for name, words in {
        "video_validation_0000001": "stand there before already: 1",
        "video_validation_0000002": "labelled Ambiguous: 1",
        "video_validation_0000003": "frames, the file has",
        "video_validation_0000037": "truncated",
        "video_validation_0000039": "missing",
    }.items():
        assert words in said[name]
    assert probes["has_audio"].tolist()[5] is False and any("frame_step" in line for line in review.advice)


def test_the_seed_gives_the_same_bytes(built: Path, clips: list[Clip], tmp_path: Path) -> None:
    clip = actions.plan(SHORT)[1]
    demo._make_clip(actions, SHORT, clip, tmp_path / "again.mp4")  # pyright: ignore
    assert storage.file_digest(tmp_path / "again.mp4") == storage.file_digest(built / clip.row["path"])
    other = actions.plan(dataclasses.replace(DEMO, seed=8))
    assert [one.row for one in other] != [one.row for one in clips]


@pytest.mark.parametrize("wrong", [{"clips": 19}, {"seconds": 29.0}])
def test_too_little_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="actions are 20 videos or more of 30 s or more"):
        actions.plan(dataclasses.replace(DEMO, **wrong))  # pyright: ignore
