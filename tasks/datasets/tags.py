"""The demo dataset `tags`: short clips with several tags each, in VideoTag's lists.

A clip shows an object all the time, and most clips show another one for a moment. The colours are those of a season, it is day
or night or turns from one to the other, and the object may come or go. What turns needs the order of frames, and what shows for
a moment attention to it: a mean over the frames tells neither well.

The label file has two names twice, as VideoTag's has ten: spring and fall are seasons, and dayspring and nightfall too. The
lists are as people's are: a path with a space in it, a blank line, a label that repeats itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from models.family import InputError
from tasks import storage
from tasks.datasets import taglists
from tasks.datasets.demo import FAULTS, Clip, Demo
from tasks.datasets.scenes import DRAWINGS, FPS, OBJECTS, SAMPLE_RATE, Array, color, colored_noise, edge, plane

SEASONS, LIGHTS, WAYS = ("spring", "fall"), ("day", "night", "spring", "fall"), ("coming", "going")
NAMES = [*OBJECTS, *SEASONS, *LIGHTS, *WAYS]  # a class's place is its id
FIRST = {
    "object": 0,
    "season": len(OBJECTS),
    "light": len(OBJECTS) + 2,
    "way": len(OBJECTS) + 6,
}  # id of a group's first
SHARES = {"train": 0.65, "val": 0.15}  # the rest is the test split
FEWEST = 60  # clips, so that no split lacks a tag
SIDE = 64  # pixels
DARK, BRIGHT = 0.4, 1.0  # light of night and day
MOMENT = (0.35, 0.6)  # seconds for which the other object shows
HUES = {"kite": 0.83, "drum": 0.6, "tent": 0.12, "ladybird": 0.0, "windmill": 0.5, "flag": 0.72}
GROUND = ((0.33, 0.7, 0.6), (0.07, 0.8, 0.75), (0.6, 0.06, 0.95))  # hue, saturation, value: spring, fall, neither


@dataclass(frozen=True)
class Shown:
    """What a clip shows; None = nothing of the kind."""

    seen: int  # of OBJECTS
    other: int | None  # for a moment
    season: int | None
    light: int
    way: int | None

    @property
    def tags(self) -> list[int]:
        """Ids of what it shows, ascending."""
        groups = [("object", self.seen), ("object", self.other), ("season", self.season), ("light", self.light)]
        return sorted(FIRST[group] + k for group, k in [*groups, ("way", self.way)] if k is not None)


class Lists:
    """The format of the kind: taglists, as people write them."""

    read, class_of = staticmethod(taglists.read), staticmethod(taglists.class_of)

    @staticmethod
    def write(table: pd.DataFrame, folder: Path) -> None:
        """The lists and the label file."""
        taglists.write(table, folder)
        taglists.write_classes(NAMES, folder)
        path = folder / "train.list"
        lines = path.read_text(encoding="utf-8").splitlines()
        lines[1] += f" {lines[1].split()[-1]}"
        lines.insert(3, "")
        with storage.atomic_file(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


FORMAT = Lists


def plan(demo: Demo) -> list[Clip]:
    """The good clips split by split, then one clip of each fault."""
    if demo.clips < FEWEST:
        raise InputError(f"params.yaml: demo.clips is {demo.clips}; tags are {FEWEST} clips or more")
    rng = np.random.default_rng(demo.seed)
    num_train, num_val = (round(demo.clips * share) for share in SHARES.values())
    splits = ["train"] * num_train + ["val"] * num_val
    splits += ["test"] * (demo.clips - len(splits))
    clips = [_clip(index, _draw(index, rng), split) for index, split in enumerate(splits)]
    for k, fault in enumerate(FAULTS):
        index, is_copy = demo.clips + k, fault == "duplicate"  # the first training clip once more, in the other split
        clip = _clip(index, clips[0].shows if is_copy else _draw(index, rng), "test" if is_copy else "train")
        clips.append(replace(clip, index=clips[0].index if is_copy else index, fault=fault))
    return clips


def _draw(index: int, rng: np.random.Generator) -> Shown:
    """Objects and lights in turn, so that each split has all of them; the rest by chance."""
    seen = index % len(OBJECTS)
    other = (seen + int(rng.integers(1, len(OBJECTS)))) % len(OBJECTS) if rng.random() < 0.75 else None
    season, way = (int(k) if (k := rng.integers(3)) < 2 else None for _ in range(2))
    return Shown(seen, other, season, int(rng.permutation(len(LIGHTS))[0]), way)


def _clip(index: int, shown: Shown, split: str) -> Clip:
    name = f"clip {index:04d}" if index == 2 else f"clip_{index:04d}"
    return Clip(index, shown, taglists.row(name.replace(" ", "_"), f"videos/{name}.mp4", split, shown.tags))


def render(demo: Demo, clip: Clip) -> tuple[Array, Array]:
    """(T, SIDE, SIDE, 3) uint8 and (N,) float32 of a clip."""
    rng = np.random.default_rng([demo.seed, clip.index])
    shown: Shown = clip.shows
    times = np.arange(round(demo.seconds * FPS), dtype=np.float32) / FPS
    part = (times / times[-1])[:, None, None]
    picture = _background(shown, rng) + np.zeros((len(times), 1, 1, 1), np.float32)
    sizes = {0: 0.3 + 0.34 * part, 1: 0.64 - 0.34 * part}
    size = sizes.get(-1 if shown.way is None else shown.way, np.full_like(part, rng.uniform(0.36, 0.58)))
    _paint(picture, shown.seen, size, (-0.3, rng.uniform(-0.2, 0.2)), times, rng)
    if shown.other is not None:
        start = rng.uniform(0.1, demo.seconds - MOMENT[1] - 0.1)
        during = slice(*np.searchsorted(times, [start, start + rng.uniform(*MOMENT)]))
        there = np.full((len(times[during]), 1, 1), 0.4, np.float32)
        _paint(picture[during], shown.other, there, (0.5, rng.uniform(-0.3, 0.3)), times[during], rng)
    turning = DARK + (BRIGHT - DARK) * part
    light = (BRIGHT, DARK, turning, DARK + BRIGHT - turning)[shown.light] * rng.uniform(0.9, 1.0)
    frames = 255 * np.clip(picture * np.reshape(light, (-1, 1, 1, 1)), 0, 1) + 0.5
    noise = colored_noise(round(demo.seconds * SAMPLE_RATE), rng.uniform(0, 1), rng)
    return np.moveaxis(frames.astype(np.uint8), 1, -1), (0.05 * noise / noise.std()).clip(-1, 1).astype(np.float32)


def _background(shown: Shown, rng: np.random.Generator) -> Array:
    """(3, SIDE, SIDE) float32: sky over ground in the colours of the season."""
    y = np.linspace(-1, 1, SIDE, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, SIDE, dtype=np.float32)[None]
    hue, saturation, value = GROUND[2 if shown.season is None else shown.season]
    ground = plane(color(hue + rng.uniform(-0.03, 0.03), saturation, value * rng.uniform(0.9, 1.05)))
    sky = plane(color(0.57, rng.uniform(0.1, 0.3), 0.95))
    hills = edge(y - rng.uniform(0.1, 0.4) - 0.12 * np.sin(rng.uniform(1.5, 4) * x + rng.uniform(0, 6)))
    return (sky + (ground - sky) * hills).astype(np.float32)


def _paint(
    picture: Array, kind: int, size: Array, place: tuple[float, float], times: Array, rng: np.random.Generator
) -> None:
    """Draw an object of `size` (T, 1, 1) in half pictures at `place` into (T, 3, SIDE, SIDE)."""
    axis = np.linspace(-1, 1, SIDE, dtype=np.float32)
    u, v = (axis[None, None] - place[0]) / size, (axis[None, :, None] - place[1]) / size
    name = OBJECTS[kind]
    phase = (rng.uniform(0, 2 * np.pi) + (2.5 if name == "windmill" else 0.3) * times[:, None, None]).astype(np.float32)
    cover, pattern = DRAWINGS[name](u, v, rng.uniform(0.9, 1.15), phase)
    hue = HUES[name] + rng.uniform(-0.02, 0.02)
    first, second = plane(color(hue, 0.9, 0.85)), plane(color(hue + 0.04, 0.25, 0.98))
    paint = first + (second - first) * edge(pattern, 0.5)[:, None]
    picture += (paint - picture) * cover[:, None]
