"""The demo dataset: what one modality alone can reach, what ties picture to sound, real files, the same bytes each time."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from models.family import InputError
from tasks import storage
from tasks.datasets import demo, scenes, sounds, vggsound
from tasks.datasets.demo import Demo

SMALL = Demo(kind="sounds", seed=7, clips=24, seconds=1.0, workers=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    demo.build_demo(SMALL, folder)
    return folder


def path_of(folder: Path, fault: str) -> Path:
    clip = next(clip for clip in sounds.plan(SMALL) if clip.fault == fault)
    return folder / clip.row["path"]


@pytest.mark.parametrize("modality", [0, 1])
def test_one_modality_caps_at_half(modality: int) -> None:
    """With classes equally frequent, the best answer to what is perceived is right for one of the classes that share it."""
    shared = Counter(pair[modality] for pair in scenes.CLASSES.values())
    assert sum(Fraction(1, len(scenes.CLASSES)) for _ in shared) == Fraction(1, 2)


def test_both_modalities_tell_all_classes_apart() -> None:
    assert len(set(scenes.CLASSES.values())) == len(scenes.CLASSES) == 12
    assert any("," in label for label in scenes.CLASSES)
    assert not all("," in label for label in scenes.CLASSES)


def test_nothing_but_object_and_sound_depends_on_the_class() -> None:
    first, *others = [scenes.draw_scene(*pair, 3.0, np.random.default_rng(5)) for pair in scenes.CLASSES.values()]
    for other in others:
        assert dataclasses.replace(other, seen=first.seen, heard=first.heard) == first


def test_moving_sounds_share_mean_pitch() -> None:
    position = np.linspace(0, 1, 1000, endpoint=False)
    for move in scenes.MOVES.values():
        assert abs(move(position).mean()) < 1e-2


@pytest.mark.parametrize("label", scenes.CLASSES)
def test_the_object_swells_while_the_sound_is_on(label: str) -> None:
    scene = scenes.draw_scene(*scenes.CLASSES[label], 3.0, np.random.default_rng(11))
    frames, wave = scenes.render_frames(scene), scenes.render_wave(scene)
    assert frames.shape == (36, scenes.HEIGHT, scenes.WIDTH, 3)
    assert wave.shape == (48000,)
    assert np.abs(wave).max() <= 1
    times = np.arange(36) / scenes.FPS
    on = scenes.envelope(scene, times) > 0.9
    off = scenes.envelope(scene, times) < 0.1
    level = np.array([wave[round(t * 16000) : round(t * 16000) + 1333].std() for t in times])
    glow = frames.astype(float).mean((1, 2, 3))
    assert level[on].mean() > 2 * level[off].mean()
    assert glow[on].mean() > glow[off].mean()


def test_higher_pitch_stands_higher_and_louder_is_larger() -> None:
    scene = scenes.draw_scene("drum", "humming", 3.0, np.random.default_rng(3))
    scene = dataclasses.replace(scene, noise=(1e-4, 0.0), events=((0.0, 3.0),))

    def covered(**change: float) -> np.ndarray:
        """Where the object is, in frame 18: its pixels change when its colours are swapped."""
        changed = dataclasses.replace(scene, **change)
        swapped = dataclasses.replace(changed, colors=changed.colors[::-1])
        first, second = (scenes.render_frames(s)[18].astype(int) for s in (changed, swapped))
        return np.argwhere(np.abs(first - second).sum(-1) > 30)

    assert covered(pitch=1200.0)[:, 0].mean() < covered(pitch=400.0)[:, 0].mean() - 5
    assert len(covered(loudness=1.0)) > 1.2 * len(covered(loudness=0.0))
    spectrum = np.abs(np.fft.rfft(scenes.render_wave(scene)))
    assert np.argmax(spectrum) / 3.0 == pytest.approx(scene.pitch, abs=2)


def test_events_lie_apart_and_inside() -> None:
    for seed, seconds in itertools.product(range(50), (1.0, 3.0, 10.0)):
        events = scenes.draw_scene("kite", "humming", seconds, np.random.default_rng(seed)).events
        assert events[0][0] >= 0
        assert all(start < stop <= seconds + 1e-9 for start, stop in events)
        assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(events))


def test_files_are_h264_and_aac_in_vggsounds_layout(built: Path) -> None:
    table = vggsound.read(built)
    assert len(table) == 24 + len(demo.FAULTS)
    assert set(table.head(24)["annotation"].map(vggsound.class_of)) == set(scenes.CLASSES)
    assert Counter(table.head(24)["split"]) == {"train": 12, "test": 12}
    assert table["group"].str.len().eq(11).all()
    assert table["group"].str.startswith("-").any()
    for path in table.head(24)["path"]:
        with av.open(str(built / path)) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            assert (video.width, video.height, video.average_rate) == (scenes.WIDTH, scenes.HEIGHT, scenes.FPS)
            assert audio.sample_rate == scenes.SAMPLE_RATE
            assert len(list(container.decode(video))) == scenes.FPS


def test_each_fault_is_what_it_says(built: Path) -> None:
    assert not path_of(built, "missing").exists()
    assert path_of(built, "empty").stat().st_size == 0
    with pytest.raises(av.error.InvalidDataError):
        av.open(str(path_of(built, "index lost")))
    with av.open(str(path_of(built, "no audio"))) as container:
        assert not container.streams.audio
    with av.open(str(path_of(built, "still and silent"))) as container:
        assert max(np.abs(f.to_ndarray()).max() for f in container.decode(audio=0)) < 1e-4
    with av.open(str(path_of(built, "cut short"))) as container:
        assert len([packet for packet in container.demux(video=0) if packet.size]) < scenes.FPS
    table = vggsound.read(built).assign(digest=lambda t: [_digest(built / path) for path in t["path"]])
    twins = table[table["digest"] == _digest(path_of(built, "duplicate"))]
    assert sorted(twins["split"]) == ["test", "train"]


def _digest(path: Path) -> str:
    return storage.file_digest(path) if path.exists() else ""


def test_an_interrupted_build_goes_on_and_gives_the_same_bytes(built: Path) -> None:
    before = storage.folder_digest(built)
    videos = sorted((built / "video").iterdir())
    kept = {path: path.stat().st_mtime_ns for path in videos[4:]}
    for path in videos[:4]:
        path.unlink()
    demo.build_demo(dataclasses.replace(SMALL, workers=1), built)
    assert storage.folder_digest(built) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_another_seed_gives_other_clips() -> None:
    first, second = sounds.plan(SMALL), sounds.plan(dataclasses.replace(SMALL, seed=8))
    assert not {clip.row["group"] for clip in first} & {clip.row["group"] for clip in second}


@pytest.mark.parametrize("change", [{"clips": 25}, {"clips": 12}, {"clips": 0}, {"seconds": 0.5}, {"workers": 0}])
def test_impossible_sizes_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        demo.build_demo(dataclasses.replace(SMALL, **change), tmp_path)
