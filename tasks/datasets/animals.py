"""The demo dataset `animals`: species and behaviour of animals that pass a camera, annotated as `wildlife` reads it.

Some species and some activities are rare, and their pairs rarer. The clips of an event show one animal at one place, and
all lie in the same split. One training clip in 24 has no species, another one no activity.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from models.family import InputError
from tasks.datasets import wildlife
from tasks.datasets.demo import FAULTS, Clip, Demo
from tasks.datasets.meadow import (
    ACTIVITIES,
    SPECIES,
    draw_encounter,
    draw_meadow,
    render_frames,
    render_wave,
)

FORMAT = wildlife
SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}
FREQUENT = ((0.38, 0.28, 0.2, 0.14), (0.36, 0.26, 0.2, 0.18))  # share of each species, of each activity, in their order
UNKNOWN = 24  # one training clip in so many lacks one of its labels
FEWEST = 80  # clips, so that no split lacks a pair


def plan(demo: Demo) -> list[Clip]:
    """The good clips split by split and event by event, then one clip of each fault."""
    if demo.clips < FEWEST:
        raise InputError(f"params.yaml: demo.clips is {demo.clips}; animals are {FEWEST} clips or more")
    rng = np.random.default_rng(demo.seed)
    clips: list[Clip] = []
    num_events = 0
    for split, number in zip(SHARES, apportion(list(SHARES.values()), demo.clips), strict=True):
        for species, activities in _sightings(number, rng):
            num_events += 1
            clips += _event(rng, num_events, species, activities, split, len(clips))
    for k, fault in enumerate(FAULTS):
        if fault == "duplicate":  # the first training clip once more, in the other split
            species, activity, split = *clips[0].shows[:2], "test"
        else:
            species, activity, split = list(SPECIES)[k % len(SPECIES)], "foraging", "train"
        (clip,) = _event(rng, num_events + k + 1, species, [activity], split, len(clips))
        source = clips[0] if fault == "duplicate" else clip
        clips.append(replace(clip, index=source.index, shows=source.shows, fault=fault))
    return clips


def apportion(shares: list[float], total: int) -> list[int]:
    """Whole numbers in proportion to `shares`, 1 or more each, that sum to `total`: largest remainders first."""
    exact = np.array(shares) / sum(shares) * (total - len(shares))
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - len(shares) - counts.sum()]] += 1
    return (counts + 1).tolist()


def _sightings(number: int, rng: np.random.Generator) -> list[tuple[str, list[str]]]:
    """Events of one species and one to three activities each, in any order; every pair as often as it is frequent."""
    pairs = np.outer(*FREQUENT).ravel().tolist()
    counts = np.reshape(apportion(pairs, number), (len(SPECIES), len(ACTIVITIES)))
    events: list[tuple[str, list[str]]] = []
    for species, row in zip(SPECIES, counts, strict=True):
        activities = rng.permutation(np.repeat(list(ACTIVITIES), row)).tolist()
        while activities:
            size = int(rng.integers(1, 4))
            events.append((species, activities[:size]))
            activities = activities[size:]
    return [events[k] for k in rng.permutation(len(events))]


def _event(
    rng: np.random.Generator, number: int, species: str, activities: list[str], split: str, first: int
) -> list[Clip]:
    """Its clips, named as MammAlps names them: site, camera, event, video, individual, track, clip."""
    site, camera = int(rng.integers(1, 4)), int(rng.integers(1, 10))
    track = f"S{site}_C{camera}_E{number:03d}_V{first:04d}_ID1_T1"
    clips: list[Clip] = []
    for k, activity in enumerate(activities):
        index = first + k
        known = (
            None if split == "train" and index % UNKNOWN == 7 else species,
            None if split == "train" and index % UNKNOWN == 19 else activity,
        )
        clips.append(Clip(index, (species, activity, number), wildlife.row(f"{track}/{track}_c{k}.mp4", *known, split)))
    return clips


def render(demo: Demo, clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """(T, H, W, 3) uint8 and (N,) float32 of a clip."""
    species, activity, event = clip.shows
    meadow = draw_meadow(np.random.default_rng([demo.seed, event]))
    rng = np.random.default_rng([demo.seed, event, clip.index])
    encounter = draw_encounter(species, activity, demo.seconds, meadow, rng)
    return render_frames(encounter), render_wave(encounter)
