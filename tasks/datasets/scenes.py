"""Scenes of the demo dataset: what is seen, what is heard and when, drawn and synthesised from a seed.

A class is a pair (object seen, sound heard). Each of the six objects appears in two classes and so does each of the
six sounds, hence one modality alone cannot get more than half of the clips right. Objects differ in shape and pattern,
sounds in how their pitch moves; colours, position, size, background, pitch, timbre and loudness are drawn anew for
every clip, whatever its class. Picture and sound of one clip share more than the class: the object swells and glows
while the sound is on, stands the higher the higher the pitch, and is the larger the louder the sound.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT, FPS = 96, 72, 12
SAMPLE_RATE = 16000
OBJECTS = ("kite", "drum", "tent", "ladybird", "windmill", "flag")
SOUNDS = ("humming", "siren wailing", "rising whistle", "falling whistle", "ticking", "cuckoo calling")
# Along a ring object k meets the sounds k and k + 1. A sound of two words takes a comma, as some VGGSound labels do.
CLASSES: dict[str, tuple[str, str]] = {
    f"{seen}{',' if ' ' in heard else ''} {heard}": (seen, heard)
    for k, seen in enumerate(OBJECTS)
    for heard in (SOUNDS[k], SOUNDS[(k + 1) % len(SOUNDS)])
}

Color = tuple[float, float, float]
Array = np.ndarray


@dataclass(frozen=True)
class Scene:
    """Everything that is seen and heard in one clip; other annotations can be derived from it."""

    seen: str  # of OBJECTS
    heard: str  # of SOUNDS
    seconds: float
    events: tuple[tuple[float, float], ...]  # (start, stop) in seconds: the sound is on, the object swells and glows
    pitch: float  # Hz, geometric mean of the moving pitch
    loudness: float  # 0 (softest) to 1 (loudest)
    cycle: float  # seconds, of the pitch's or the ticks' repetition
    harmonics: tuple[float, ...]  # amplitude of each
    noise: tuple[float, float]  # level relative to the loudest sound, and exponent of its 1/f colour
    colors: tuple[Color, Color]  # of the object's pattern, RGB in [0, 1]
    sky: tuple[Color, Color]  # top, bottom
    ground: Color
    horizon: tuple[float, float, float]  # height, wave length, phase of the hills
    place: tuple[float, float]  # horizontal position in [-1, 1] and drift in half heights a second
    turn: float  # radians the object is tilted by
    pattern: tuple[float, float]  # scale of the pattern and its phase
    light: float  # brightness of the whole picture
    seed: int  # of the noise


def draw_scene(seen: str, heard: str, seconds: float, rng: np.random.Generator) -> Scene:
    """A scene whose every other property comes from `rng`, independent of the class."""
    low, high = np.log(380.0), np.log(1250.0)
    falloff = rng.uniform(0.25, 0.8)
    hue = rng.random()
    bright = color(hue, rng.uniform(0.15, 0.6), rng.uniform(0.85, 1.0))
    dark = color(hue + rng.uniform(0.25, 0.75), rng.uniform(0.5, 0.95), rng.uniform(0.2, 0.5))
    sky_hue = rng.random()
    return Scene(
        seen=seen,
        heard=heard,
        seconds=seconds,
        events=_draw_events(seconds, rng),
        pitch=float(np.exp(rng.uniform(low, high))),
        loudness=float(rng.random()),
        cycle=float(rng.uniform(0.17, 0.23)),
        harmonics=tuple(float(falloff**k) for k in range(int(rng.integers(2, 6)))),
        noise=(float(10 ** rng.uniform(-1.9, -1.1)), float(rng.uniform(0.0, 1.2))),
        colors=(bright, dark) if rng.random() < 0.5 else (dark, bright),
        sky=(
            color(sky_hue, rng.uniform(0.1, 0.7), rng.uniform(0.35, 1.0)),
            color(sky_hue + rng.uniform(-0.15, 0.15), rng.uniform(0.05, 0.5), rng.uniform(0.35, 1.0)),
        ),
        ground=color(rng.random(), rng.uniform(0.2, 0.7), rng.uniform(0.25, 0.8)),
        horizon=(float(rng.uniform(0.3, 0.8)), float(rng.uniform(1.5, 4.0)), float(rng.uniform(0, 2 * np.pi))),
        place=(float(rng.uniform(-1, 1)), float(rng.uniform(-0.06, 0.06))),
        turn=float(rng.uniform(-0.12, 0.12)),
        pattern=(float(rng.uniform(0.9, 1.15)), float(rng.uniform(0, 2 * np.pi))),
        light=float(rng.uniform(0.7, 1.05)),
        seed=int(rng.integers(2**31)),
    )


def color(hue: float, saturation: float, value: float) -> Color:
    """RGB in [0, 1]; the hue wraps around at 1."""
    return colorsys.hsv_to_rgb(hue % 1.0, float(saturation), float(value))


def _draw_events(seconds: float, rng: np.random.Generator) -> tuple[tuple[float, float], ...]:
    """About one event a second, 0.45 to 0.8 s long, apart from each other, anywhere in the clip."""
    count = max(1, round(seconds * rng.uniform(0.7, 1.1)))
    lengths = rng.uniform(0.45, 0.8, count) * min(1.0, seconds / count)
    gaps = rng.dirichlet(np.ones(count + 1)) * max(0.0, seconds - lengths.sum() - 0.15 * (count - 1))
    starts = np.cumsum(gaps)[:-1] + np.concatenate([[0.0], np.cumsum(lengths + 0.15)[:-1]])
    return tuple((float(a), float(min(a + n, seconds))) for a, n in zip(starts, lengths, strict=True))


def envelope(scene: Scene, times: Array) -> Array:
    """How strongly the scene sounds and glows at `times` (seconds): 0 to 1, rising in 50 ms and fading in 100 ms."""
    level = np.zeros_like(times)
    for start, stop in scene.events:
        level = np.maximum(level, np.clip((times - start) / 0.05, 0, 1) * np.clip((stop - times) / 0.1, 0, 1))
    return level


# --- sound ------------------------------------------------------------------------------------------------------------

# Octaves away from the mean pitch over a cycle in [0, 1). The four moving ones span the same octave in the same time.
MOVES: dict[str, Callable[[Array], Array]] = {
    "humming": np.zeros_like,
    "siren wailing": lambda x: 0.5 * np.sin(2 * np.pi * x),
    "rising whistle": lambda x: x - 0.5,
    "falling whistle": lambda x: 0.5 - x,
    "ticking": np.zeros_like,
    "cuckoo calling": lambda x: np.where(x < 0.5, 0.4, -0.4),
}


def render_wave(scene: Scene) -> Array:
    """(N,) float32 in [-1, 1] at SAMPLE_RATE: the sound during the events, faint between them, over coloured noise."""
    rng = np.random.default_rng(scene.seed)
    times = np.arange(round(scene.seconds * SAMPLE_RATE)) / SAMPLE_RATE
    position = (times / scene.cycle + rng.random()) % 1.0
    phase = 2 * np.pi * np.cumsum(scene.pitch * 2 ** MOVES[scene.heard](position)) / SAMPLE_RATE
    tone = sum(a * np.sin((k + 1) * phase + rng.uniform(0, 2 * np.pi)) for k, a in enumerate(scene.harmonics))
    tone = tone / sum(scene.harmonics)
    if scene.heard == "ticking":
        tone = tone * 1.8 * np.exp(-position * 10) * np.clip(position / 0.02, 0, 1)
    level, exponent = scene.noise
    noise = colored_noise(len(times), exponent, rng)
    sound = (0.05 + 0.95 * envelope(scene, times)) * tone * 10 ** (0.8 * (scene.loudness - 1))
    return (0.8 * np.clip(sound + level * noise / noise.std() / 3, -1, 1)).astype(np.float32)


def colored_noise(num: int, exponent: float, rng: np.random.Generator) -> Array:
    """(num,) Gaussian noise of power 1 / f^exponent."""
    spectrum = np.fft.rfft(rng.standard_normal(num))
    spectrum /= np.maximum(np.arange(len(spectrum)), 20.0) ** (exponent / 2)
    return np.fft.irfft(spectrum, num)


# --- picture ----------------------------------------------------------------------------------------------------------


def edge(inside: Array, softness: float = 0.06) -> Array:
    """Coverage 0..1 of a region that is positive inside; anti-aliased."""
    return np.clip(inside / softness + 0.5, 0, 1)


def _draw_kite(u: Array, v: Array, a: float, phase: Array) -> tuple[Array, Array]:
    tail = edge(0.05 - np.abs(u - 0.12 * np.sin(6 * v))) * (v > 0.95) * (v < 1.9)
    return np.maximum(edge(1.05 - 1.15 * np.abs(u) - np.abs(v)), tail), np.sin(5.5 * a * u) * np.sin(
        5.5 * a * v + phase
    )


def _draw_drum(u: Array, v: Array, a: float, phase: Array) -> tuple[Array, Array]:
    radius = np.hypot(u, v)
    return edge(0.95 - radius), np.sin(11 * a * radius + phase)


def _draw_tent(u: Array, v: Array, a: float, phase: Array) -> tuple[Array, Array]:
    return edge(np.minimum(0.85 - v, 0.65 * (v + 1.0) - np.abs(u))), np.sin(9 * a * u + phase)


def _draw_ladybird(u: Array, v: Array, a: float, phase: Array) -> tuple[Array, Array]:
    body = edge(0.95 - np.hypot(u * 0.85, v * 1.05))
    head = edge(0.3 - np.hypot(u * 0.9, v + 0.95))
    shift = phase / (2 * np.pi)
    x, y = 1.75 * a * (u + v) + shift, 1.75 * a * (u - v) + shift
    spots = 0.3 - np.hypot(x - np.round(x), y - np.round(y))
    return np.maximum(body, head), np.where(v < -0.8, -1.0, -3 * spots)


def _draw_windmill(u: Array, v: Array, a: float, phase: Array) -> tuple[Array, Array]:
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    pole = edge(0.08 - np.abs(u)) * (v > 0) * (v < 2)
    return np.maximum(edge(0.98 - radius), pole), np.sin(5 * angle + 3 * radius + phase) * np.clip(radius * 4, 0, 1)


def _draw_flag(u: Array, v: Array, a: float, phase: Array) -> tuple[Array, Array]:
    wave = v + 0.06 * np.sin(3 * u)
    cloth = edge(np.minimum(1.0 - np.abs(u), 0.75 - np.abs(wave)))
    pole = edge(0.06 - np.abs(u + 1.0)) * (v > -0.85) * (v < 2)
    return np.maximum(cloth, pole), np.where(np.abs(u + 1.0) < 0.06, -1.0, np.sin(9 * a * wave + phase))


# (u, v) in units of the object's size from its centre, v down -> coverage 0..1, pattern: < 0 first colour, > 0 second
DRAWINGS: dict[str, Callable[[Array, Array, float, Array], tuple[Array, Array]]] = {
    "kite": _draw_kite,
    "drum": _draw_drum,
    "tent": _draw_tent,
    "ladybird": _draw_ladybird,
    "windmill": _draw_windmill,
    "flag": _draw_flag,
}


def render_frames(scene: Scene) -> Array:
    """(T, HEIGHT, WIDTH, 3) uint8 RGB, T = seconds * FPS."""
    times = (np.arange(round(scene.seconds * FPS)) / FPS).astype(np.float32)
    frames = np.empty((len(times), HEIGHT, WIDTH, 3), np.uint8)
    for start in range(0, len(times), 4):  # as many as stay in the processor's cache
        part = slice(start, start + 4)
        frames[part] = _draw(scene, times[part, None, None]).transpose(0, 2, 3, 1)
    return frames


def _draw(scene: Scene, times: Array) -> Array:
    """(T, 3, HEIGHT, WIDTH) uint8 at `times` (T, 1, 1) in seconds."""
    aspect = WIDTH / HEIGHT
    x = np.linspace(-aspect, aspect, WIDTH, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, HEIGHT, dtype=np.float32)[:, None]
    glow = envelope(scene, times)
    size = (0.56 + 0.14 * scene.loudness) * (1 + 0.2 * glow)
    height = math.log2(scene.pitch / 690.0) / 0.86  # -1..1 over the range of pitches
    u = (x - 0.45 * scene.place[0] - scene.place[1] * times) / size
    v = (y + 0.22 * height) / size
    u, v = u * math.cos(scene.turn) - v * math.sin(scene.turn), u * math.sin(scene.turn) + v * math.cos(scene.turn)
    phase = scene.pattern[1] + (2.5 if scene.seen == "windmill" else 0.0) * times
    cover, pattern = DRAWINGS[scene.seen](u, v, scene.pattern[0], phase)
    first, second, light = (plane(color) for color in (*scene.colors, (1.0, 0.97, 0.85)))
    paint = first + (second - first) * edge(pattern, 0.5)[:, None]
    paint += (1 - paint) * 0.35 * glow[:, None]
    background = _background(scene, x, y)
    halo = np.exp(-3 * np.maximum(np.sqrt(u * u + v * v) - 0.9, 0)) * 0.55 * glow
    picture = background + (light - background) * halo[:, None]
    picture += (paint - picture) * cover[:, None]
    return (255 * np.clip(scene.light * picture, 0, 1) + 0.5).astype(np.uint8)


def plane(color: Color) -> Array:
    """(3, 1, 1) float32, to be spread over a picture."""
    return np.array(color, np.float32)[:, None, None]


def _background(scene: Scene, x: Array, y: Array) -> Array:
    """(3, HEIGHT, WIDTH) float32: sky from top to bottom colour over rolling ground."""
    top, bottom, ground = (plane(color) for color in (*scene.sky, scene.ground))
    sky = top + (bottom - top) * ((y + 1) / 2)
    level, length, phase = scene.horizon
    hills = edge(y - level - 0.12 * np.sin(length * x + phase))
    return (sky + (ground - sky) * hills).astype(np.float32)
