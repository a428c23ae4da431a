"""The demo dataset of species and behaviour: what each modality alone can reach, what is seen and heard, its plan."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from models.family import InputError
from tasks import storage
from tasks.datasets import animals, demo, meadow, wildlife
from tasks.datasets.demo import Clip, Demo

DEMO = Demo(kind="animals", seed=7, clips=480, seconds=3.0, workers=2)
SMALL = dataclasses.replace(DEMO, clips=80, seconds=1.0)
PAIRS = list(itertools.product(meadow.SPECIES, meadow.ACTIVITIES))


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return animals.plan(DEMO)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert demo.build_demo(SMALL, folder) == 80 + len(demo.FAULTS)
    return folder


def encounter(species: str = "fox", activity: str = "vigilance", seed: int = 5) -> meadow.Encounter:
    place = meadow.draw_meadow(np.random.default_rng(1))
    return meadow.draw_encounter(species, activity, 3.0, place, np.random.default_rng(seed))


def test_picture_or_sound_alone_tells_two_species_and_both_tell_all() -> None:
    for side in (0, 1):
        assert set(Counter(pair[side] for pair in meadow.SPECIES.values()).values()) == {2}
    assert len(set(meadow.SPECIES.values())) == len(meadow.SPECIES)
    assert Counter(pair[0] for pair in meadow.ACTIVITIES.values())["watching"] == 2
    assert Counter(pair[1] for pair in meadow.ACTIVITIES.values())["once"] == 3
    assert len(set(meadow.ACTIVITIES.values())) == len(meadow.ACTIVITIES)


def test_nothing_but_its_look_and_its_calls_depend_on_the_species() -> None:
    for first, second in itertools.combinations(meadow.SPECIES, 2):
        one, other = encounter(first), encounter(second)
        same_look, same_call = one.look == other.look, one.call == other.call
        changed = {
            field.name for field in dataclasses.fields(one) if getattr(one, field.name) != getattr(other, field.name)
        }
        allowed = {"species"} | (set() if same_look else {"fur"})
        assert changed - allowed <= (set() if same_call else {f.name for f in dataclasses.fields(one)})
        assert np.array_equal(meadow.render_frames(one), meadow.render_frames(dataclasses.replace(one, pitch=1.0)))


def test_watching_and_courting_look_the_same_and_sound_different() -> None:
    one, other = encounter(activity="vigilance"), encounter(activity="courtship")
    assert dataclasses.replace(other, activity="vigilance", calls=one.calls) == one
    assert np.array_equal(meadow.render_frames(one), meadow.render_frames(other))
    assert len(one.calls) == 1 and len(other.calls) >= 4


@pytest.mark.parametrize("call", meadow.LENGTH)
def test_calls_lie_inside_the_clip_and_apart(call: str) -> None:
    species = next(name for name, pair in meadow.SPECIES.items() if pair[1] == call)
    for activity, seed in itertools.product(meadow.ACTIVITIES, range(30)):
        calls = np.array(encounter(species, activity, seed).calls)
        assert calls.min() >= 0 and calls.max() + meadow.LENGTH[call] <= 3.0
        assert len(calls) == 1 or np.diff(calls).min() >= 0


def test_a_call_is_heard_when_it_is_said_to_be() -> None:
    one = dataclasses.replace(encounter(), noise=(1e-3, 0.5), loudness=1.0, calls=(1.0,))
    wave = meadow.render_wave(one)
    assert wave.shape == (48000,) and wave.dtype == np.float32 and np.abs(wave).max() <= 0.8
    assert wave[16000:17600].std() > 50 * wave[:16000].std() and wave[32000:].std() < 0.01


def moved(activity: str) -> tuple[float, float]:
    """Mean change from frame to frame, and the columns that ever change, of a dozen encounters."""
    change, columns = [], []
    for seed in range(12):
        frames = meadow.render_frames(encounter("red_deer", activity, seed)).astype(float)
        difference = np.abs(np.diff(frames, axis=0)).max(-1)
        change.append(difference.mean())
        columns.append((difference.max((0, 1)) > 20).mean())
    return float(np.mean(change)), float(np.mean(columns))


def test_what_is_done_is_seen_in_the_motion() -> None:
    running, grazing, watching = moved("escaping"), moved("foraging"), moved("vigilance")
    assert running[0] > 3 * max(grazing[0], watching[0])
    assert running[1] > 0.95
    assert max(grazing[1], watching[1]) < 0.7
    poses = {
        activity: meadow.pose(encounter(activity=activity), np.zeros((1, 1, 1), np.float32))
        for activity in meadow.ACTIVITIES
    }
    assert poses["foraging"].down.min() > 0.8 and poses["vigilance"].down.max() == 0


def test_every_split_has_every_pair_and_some_are_rare(clips: list[Clip]) -> None:
    good = [clip for clip in clips if not clip.fault]
    assert Counter(clip.row["split"] for clip in good) == {"train": 287, "val": 73, "test": 120}
    for split in wildlife.SPLITS:
        counts = Counter(clip.shows[:2] for clip in good if clip.row["split"] == split)
        assert set(counts) == set(PAIRS)
        assert counts["red_deer", "foraging"] >= 3 * counts["wolf", "courtship"]


def test_events_are_of_one_animal_at_one_place_in_one_split(clips: list[Clip]) -> None:
    events: dict[str, set] = {}
    for clip in clips:
        events.setdefault(clip.row["group"], set()).add((clip.row["split"], clip.shows[0], clip.shows[2]))
    repeated = {clip.row["group"] for clip in clips if clip.fault == "duplicate"}
    assert all(len(kinds) == 1 for event, kinds in events.items() if event not in repeated)
    assert 1.5 < len(clips) / len(events) < 2.5


def test_some_training_clips_lack_a_label_and_no_other_does(clips: list[Clip]) -> None:
    lacking = {split: Counter() for split in wildlife.SPLITS}
    for clip in clips:
        for head, label in json.loads(clip.row["annotation"]).items():
            lacking[clip.row["split"]][head] += label is None
    assert lacking["train"] == {"species": 12, "activity": 12}
    assert not any(lacking["val"].values()) and not any(lacking["test"].values())


@pytest.mark.parametrize(("shares", "total"), [([0.6, 0.15, 0.25], 80), ([1.0, 1e-9], 10), ([1.0] * 7, 7)])
def test_shares_become_whole_numbers(shares: list[float], total: int) -> None:
    counts = animals.apportion(shares, total)
    assert sum(counts) == total and min(counts) >= 1
    assert all(abs(n - total * share / sum(shares)) <= len(shares) for n, share in zip(counts, shares, strict=True))


def test_files_and_annotations(built: Path) -> None:
    table = wildlife.read(built)
    assert len(table) == 80 + len(demo.FAULTS)
    planned = [dict(clip.row) for clip in animals.plan(SMALL)]
    assert sorted(table["id"]) == sorted(row["id"] for row in planned)
    with av.open(str(built / table["path"][0])) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert (video.width, video.height, len(list(container.decode(video)))) == (96, 72, 12)
    missing = [path for path in table["path"] if not (built / path).exists()]
    assert missing == [clip.row["path"] for clip in animals.plan(SMALL) if clip.fault == "missing"]
    digests = table["path"].map(lambda path: storage.file_digest(built / path) if (built / path).exists() else path)
    twins = table[digests.duplicated(keep=False)]
    assert twins["split"].tolist() == ["train", "test"] and twins["annotation"].nunique() == 1


def test_the_seed_gives_the_same_bytes(built: Path, clips: list[Clip]) -> None:
    before = storage.folder_digest(built)
    for path in sorted(built.glob("S*/*.mp4"))[:3]:
        path.unlink()
    demo.build_demo(dataclasses.replace(SMALL, workers=1), built)
    assert storage.folder_digest(built) == before
    other = animals.plan(dataclasses.replace(DEMO, seed=8))
    assert [clip.row for clip in other] != [clip.row for clip in clips]


def test_too_few_clips_are_refused() -> None:
    with pytest.raises(InputError, match=r"demo\.clips is 79; animals are 80"):
        animals.plan(dataclasses.replace(DEMO, clips=79))
