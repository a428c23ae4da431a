"""The demo dataset `descriptions`: short clips, each described as FAVDBench describes its own.

A description is lower case, has no commas, and says first what is seen and last what is heard:
    a red kite flies over a meadow. it is snowing. a siren wails.
One template, so that the words of THINGS, COLORS, PLACES, AIRS and SOUNDS can be scored each for itself. The five are drawn
independently of each other: nothing that is seen tells the sound, nor the other way round. One clip in ten has no sound
track, and its description says so. All is large, still and plain, for a small model has to learn it in minutes on a processor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from models.family import InputError
from tasks.datasets import favd
from tasks.datasets.demo import FAULTS, Clip, Demo
from tasks.datasets.scenes import FPS, SAMPLE_RATE, Array, Color, color, colored_noise, edge, plane
from tasks.datasets.sounds import ALPHABET

SHARES = {"train": 0.7, "val": 0.1}  # the rest is the test split
FEWEST = 80  # clips, so that no split lacks a word
SILENT = 10  # one clip in so many has no sound track
SIDE = 64  # pixels

THINGS = {"kite": "flies", "balloon": "floats", "saucer": "hovers", "wheel": "spins"}  # and what each does
COLORS = {  # hue, saturation, value
    "red": (0.99, 0.95, 0.9),
    "orange": (0.075, 1.0, 1.0),
    "yellow": (0.155, 1.0, 1.0),
    "green": (0.34, 0.95, 0.75),
    "blue": (0.61, 0.95, 0.95),
    "purple": (0.8, 0.9, 0.75),
    "white": (0.0, 0.0, 1.0),
}
PLACES: dict[str, tuple[Color, Color]] = {  # sky, ground
    "meadow": ((0.5, 0.75, 0.95), (0.3, 0.6, 0.15)),
    "desert": ((0.95, 0.75, 0.5), (0.75, 0.5, 0.25)),
    "lake": ((0.8, 0.6, 0.7), (0.1, 0.3, 0.55)),
    "town": ((0.3, 0.25, 0.45), (0.12, 0.11, 0.14)),
}
AIRS = {"clear": "the sky is clear", "raining": "it is raining", "snowing": "it is snowing", "foggy": "it is foggy"}
SOUNDS = {  # the word that tells it, and its sentence
    "hums": "an engine hums",
    "whistles": "a bird whistles",
    "ticks": "a clock ticks",
    "wails": "a siren wails",
    "roars": "a waterfall roars",
}
NO_SOUND = "no sound is heard"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".")
INK, MIST, FLAKE, DROP, SUN = (0.07, 0.06, 0.08), (0.8, 0.82, 0.84), (1.0, 1.0, 1.0), (0.8, 0.88, 1.0), (1.0, 0.95, 0.6)


@dataclass(frozen=True)
class Shown:
    """What a clip shows and lets hear: words of the lists above."""

    thing: str
    color: str
    place: str
    air: str
    sound: str | None  # None = no sound track

    @property
    def caption(self) -> str:
        """Its description."""
        article = "an" if self.color[0] in "aeiou" else "a"
        seen = f"{article} {self.color} {self.thing} {THINGS[self.thing]} over a {self.place}"
        return f"{seen}. {AIRS[self.air]}. {SOUNDS[self.sound] if self.sound else NO_SOUND}."


# Wordpieces of the vocabulary, by their id: every word is one.
VOCABULARY = [*SPECIAL, *sorted(
    {"a", "an", "over", *THINGS, *THINGS.values(), *COLORS, *PLACES}
    | {word for told in (*AIRS.values(), *SOUNDS.values(), NO_SOUND) for word in told.split()}
)]  # fmt: skip


class Described:
    """The format of the kind: FAVDBench's metadata, and a vocabulary of no more words than are needed."""

    read, class_of = staticmethod(favd.read), staticmethod(favd.class_of)

    @staticmethod
    def write(table: pd.DataFrame, folder: Path) -> None:
        """The metadata and vocab.txt."""
        favd.write(table, folder)
        favd.write_classes(VOCABULARY, folder)


FORMAT = Described


