"""What the demo dataset `actions` shows: a chequered balloon that has another size, or is gone, for a while.

Plain balls drift through the picture, and a lamp goes on and off, all of which means nothing. They change the picture's mean
colours more than the balloon does, whose squares are as much darker as lighter than the ground: its size shows in its pattern
alone, which features of random weights tell badly and adapters learn to tell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tasks.datasets.scenes import FPS, SAMPLE_RATE, Array, Color, color, colored_noise, edge, plane

SIDE = 64  # pixels
GROUND, CONTRAST = 0.45, 0.43  # mean level of the ground; what the balloon's squares differ by
SQUARE = 4.0  # pixels
NUM_BALLS, NUM_STAINS = 5, 3
LENGTH = (4.5, 9.0)  # seconds of an event
REST = 2.5  # seconds between events at least
MURMUR = 1 << 16  # samples after which the noise repeats itself
ACTIONS = {"inflated": 1.6, "deflated": 0.4, "gone": 0.0}  # its size during them, times that at rest
Event = tuple[float, float, str]  # start and end in seconds, action


@dataclass(frozen=True)
class Play:
    """Everything that is seen and heard in one video."""

    seconds: float
    events: tuple[Event, ...]  # in order and apart
    place: tuple[float, float]  # where the balloon rests, in half heights from the centre
    size: float  # its radius at rest, in half heights
    drift: tuple[float, float, float, float]  # phases of its slow wandering, growing and turning
    light: tuple[float, float, float]  # place of the lamp, and seconds between its goings on
    noise: tuple[float, float]  # level, and exponent of its 1/f colour
    seed: int  # of ground, balls and noise


def draw_events(seconds: float, actions: list[str], rng: np.random.Generator) -> tuple[Event, ...]:
    """These actions one after another, of any length, REST or more apart, anywhere in the video."""
    lengths = rng.uniform(*LENGTH, len(actions))
    free = seconds - lengths.sum() - REST * (len(actions) + 1)
    assert free > 0, "more events than there is room for"
    gaps = REST + rng.dirichlet(np.ones(len(actions) + 1)) * free
    starts = np.cumsum(gaps[:-1]) + np.concatenate([[0.0], np.cumsum(lengths)[:-1]])
    return tuple(
        (round(float(start), 2), round(float(start + length), 2), action)
        for start, length, action in zip(starts, lengths, actions, strict=True)
    )


def draw_play(seconds: float, events: tuple[Event, ...], rng: np.random.Generator) -> Play:
    """A video of these events whose every other property comes from `rng`."""
    return Play(
        seconds=seconds,
        events=events,
        place=(float(rng.uniform(-0.4, 0.4)), float(rng.uniform(-0.4, 0.4))),
        size=float(rng.uniform(0.3, 0.34)),
        drift=tuple(rng.uniform(0, 2 * np.pi, 4).tolist()),
        light=(float(rng.uniform(-0.9, 0.9)), float(rng.uniform(-0.9, 0.9)), float(rng.uniform(1.0, 3.0))),
        noise=(float(10 ** rng.uniform(-2.0, -1.3)), float(rng.uniform(0.3, 1.2))),
        seed=int(rng.integers(2**31)),
    )


def pose(play: Play, times: Array) -> tuple[Array, Array, Array, Array]:
    """Where the balloon is (x to the right and y up, in half heights), its radius and its angle (radians), at `times` (s)."""
    slow = [
        np.sin(2 * np.pi * times / period + phase) for period, phase in zip((31, 23, 41, 29), play.drift, strict=True)
    ]
    x, y = play.place[0] + 0.06 * slow[0], play.place[1] + 0.06 * slow[1]
    size, angle = play.size * (1 + 0.04 * slow[2]), play.drift[3] + 0.5 * slow[3]
    for start, end, action in play.events:
        size = np.where((times >= start) & (times < end), size * ACTIONS[action], size)
    return x, y, size, angle


def render_wave(play: Play) -> Array:
    """(N,) float32 in [-1, 1] at SAMPLE_RATE: a murmur, and a pump that ticks while something happens."""
    rng = np.random.default_rng(play.seed)
    level, exponent = play.noise
    noise = colored_noise(MURMUR, exponent, rng)
    sound = np.resize((level * noise / noise.std() / 3).astype(np.float32), round(play.seconds * SAMPLE_RATE))
    tick = np.arange(SAMPLE_RATE // 6, dtype=np.float32) / SAMPLE_RATE
    tick = 0.3 * np.sin(2 * np.pi * 900 * tick) * np.exp(-120 * tick)
    for start, end, _ in play.events:
        part = slice(round(start * SAMPLE_RATE), round(end * SAMPLE_RATE))
        sound[part] += np.resize(tick, len(sound[part]))
    return (0.8 * np.clip(sound, -1, 1)).astype(np.float32)


def render_frames(play: Play) -> Array:
    """(T, SIDE, SIDE, 3) uint8 RGB, T = seconds * FPS."""
    times = (np.arange(round(play.seconds * FPS)) / FPS).astype(np.float32)
    axis = np.linspace(-1, 1, SIDE, dtype=np.float32)
    x, y = axis[None, :], -axis[:, None]
    background = _ground(play, x, y)
    frames = np.empty((len(times), SIDE, SIDE, 3), np.uint8)
    for first in range(0, len(times), 8):  # as many as stay in the processor's cache
        part = slice(first, first + 8)
        picture = np.repeat(background[None], len(times[part]), axis=0)
        for draw in (_balls, _lamp, _balloon):
            for paint, cover in draw(play, times[part], x, y):
                picture += (paint - picture) * cover[:, None]
        frames[part] = np.moveaxis((255 * np.clip(picture, 0, 1) + 0.5).astype(np.uint8), 1, -1)
    return frames


def _ground(play: Play, x: Array, y: Array) -> Array:
    """(3, SIDE, SIDE) float32: grey with stains."""
    rng = np.random.default_rng([play.seed, 1])
    picture = np.full((3, SIDE, SIDE), GROUND)
    for _ in range(NUM_STAINS):
        (u, v), radius = rng.uniform(-1, 1, 2), rng.uniform(0.15, 0.5)
        picture = picture + rng.uniform(-0.15, 0.15, (3, 1, 1)) * edge(radius - _distance(x - u, y - v))
    return picture.astype(np.float32)


def _balls(play: Play, times: Array, x: Array, y: Array) -> list[tuple[Array, Array]]:
    """Balls on their way through the picture, again and again."""
    rng = np.random.default_rng([play.seed, 2])
    layers = []
    for _ in range(NUM_BALLS):
        ends = ((0, 2 * math.pi), (0.15, 0.5), (-0.8, 0.8), (0, 4))
        angle, speed, offset, phase = (float(rng.uniform(*pair)) for pair in ends)
        way = ((times * speed + phase) % 3.2 - 1.6)[:, None, None]
        u = way * math.cos(angle) - offset * math.sin(angle)
        v = way * math.sin(angle) + offset * math.cos(angle)
        paint = plane(color(rng.random(), rng.uniform(0.6, 0.9), rng.uniform(0.5, 0.9)))
        layers.append((paint, edge(rng.uniform(0.08, 0.16) - _distance(x - u, y - v))))
    return layers


def _lamp(play: Play, times: Array, x: Array, y: Array) -> list[tuple[Array, Array]]:
    u, v, period = play.light
    glow = 0.4 + 0.4 * np.sign(np.sin(2 * np.pi * times / period))[:, None, None]
    paint: Color = (1.0, 0.6, 0.1)
    return [(plane(paint), edge(0.1 - _distance(x - u, y - v)) * glow)]


def _balloon(play: Play, times: Array, x: Array, y: Array) -> list[tuple[Array, Array]]:
    """A disc of squares, which stay as large as they are."""
    at_x, at_y, size, angle = (values.astype(np.float32)[:, None, None] for values in pose(play, times))
    u, v = x - at_x, y - at_y
    disc = edge(size - _distance(u, v)) * (size > 0)
    along, across = u * np.cos(angle) - v * np.sin(angle), u * np.sin(angle) + v * np.cos(angle)
    number = math.pi * SIDE / 2 / SQUARE
    squares = edge(np.sin(number * along) * np.sin(number * across), 0.6)
    dark, light = (plane((level, level, level)) for level in (GROUND - CONTRAST, GROUND + CONTRAST))
    return [(dark, disc), (light, disc * squares)]


def _distance(u: Array, v: Array) -> Array:
    return np.sqrt(u * u + v * v)
