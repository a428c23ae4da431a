"""What the demo dataset `actions` shows: a pinwheel that moves in one of several ways for a while, and rests in between.

A single picture never tells what happens: at rest the pinwheel stands at any place, in any size, turned by any angle. Only how
it goes on from picture to picture does. Balls drift through the picture, and a light goes on and off, all of which means nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tasks.datasets.scenes import FPS, SAMPLE_RATE, Array, Color, color, colored_noise, edge, plane

SIDE = 64  # pixels
# Action -> how far it moves the pinwheel: across and up (half heights), and in size (share).
ACTIONS = {
    "circling": (0.35, 0.35, 0.0),
    "hopping": (0.0, 0.5, 0.0),
    "swaying": (0.5, 0.0, 0.0),
    "swelling": (0.0, 0.0, 0.5),
}
PERIOD = (2.4, 3.6)  # seconds of a movement there and back
LENGTH = (4.5, 9.0)  # seconds of an event
REST = 2.5  # seconds between events at least
NUM_BALLS = 5
PAPER: tuple[Color, Color] = ((1.0, 1.0, 1.0), (0.1, 0.1, 0.3))  # of the pinwheel and of its sails
MURMUR = 1 << 16  # samples

Event = tuple[float, float, str]  # start and end in seconds, action


@dataclass(frozen=True)
class Play:
    """Everything that is seen and heard in one video."""

    seconds: float
    events: tuple[Event, ...]  # in order and apart
    periods: tuple[float, ...]  # seconds, of each event; < 0: the other way round
    place: tuple[float, float]  # where the pinwheel rests, in half heights from the centre
    size: float  # in half heights
    drift: tuple[float, float, float, float]  # phases of its slow wandering and turning
    ground: tuple[Color, Color]  # top left, bottom right
    light: tuple[float, float, float]  # place and period of the light
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
    ground = [color(rng.random(), rng.uniform(0.2, 0.6), rng.uniform(0.2, 0.5)) for _ in range(2)]
    return Play(
        seconds=seconds,
        events=events,
        periods=tuple(float(rng.uniform(*PERIOD) * rng.choice([-1, 1])) for _ in events),
        place=(float(rng.uniform(-0.3, 0.3)), float(rng.uniform(-0.4, 0.2))),
        size=float(rng.uniform(0.28, 0.34)),
        drift=tuple(rng.uniform(0, 2 * np.pi, 4).tolist()),
        ground=(ground[0], ground[1]),
        light=(float(rng.uniform(-0.9, 0.9)), float(rng.uniform(-0.9, 0.9)), float(rng.uniform(1.0, 3.0))),
        noise=(float(10 ** rng.uniform(-2.0, -1.3)), float(rng.uniform(0.3, 1.2))),
        seed=int(rng.integers(2**31)),
    )


def pose(play: Play, times: Array) -> tuple[Array, Array, Array, Array]:
    """Where the pinwheel is (x to the right and y up, in half heights), its size and its angle (radians), at `times` (s)."""
    slow = [
        np.sin(2 * np.pi * times / period + phase) for period, phase in zip((31, 23, 41, 29), play.drift, strict=True)
    ]
    x, y = play.place[0] + 0.06 * slow[0], play.place[1] + 0.06 * slow[1]
    size, angle = play.size * (1 + 0.04 * slow[2]), play.drift[3] + 0.5 * slow[3]
    for (start, end, action), period in zip(play.events, play.periods, strict=True):
        across, up, growth = ACTIONS[action]
        phase = 2 * np.pi * np.clip(times - start, 0, end - start) / period
        during = (times >= start) & (times < end)
        x = x + during * across * np.sin(phase)
        y = y + during * up * ((1 - np.cos(phase)) if across else np.sin(phase))
        size = size * (1 + during * growth * np.sin(phase))
    return x, y, size, angle


def render_wave(play: Play) -> Array:
    """(N,) float32 in [-1, 1] at SAMPLE_RATE: a murmur that repeats itself, and a ratchet while something happens."""
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
        for paint, cover in [
            *_balls(play, times[part], x, y),
            _light(play, times[part], x, y),
            *_pinwheel(play, times[part], x, y),
        ]:
            picture += (paint - picture) * cover[:, None]
        frames[part] = np.moveaxis((255 * np.clip(picture, 0, 1) + 0.5).astype(np.uint8), 1, -1)
    return frames


def _ground(play: Play, x: Array, y: Array) -> Array:
    """(3, SIDE, SIDE) float32: one colour fading into another, with stains."""
    rng = np.random.default_rng([play.seed, 1])
    first, second = (plane(c) for c in play.ground)
    picture = first + (second - first) * (x - y + 2)[None] / 4
    for _ in range(6):
        (u, v), radius = rng.uniform(-1, 1, 2), rng.uniform(0.15, 0.5)
        stain = plane(color(rng.random(), rng.uniform(0.2, 0.6), rng.uniform(0.2, 0.5)))
        picture = picture + (stain - picture) * 0.5 * edge(radius - np.hypot(x - u, y - v))
    return picture.astype(np.float32)


def _balls(play: Play, times: Array, x: Array, y: Array) -> list[tuple[Array, Array]]:
    """Balls on their way through the picture, again and again."""
    rng = np.random.default_rng([play.seed, 2])
    layers = []
    for _ in range(NUM_BALLS):
        angle, speed, offset, phase = (
            float(rng.uniform(*ends)) for ends in ((0, 2 * np.pi), (0.15, 0.5), (-0.8, 0.8), (0, 4))
        )
        way = ((times * speed + phase) % 3.2 - 1.6)[:, None, None]
        u, v = way * math.cos(angle) - offset * math.sin(angle), way * math.sin(angle) + offset * math.cos(angle)
        paint = plane(color(rng.random(), rng.uniform(0.6, 0.9), rng.uniform(0.5, 0.9)))
        layers.append((paint, edge(rng.uniform(0.08, 0.16) - _distance(x - u, y - v))))
    return layers


def _light(play: Play, times: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """A lamp that goes on and off."""
    u, v, period = play.light
    glow = 0.4 + 0.4 * np.sign(np.sin(2 * np.pi * times / period))[:, None, None]
    return plane((1.0, 0.6, 0.1)), edge(0.1 - _distance(x - u, y - v)) * glow


def _pinwheel(play: Play, times: Array, x: Array, y: Array) -> list[tuple[Array, Array]]:
    """A disc with three sails, one of them larger."""
    at_x, at_y, size, angle = (values.astype(np.float32)[:, None, None] for values in pose(play, times))
    u, v = (x - at_x) / size, (y - at_y) / size
    radius, turn = _distance(u, v), np.arctan2(v, u) - angle
    disc = edge(1.0 - radius)
    sails = edge(np.minimum(np.cos(3 * turn) + 0.4 * np.cos(turn) - 0.2, 0.85 - radius), 0.2)
    return [(plane(PAPER[0]), disc), (plane(PAPER[1]), sails)]


def _distance(u: Array, v: Array) -> Array:
    return np.sqrt(u * u + v * v)