def plan(demo: Demo) -> list[Clip]:
    """The good clips split by split, then one clip of each fault."""
    if demo.clips < FEWEST:
        raise InputError(f"params.yaml: demo.clips is {demo.clips}; descriptions are {FEWEST} clips or more")
    rng = np.random.default_rng(demo.seed)
    num_train, num_val = (round(demo.clips * share) for share in SHARES.values())
    numbers = {"train": num_train, "val": num_val, "test": demo.clips - num_train - num_val}
    drawn = [(split, shown) for split, number in numbers.items() for shown in _draw(number, rng)]
    clips = [_clip(demo, rng, index, shown, split) for index, (split, shown) in enumerate(drawn)]
    for k, (fault, shown) in enumerate(zip(FAULTS, _draw(len(FAULTS), rng), strict=True)):
        index, is_copy = demo.clips + k, fault == "duplicate"  # the first training clip once more, in the other split
        # A broken clip had a sound: that it has none is the fault of one of them.
        shown = clips[0].shows if is_copy else replace(shown, sound=list(SOUNDS)[k % len(SOUNDS)])
        clip = _clip(demo, rng, index, shown, "test" if is_copy else "train")
        clips.append(replace(clip, index=clips[0].index if is_copy else index, fault=fault))
    return clips


def _draw(number: int, rng: np.random.Generator) -> list[Shown]:
    """Each word of a list as often as the others, each list in an order of its own."""
    silent = -(-number // SILENT)
    heard = [*[None] * silent, *(list(SOUNDS)[k % len(SOUNDS)] for k in range(number - silent))]
    columns = [[list(words)[k % len(words)] for k in range(number)] for words in (THINGS, COLORS, PLACES, AIRS)]
    mixed = [[column[k] for k in rng.permutation(number)] for column in (*columns, heard)]
    return [Shown(*words) for words in zip(*mixed, strict=True)]


def _clip(demo: Demo, rng: np.random.Generator, index: int, shown: Shown, split: str) -> Clip:
    """A clip with an id as FAVDBench gives them: YouTube's, begin and end in milliseconds."""
    ytid = "".join(rng.choice(ALPHABET, 11))
    begin = 1000 * int(rng.integers(0, 600))
    name = f"{'-' + ytid[1:] if index % 40 == 5 else ytid}_{begin}_{begin + round(1000 * demo.seconds)}"
    return Clip(index, shown, favd.row(name, f"videos/{split}/{name}.mp4", split, shown.caption))


def render(demo: Demo, clip: Clip) -> tuple[Array, Array | None]:
    """(T, SIDE, SIDE, 3) uint8 and (N,) float32 of a clip, None where it has no sound track."""
    rng = np.random.default_rng([demo.seed, clip.index])
    shown: Shown = clip.shows
    frames = _render_frames(shown, demo.seconds, rng)
    return frames, None if shown.sound is None else _render_wave(shown.sound, demo.seconds, rng)


# --- sound ------------------------------------------------------------------------------------------------------------


def _hum(times: Array, rng: np.random.Generator) -> Array:
    """Steady, all of it below 500 Hz."""
    pitch = rng.uniform(80, 120)
    return _tone(np.full_like(times, pitch), (1.0, 0.8, 0.6, 0.4), rng) * (1 + 0.2 * np.sin(2 * np.pi * 9 * times))


def _whistle(times: Array, rng: np.random.Generator) -> Array:
    """Pure and high, two notes a second."""
    position = (times * rng.uniform(1.9, 2.3) + rng.random()) % 1
    pitch = rng.uniform(2200, 2700) * (1 + 0.04 * np.sin(2 * np.pi * position))
    return _tone(pitch, (1.0,), rng) * np.clip(np.minimum(position, 0.75 - position) / 0.04, 0, 1)


def _tick(times: Array, rng: np.random.Generator) -> Array:
    """Short and sharp, about five a second, all of it above 4 kHz."""
    position = (times * rng.uniform(4.6, 5.4) + rng.random()) % 1
    bursts = rng.standard_normal(len(times)) * np.exp(-position * 18)
    spectrum = np.fft.rfft(bursts)
    spectrum[: int(4000 * len(times) / SAMPLE_RATE)] = 0
    return 3 * np.fft.irfft(spectrum, len(times))


def _wail(times: Array, rng: np.random.Generator) -> Array:
    """Rises from 550 to 1400 Hz once in two thirds of a second, then begins again."""
    position = (times * rng.uniform(1.4, 1.6) + rng.random()) % 1
    return _tone(rng.uniform(540, 600) * 2 ** (1.3 * position), (1.0, 0.25), rng)


def _roar(times: Array, rng: np.random.Generator) -> Array:
    """Steady noise over all of the spectrum."""
    noise = colored_noise(len(times), rng.uniform(0.4, 0.7), rng)
    return 0.5 * noise / noise.std()


def _tone(pitch: Array, harmonics: tuple[float, ...], rng: np.random.Generator) -> Array:
    """A tone whose pitch (N,) in Hz may move."""
    phase = 2 * np.pi * (np.cumsum(pitch) / SAMPLE_RATE + rng.random())
    return sum((a * np.sin((k + 1) * phase) for k, a in enumerate(harmonics)), np.zeros_like(phase)) / sum(harmonics)


# seconds (N,) -> (N,) about 1 at its loudest
VOICES: dict[str, Callable[[Array, np.random.Generator], Array]] = {
    "hums": _hum,
    "whistles": _whistle,
    "ticks": _tick,
    "wails": _wail,
    "roars": _roar,
}


def _render_wave(sound: str, seconds: float, rng: np.random.Generator) -> Array:
    """(N,) float32 in [-1, 1] at SAMPLE_RATE: the sound all the time over faint noise."""
    times = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    wave = rng.uniform(0.4, 0.7) * VOICES[sound](times, rng) + 0.003 * rng.standard_normal(len(times))
    return wave.clip(-1, 1).astype(np.float32)


# --- picture ----------------------------------------------------------------------------------------------------------

AXIS = np.linspace(-1, 1, SIDE, dtype=np.float32)
X, Y = AXIS[None, :], AXIS[:, None]


def _kite(u: Array, v: Array) -> tuple[Array, Array]:
    """A diamond in chequers, and a tail with bows."""
    diamond = 1.0 - 1.1 * np.abs(u) - np.abs(v + 0.14)
    tail = np.where((v > 0.78) & (v < 1.3), 0.02 + 0.15 * np.abs(np.sin(5.9 * (v - 0.78))) - np.abs(u), -1)
    chequers = 4 * np.cos(4.7 * (1.1 * u + v + 0.14)) * np.cos(4.7 * (1.1 * u - v - 0.14))
    return np.maximum(diamond, tail), np.where(v < 0.78, chequers, 1)


def _balloon(u: Array, v: Array) -> tuple[Array, Array]:
    """A ball in upright stripes, its basket below."""
    height = v + 0.2
    ball = 0.85 - np.hypot(u, height)
    basket = np.minimum(0.24 - np.abs(u), 0.15 - np.abs(v - 1.0))
    ropes = np.where((v > 0.5) & (v < 0.9), 0.02 - np.abs(np.abs(u) - 0.2), -1)
    stripes = np.cos(2 * np.pi * u / np.sqrt(np.maximum(0.73 - height**2, 0.04)) / 0.8) + 0.35
    return np.maximum(np.maximum(ball, basket), ropes), np.where(v < 0.75, stripes, 1)


def _saucer(u: Array, v: Array) -> tuple[Array, Array]:
    """A flat oval with a row of portholes and a dome."""
    body = (1 - np.hypot(u / 1.15, (v - 0.2) / 0.52)) * 0.5
    dome = np.minimum(0.6 - np.hypot(u, v + 0.15), 0.1 - v)
    cell = u / 0.48 - np.round(u / 0.48)
    return np.maximum(body, dome), 4 * (np.hypot(0.48 * cell, v - 0.2) - 0.15)


def _wheel(u: Array, v: Array) -> tuple[Array, Array]:
    """Rings around a hole through which the place is seen."""
    radius = np.hypot(u, v)
    return np.minimum(1.0 - radius, radius - 0.4), 4 * (np.abs(radius - 0.7) - 0.09)


# (u, v) in units of the thing's size from its centre, v down -> positive inside; pattern: > 0 its colour, < 0 dark
LOOKS: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "kite": _kite,
    "balloon": _balloon,
    "saucer": _saucer,
    "wheel": _wheel,
}


