"""The demo dataset of descriptions: their wording, what is drawn independently, files with and without a sound track."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from models.family import InputError
from tasks import storage
from tasks.datasets import demo, descriptions, favd
from tasks.datasets.demo import Clip, Demo
from tasks.datasets.descriptions import AIRS, COLORS, PLACES, SOUNDS, THINGS, VOCABULARY, Shown
from tasks.datasets.scenes import SAMPLE_RATE

DEMO = Demo(kind="descriptions", seed=7, clips=720, seconds=2.0, workers=2)
SMALL = dataclasses.replace(DEMO, clips=80, seconds=1.0)
LISTS = {"thing": THINGS, "color": COLORS, "place": PLACES, "air": AIRS, "sound": [*SOUNDS, None]}
KITE = Shown("kite", "orange", "lake", "clear", "hums")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert demo.build_demo(SMALL, folder) == 80 + len(demo.FAULTS)
    return folder


def good(settings: Demo) -> list[Clip]:
    return [clip for clip in descriptions.plan(settings) if not clip.fault]


def picture(**change: str) -> np.ndarray:
    """(SIDE, SIDE, 3) mean of the frames."""
    shown = dataclasses.replace(KITE, **change)
    return descriptions.render(DEMO, Clip(3, shown, {}))[0].astype(float).mean(0)


def bands(sound: str, index: int) -> np.ndarray:
    """(4,) shares of the power below 500 Hz, up to 1.6 kHz, up to 3.2 kHz, and above."""
    wave = descriptions.render(DEMO, Clip(index, dataclasses.replace(KITE, sound=sound), {}))[1]
    assert wave is not None and wave.dtype == np.float32 and np.abs(wave).max() <= 1
    assert np.sqrt((wave**2).mean()) > 0.02
    power = np.abs(np.fft.rfft(wave)) ** 2
    edges = [round(hz * len(wave) / SAMPLE_RATE) for hz in (0, 500, 1600, 3200)]
    return np.add.reduceat(power, edges) / power.sum()


def test_a_description_says_what_is_seen_and_last_what_is_heard() -> None:
    assert KITE.caption == "an orange kite flies over a lake. the sky is clear. an engine hums."
    silent = Shown("wheel", "red", "town", "snowing", None)
    assert silent.caption == "a red wheel spins over a town. it is snowing. no sound is heard."
    for words in itertools.product(THINGS, COLORS, PLACES, AIRS, [*SOUNDS, None]):
        caption = Shown(*words).caption
        assert re.fullmatch(r"[a-z ]+\. [a-z ]+\. [a-z ]+\.", caption)
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", caption)
        assert set(re.findall(r"\w+|\.", caption)) <= set(VOCABULARY)
        assert all(re.search(rf"\b{word}\b", caption) for word in words if word)


def test_no_word_is_in_two_lists() -> None:
    words = [*THINGS, *COLORS, *PLACES, *AIRS, *SOUNDS]
    assert max(Counter(words).values()) == 1 and max(Counter(VOCABULARY).values()) == 1


def test_every_split_has_every_word_about_equally_often() -> None:
    clips = good(DEMO)
    assert Counter(clip.row["split"] for clip in clips) == {"train": 504, "val": 72, "test": 144}
    for split, (name, words) in itertools.product(("train", "val", "test"), LISTS.items()):
        counts = Counter(getattr(clip.shows, name) for clip in clips if clip.row["split"] == split)
        assert set(counts) == set(words)
        silent = counts.pop(None, 0)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert name != "sound" or 0.09 < silent / (silent + counts.total()) < 0.12


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(LISTS, 2)))
def test_no_property_tells_another(one: str, other: str) -> None:
    """The statistic of Pearson's test of independence lies within four deviations of its mean."""
    clips = good(dataclasses.replace(DEMO, clips=2000))
    first, second = list(LISTS[one]), list(LISTS[other])
    table = np.zeros((len(first), len(second)))
    for clip in clips:
        table[first.index(getattr(clip.shows, one)), second.index(getattr(clip.shows, other))] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    freedom = (len(first) - 1) * (len(second) - 1)
    assert ((table - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_the_sound_changes_nothing_in_the_picture() -> None:
    pictures = [picture(sound=sound) for sound in SOUNDS]
    assert all((other == pictures[0]).all() for other in pictures)


@pytest.mark.parametrize("name", ["color", "place", "air", "thing"])
def test_each_word_looks_unlike_the_others(name: str) -> None:
    for one, other in itertools.combinations(LISTS[name], 2):
        assert np.abs(picture(**{name: str(one)}) - picture(**{name: str(other)})).mean() > 4, (one, other)


@pytest.mark.parametrize("thing", THINGS)
def test_a_thing_is_nearly_half_as_high_as_the_picture_and_bobs(thing: str) -> None:
    for index in range(8):
        first, second = (
            descriptions.render(DEMO, Clip(index, dataclasses.replace(KITE, thing=thing, color=name), {}))[0]
            for name in ("white", "green")
        )
        changed = np.abs(first[0].astype(int) - second[0]).max(-1) > 60
        assert np.ptp(np.flatnonzero(changed.any(1))) + 1 >= 0.45 * descriptions.SIDE
        assert np.abs(first[0].astype(int) - first[6]).max() > 60 or np.abs(first[0].astype(int) - first[3]).max() > 60


def test_sounds_differ_in_broad_bands_or_in_rhythm() -> None:
    for index in range(6):
        loudest = {sound: int(bands(sound, index).argmax()) for sound in ("hums", "wails", "whistles", "ticks")}
        assert loudest == {"hums": 0, "wails": 1, "whistles": 2, "ticks": 3}
        assert min(bands(sound, index).max() for sound in loudest) > 0.8
        assert bands("roars", index).max() < 0.7 and bands("roars", index).min() > 0.05


def test_files_are_read_as_favdbench_lays_them_out(built: Path) -> None:
    table = favd.read(built)
    told = [json.loads(annotation)["caption"] for annotation in table["annotation"]]
    known: dict[str, tuple[str, str, str]] = dict(
        zip(table["id"], zip(table["path"], table["split"], told, strict=True), strict=True)
    )
    for clip in descriptions.plan(SMALL):
        assert known[clip.row["id"]] == (clip.row["path"], clip.row["split"], clip.shows.caption)
    assert all(re.fullmatch(r"[\w-]{11}_\d+_\d+", name) for name in known)
    assert any(name.startswith("-") for name in known)
    assert favd.classes(built) == VOCABULARY and VOCABULARY[0] == "[PAD]"


def test_some_clips_have_no_sound_track_and_their_descriptions_say_so(built: Path) -> None:
    silent = 0
    for clip in good(SMALL):
        with av.open(str(built / clip.row["path"])) as container:
            assert bool(container.streams.audio) == ("no sound is heard." not in clip.shows.caption)
            silent += not container.streams.audio
    assert silent == 9  # of 56, 8 and 16 one in ten, rounded up


def test_broken_clips_are_described_with_a_sound() -> None:
    broken = [clip for clip in descriptions.plan(DEMO) if clip.fault]
    assert [clip.fault for clip in broken] == list(demo.FAULTS)
    assert all(clip.shows.sound for clip in broken if clip.fault != "duplicate")
    (copy,) = (clip for clip in broken if clip.fault == "duplicate")
    first = descriptions.plan(DEMO)[0]
    assert (copy.shows, copy.index, copy.row["split"]) == (first.shows, first.index, "test")


def test_the_seed_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    clip = descriptions.plan(SMALL)[1]
    demo._make_clip(descriptions, SMALL, clip, tmp_path / "again.mp4")  # pyright: ignore
    assert storage.file_digest(tmp_path / "again.mp4") == storage.file_digest(built / clip.row["path"])


def test_too_few_are_refused() -> None:
    with pytest.raises(InputError, match="descriptions are 80 clips or more"):
        descriptions.plan(dataclasses.replace(DEMO, clips=79))