def _render_frames(shown: Shown, seconds: float, rng: np.random.Generator) -> Array:
    """(T, SIDE, SIDE, 3) uint8: a still place and air, before it the thing, which bobs a little; faint noise."""
    air = _draw_air(shown.air, rng)
    behind = _draw_place(shown, rng)
    paint, cover = _draw_thing(shown, rng)
    heights = np.arange(-2, 3)
    pictures = np.stack([air(behind + (np.roll(paint, h, 1) - behind) * np.roll(cover, h, 0)) for h in heights])
    levels = np.moveaxis(255 * np.clip(pictures, 0, 1), 1, -1)  # (5, SIDE, SIDE, 3)
    times = np.arange(round(seconds * FPS)) / FPS
    bob = np.round(2 * np.sin(2 * np.pi * (rng.uniform(0.4, 0.6) * times + rng.random()))).astype(int)
    noise = rng.integers(-3, 4, (len(times), SIDE, SIDE, 1), np.int16)
    return np.clip(levels.astype(np.int16)[bob + 2] + noise, 0, 255).astype(np.uint8)


def _draw_place(shown: Shown, rng: np.random.Generator) -> Array:
    """(3, SIDE, SIDE) float32: the sky, brighter towards the ground, and the ground with what is typical of it."""
    sky, ground = (plane(paint) * np.float32(rng.uniform(0.93, 1.05)) for paint in PLACES[shown.place])
    picture = sky * (0.95 + 0.12 * Y) + np.zeros((1, SIDE, SIDE), np.float32)
    if shown.air == "clear":
        side = -1 if rng.random() < 0.5 else 1
        picture = _over(picture, SUN, edge(0.22 - np.hypot(X - 0.75 * side, Y + 0.75)))
    level, phase = rng.uniform(0.3, 0.42), rng.uniform(0, 2 * np.pi)
    relief = {
        "meadow": 0.06 * np.sin(3 * X + phase),
        "desert": 0.16 * np.abs(np.sin(2.2 * X + phase)),
        "lake": 0 * X,
        "town": 0.55 * rng.random(8)[np.arange(SIDE) // 8][None, :],
    }[shown.place]
    texture = {
        "meadow": 0.12 * rng.standard_normal((SIDE, SIDE)),
        "desert": 0.08 * np.sin(18 * (Y + 0.15 * np.sin(4 * X + phase))),
        "lake": 0.25 * np.sin(26 * Y + np.sin(5 * X + phase)),
        "town": 0 * X * Y,
    }[shown.place].astype(np.float32)
    picture = picture + (ground * (1 + texture) - picture) * edge(Y - level + relief)
    if shown.place == "town":
        at = np.arange(SIDE)
        lit = (rng.random((16, 16)) < 0.55)[at // 4][:, at // 4] & ((at % 4 // 2 == 1)[:, None] & (at % 4 // 2 == 1))
        picture = _over(picture, (1.0, 0.8, 0.35), lit * (Y - level + relief > 0.06))
    return picture.astype(np.float32)


def _draw_thing(shown: Shown, rng: np.random.Generator) -> tuple[Array, Array]:
    """(3, SIDE, SIDE) and (SIDE, SIDE) float32: its colours with a dark outline, and where it covers the place."""
    size, tilt = rng.uniform(0.66, 0.76), rng.uniform(-0.1, 0.1)
    x, y = (X - rng.uniform(-0.12, 0.12)) / size, (Y + 0.06 - rng.uniform(-0.06, 0.06)) / size
    inside, pattern = LOOKS[shown.thing](x + tilt * y, y - tilt * x)
    hue, saturation, value = COLORS[shown.color]
    full = color(hue + rng.uniform(-0.012, 0.012), saturation, value * rng.uniform(0.93, 1.0))
    paint = _over(np.zeros((3, SIDE, SIDE), np.float32) + plane(INK), full, edge(inside, 0.08) * edge(pattern, 0.5))
    return paint, edge(inside + 0.07, 0.08).astype(np.float32)


def _draw_air(air: str, rng: np.random.Generator) -> Callable[[Array], Array]:
    """What the air does to a picture (3, SIDE, SIDE)."""
    if air == "raining":
        slant = X + 0.3 * Y
        lane = np.floor(slant * 9)
        start = rng.random(40)[(lane + 20).astype(int)]
        streaks = edge(0.28 - np.abs(slant * 9 - lane - 0.5), 0.3) * (((1.1 * Y + 3 * start) % 0.8) < 0.45)
        return lambda picture: _over(0.8 * picture, DROP, 0.75 * streaks)
    if air == "snowing":
        places = rng.uniform(-1, 1, (2, 70, 1, 1)).astype(np.float32)
        near = np.hypot(X - places[0], Y - places[1]).min(0)
        return lambda picture: _over(0.8 * picture + 0.2, FLAKE, edge(0.065 - near, 0.03))
    if air == "foggy":
        banks = 0.62 + 0.14 * np.sin(7 * Y + 1.2 * np.sin(2 * X + rng.uniform(0, 6)) + rng.uniform(0, 6))
        return lambda picture: _over(picture, MIST, banks)
    return lambda picture: picture


def _over(picture: Array, paint: Color, cover: Array) -> Array:
    """`paint` laid over (3, SIDE, SIDE) where `cover` (SIDE, SIDE) is."""
    return (picture + (plane(paint) - picture) * cover).astype(np.float32)
