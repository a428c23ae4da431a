"""Encounters of the demo dataset `animals`: who is seen and heard on a meadow and what it does, drawn from a seed.

A species is a pair (look, call): each look and each call belongs to two species, hence neither picture nor sound alone can
name more than half of them. What an animal does is seen: one that forages has its head in the heather, one that escapes
crosses the picture and raises dust. But one on the watch and one that courts stand alike, and only the latter calls again
and again. Everything else is drawn anew, whatever the species and the
activity; when it calls cannot be seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tasks.datasets.scenes import FPS, HEIGHT, SAMPLE_RATE, WIDTH, Array, Color, color, colored_noise, edge, plane

# Species -> what is seen, what is heard. Roes and foxes do bark, red deer roar as wolves howl.
SPECIES = {
    "red_deer": ("deer", "howl"),
    "roe_deer": ("deer", "bark"),
    "fox": ("dog", "bark"),
    "wolf": ("dog", "howl"),
}
# Activity -> how it moves, how it calls.
ACTIVITIES = {
    "foraging": ("grazing", "once"),
    "vigilance": ("watching", "once"),
    "escaping": ("running", "once"),
    "courtship": ("watching", "often"),
}


@dataclass(frozen=True)
class Meadow:
    """Where an event takes place: the same for all its clips."""

    sky: tuple[Color, Color]  # top, bottom
    forest: tuple[Color, float, float]  # colour, height of its edge, phase of its tree tops
    grass: tuple[Color, float]  # colour and height of the horizon
    light: float  # brightness of the whole picture
    seed: int  # of the grass


@dataclass(frozen=True)
class Encounter:
    """Everything that is seen and heard in one clip."""

    species: str
    activity: str
    seconds: float
    meadow: Meadow
    facing: float  # 1: to the right, -1: to the left
    size: float  # in half heights
    place: tuple[float, float]  # where the animal stands, or is halfway: x and the height of its feet
    pace: tuple[float, float]  # 0..1 from slow to fast, and phase in radians
    fur: Color
    calls: tuple[float, ...]  # seconds at which a call begins
    pitch: float  # Hz
    loudness: float  # 0 (softest) to 1 (loudest)
    noise: tuple[float, float]  # level relative to the loudest call, and exponent of its 1/f colour
    seed: int  # of the noise

    @property
    def look(self) -> str:
        """What is seen of the species."""
        return SPECIES[self.species][0]

    @property
    def call(self) -> str:
        """What is heard of the species."""
        return SPECIES[self.species][1]

    @property
    def motion(self) -> str:
        """What is seen of the activity."""
        return ACTIVITIES[self.activity][0]


def draw_meadow(rng: np.random.Generator) -> Meadow:
    """A place, from `rng`."""
    sky = float(rng.uniform(0.52, 0.62))
    return Meadow(
        sky=(color(sky, rng.uniform(0.25, 0.6), rng.uniform(0.7, 1.0)), color(sky, rng.uniform(0.02, 0.2), 0.95)),
        forest=(
            color(rng.uniform(0.3, 0.42), rng.uniform(0.3, 0.6), rng.uniform(0.2, 0.4)),
            float(rng.uniform(-0.55, -0.3)),
            float(rng.uniform(0, 2 * np.pi)),
        ),
        grass=(
            color(rng.uniform(0.2, 0.33), rng.uniform(0.35, 0.65), rng.uniform(0.5, 0.8)),
            float(rng.uniform(-0.25, 0.0)),
        ),
        light=float(rng.uniform(0.75, 1.05)),
        seed=int(rng.integers(2**31)),
    )


def draw_encounter(species: str, activity: str, seconds: float, meadow: Meadow, rng: np.random.Generator) -> Encounter:
    """An encounter whose every other property comes from `rng`, independent of species and activity where it can be."""
    look, call = SPECIES[species]
    starts = {often: _draw_calls(call, often, seconds, rng) for often in ("once", "often")}
    hue, saturation = rng.uniform(0.045, 0.085), rng.uniform(0.0, 1.0)
    saturation = 0.45 + 0.3 * saturation if look == "deer" else 0.05 + 0.2 * saturation
    return Encounter(
        species=species,
        activity=activity,
        seconds=seconds,
        meadow=meadow,
        facing=1.0 if rng.random() < 0.5 else -1.0,
        size=float(rng.uniform(0.8, 1.0)),
        place=(float(rng.uniform(-0.3, 0.3)), float(rng.uniform(0.6, 0.85))),
        pace=(float(rng.random()), float(rng.uniform(0, 2 * np.pi))),
        fur=color(hue, saturation, rng.uniform(0.4, 0.7)),
        calls=starts[ACTIVITIES[activity][1]],
        pitch=float(np.exp(rng.uniform(np.log(350.0), np.log(700.0)))),
        loudness=float(rng.random()),
        noise=(float(10 ** rng.uniform(-2.0, -1.3)), float(rng.uniform(0.3, 1.2))),
        seed=int(rng.integers(2**31)),
    )


# --- sound ------------------------------------------------------------------------------------------------------------

LENGTH = {"bark": 0.13, "howl": 0.5}  # seconds of a call


def _draw_calls(call: str, often: str, seconds: float, rng: np.random.Generator) -> tuple[float, ...]:
    """Beginnings of a single call, or of as many as follow each other through the clip."""
    if often == "often":
        gap = LENGTH[call] * (2.2 if call == "bark" else 1.15) * rng.uniform(0.95, 1.15)
        return tuple(float(t) for t in np.arange(rng.uniform(0.0, gap), seconds - LENGTH[call], gap))
    return (float(rng.uniform(0, seconds - LENGTH[call])),)


def render_wave(encounter: Encounter) -> Array:
    """(N,) float32 in [-1, 1] at SAMPLE_RATE: the calls over coloured noise."""
    rng = np.random.default_rng(encounter.seed)
    sound = np.zeros(round(encounter.seconds * SAMPLE_RATE))
    for start in encounter.calls:
        first, call = round(start * SAMPLE_RATE), _render_call(encounter, rng)
        sound[first : first + len(call)] += call[: len(sound) - first]
    level, exponent = encounter.noise
    noise = colored_noise(len(sound), exponent, rng)
    sound *= 10 ** (0.6 * (encounter.loudness - 1))
    return (0.8 * np.clip(sound + level * noise / noise.std() / 3, -1, 1)).astype(np.float32)


def _render_call(encounter: Encounter, rng: np.random.Generator) -> Array:
    """(n,) one call: a bark is short, falls and is hoarse; a howl rises, stays, sinks, and is clear."""
    x = np.linspace(0, 1, round(LENGTH[encounter.call] * SAMPLE_RATE))
    if encounter.call == "bark":
        octaves, level = 0.3 - 0.7 * x, np.clip(x / 0.05, 0, 1) * np.exp(-3 * x)
        harmonics, hoarse = 6, 0.35
    else:
        octaves, level = 0.4 * np.sin(np.pi * x) ** 0.7 - 0.2, np.clip(np.minimum(x / 0.15, (1 - x) / 0.25), 0, 1)
        harmonics, hoarse = 3, 0.0
    phase = 2 * np.pi * np.cumsum(encounter.pitch * 2**octaves) / SAMPLE_RATE
    tone = sum(0.7**k * np.sin((k + 1) * phase + rng.uniform(0, 2 * np.pi)) for k in range(harmonics))
    tone = tone / sum(0.7**k for k in range(harmonics)) + hoarse * rng.standard_normal(len(x))
    return level * tone


# --- picture ----------------------------------------------------------------------------------------------------------

DUST: Color = (0.97, 0.92, 0.8)  # behind a running animal
HEATHER: Color = (0.75, 0.3, 0.5)  # what a grazing animal eats
Point = tuple[Array | float, Array | float]  # (u, v) in animal lengths: u forward from its middle, v up from its feet


@dataclass(frozen=True)
class Pose:
    """How an animal holds itself at each moment, each (T, 1, 1): numbers of the drawing."""

    x: Array  # of its middle, in half heights of the picture
    feet: Array  # how far each pair of feet is forward, in animal lengths
    lift: Array  # how high it is off the ground
    down: Array  # 0: the head is up, 1: at the grass
    turn: Array  # 1: looks forward, -1: back
    rise: float  # how much higher than its rear its front is, an animal length further on
    dust: float  # half the length of the cloud behind it, in animal lengths


def pose(encounter: Encounter, times: Array) -> Pose:
    """The pose at `times` (T, 1, 1) in seconds."""
    pace, phase = encounter.pace
    zero = np.zeros_like(times)
    if encounter.motion == "running":
        speed = (2.6 + 0.8 * pace) / encounter.seconds
        x = encounter.facing * speed * (times - encounter.seconds / 2)
        stride = 2 * np.pi * (2.2 + pace) * times + phase
        return Pose(x, 0.4 * np.sin(stride), 0.05 * (1 + np.cos(stride)), zero + 0.45, zero + 1, 0.0, 0.9)
    if encounter.motion == "grazing":
        x = encounter.place[0] + encounter.facing * (0.08 + 0.08 * pace) * (times - encounter.seconds / 2)
        step = 2 * np.pi * (0.4 + 0.3 * pace) * times + phase
        return Pose(x, 0.09 * np.sin(step), zero, 0.93 + 0.07 * np.sin(3 * step), zero + 1, -0.3, 0.0)
    turn = np.tanh(3 * np.sin(2 * np.pi * (0.45 + 0.35 * pace) * times + phase))
    return Pose(zero + encounter.place[0], zero, zero, zero, turn, 0.3, 0.0)


def render_frames(encounter: Encounter) -> Array:
    """(T, HEIGHT, WIDTH, 3) uint8 RGB, T = seconds * FPS: the animal over the background, drawn where it is."""
    times = (np.arange(round(encounter.seconds * FPS)) / FPS).astype(np.float32)[:, None, None]
    x = np.linspace(-WIDTH / HEIGHT, WIDTH / HEIGHT, WIDTH, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, HEIGHT, dtype=np.float32)[:, None]
    background = _background(encounter.meadow, x, y)
    frames = np.repeat(_levels(background)[None], len(times), axis=0)
    reach = (2.4 if encounter.motion == "running" else 1.6) * encounter.size
    ground = encounter.place[1]
    rows = slice(*np.searchsorted(y[:, 0], [ground - 1.85 * encounter.size, ground + 0.12 * encounter.size]))
    for start in range(0, len(times), 4):  # as many as stay in the processor's cache
        part = slice(start, start + 4)
        held = pose(encounter, times[part])
        columns = slice(*np.searchsorted(x[0], [held.x.min() - reach, held.x.max() + reach]))
        if columns.start < columns.stop:
            window = np.repeat(background[None, :, rows, columns], len(held.x), axis=0)
            _paint(window, encounter, x[:, columns], y[rows], held)
            frames[part, rows, columns] = _levels(window)
    return frames


def _paint(window: Array, encounter: Encounter, x: Array, y: Array, held: Pose) -> None:
    """Draw the animal into (T, 3, rows, columns), a part of the picture at these places."""
    u = (x - held.x) * (encounter.facing / encounter.size)
    v = (encounter.place[1] - y) / encounter.size - held.lift
    body = v - held.rise * u * np.clip(2 * v, 0, 1)  # the feet stay on the ground
    layers = LOOKS[encounter.look](encounter.fur, u, body, held)
    if encounter.motion == "grazing":  # the heather stays where it is while the animal walks through it
        there = (x - encounter.place[0]) * (encounter.facing / encounter.size)
        layers.append((HEATHER, 0.9 * _oval(there, v, (0.75, 0.07), 0.5, 0.17)))
    if held.dust:
        layers.insert(0, (DUST, 0.9 * _oval(u, v, (-0.5 - held.dust, 0.22), held.dust, 0.3)))
    for paint, cover in layers:
        window += (plane(_shade(paint, encounter.meadow.light)) - window) * cover[:, None]


def _levels(picture: Array) -> Array:
    """(…, 3, H, W) in [0, 1] -> (…, H, W, 3) uint8."""
    return np.moveaxis((255 * np.clip(picture, 0, 1) + 0.5).astype(np.uint8), -3, -1)


def _background(meadow: Meadow, x: Array, y: Array) -> Array:
    """(3, HEIGHT, WIDTH) float32: sky, the edge of a forest, grass whose blades are nearer towards the bottom."""
    rng = np.random.default_rng(meadow.seed)
    top, bottom, forest, grass = (plane(c) for c in (*meadow.sky, meadow.forest[0], meadow.grass[0]))
    picture = top + (bottom - top) * (y + 1) / 2
    tops = meadow.forest[1] + 0.06 * np.sin(9 * x + meadow.forest[2]) + 0.05 * np.sin(23 * x + 2 * meadow.forest[2])
    picture = picture + (forest - picture) * edge(y - tops)
    blades = 0.92 + 0.16 * rng.random((HEIGHT, WIDTH), dtype=np.float32) * np.clip(y - meadow.grass[1], 0, 1)
    picture = picture + (grass * blades - picture) * edge(y - meadow.grass[1])
    return (meadow.light * picture).astype(np.float32)


def _limb(u: Array, v: Array, a: Point, b: Point, thick: float, thin: float) -> Array:
    """Coverage of a stroke from `a` to `b` whose half width goes from `thick` to `thin`."""
    (au, av), (du, dv) = a, (b[0] - a[0], b[1] - a[1])
    square = du * du + dv * dv
    along = np.clip((u - au) * (du / square) + (v - av) * (dv / square), 0, 1)
    return edge(thick + (thin - thick) * along - np.sqrt((u - au - along * du) ** 2 + (v - av - along * dv) ** 2))


def _oval(u: Array, v: Array, at: Point, wide: float, tall: float) -> Array:
    """Coverage of an ellipse."""
    return edge((1 - np.sqrt(((u - at[0]) / wide) ** 2 + ((v - at[1]) / tall) ** 2)) * min(wide, tall))


def _union(*covers: Array) -> Array:
    whole = covers[0]
    for cover in covers[1:]:
        whole = np.maximum(whole, cover)
    return whole


def _between(up: Point, down: Point, share: Array) -> Point:
    return up[0] + (down[0] - up[0]) * share, up[1] + (down[1] - up[1]) * share


def _draw_deer(fur: Color, u: Array, v: Array, held: Pose) -> list[tuple[Color, Array]]:
    """Long legs, a long neck, antlers, a pale rump."""
    swing = held.feet
    far = _union(
        _limb(u, v, (0.3, 0.7), (0.24 + swing, 0.0), 0.07, 0.035),
        _limb(u, v, (-0.3, 0.7), (-0.36 - swing, 0.0), 0.08, 0.035),
    )
    near = _union(
        _limb(u, v, (0.36, 0.7), (0.38 - swing, 0.0), 0.07, 0.035),
        _limb(u, v, (-0.36, 0.7), (-0.3 + swing, 0.0), 0.09, 0.035),
    )
    head = _between((0.6 + 0.04 * held.turn, 1.28), (0.85, 0.12), held.down)
    nose = (head[0] + 0.22 * held.turn * (1 - 0.7 * held.down), head[1] - 0.06 - 0.1 * held.down)
    coat = _union(
        near,
        _oval(u, v, (0.0, 0.8), 0.5, 0.22),
        _limb(u, v, (0.36, 0.88), head, 0.15, 0.08),
        _limb(u, v, head, nose, 0.1, 0.05),
    )
    crown = (head[0] - 0.03 * held.turn, head[1] + 0.06)
    antlers = []
    for side in (-1.0, 1.0):
        tip = (crown[0] + 0.26 * side - 0.05, crown[1] + 0.36)
        antlers += [_limb(u, v, crown, tip, 0.035, 0.03)]
        middle = ((crown[0] + tip[0]) / 2, (crown[1] + tip[1]) / 2)
        antlers += [_limb(u, v, middle, (middle[0] - 0.04 * side, middle[1] + 0.22), 0.03, 0.025)]
    pale = _union(_oval(u, v, (-0.46, 0.84), 0.09, 0.13), *antlers)
    return [
        (_shade(fur, 0.6), far),
        (fur, coat),
        ((0.93, 0.87, 0.72), pale),
        ((0.08, 0.06, 0.05), _oval(u, v, nose, 0.05, 0.05)),
    ]


def _draw_dog(fur: Color, u: Array, v: Array, held: Pose) -> list[tuple[Color, Array]]:
    """Short legs, pointed ears, a bushy tail with a white tip."""
    swing = held.feet
    far = _union(
        _limb(u, v, (0.32, 0.42), (0.3 + swing, 0.0), 0.08, 0.045),
        _limb(u, v, (-0.32, 0.42), (-0.38 - swing, 0.0), 0.09, 0.045),
    )
    near = _union(
        _limb(u, v, (0.38, 0.42), (0.42 - swing, 0.0), 0.08, 0.045),
        _limb(u, v, (-0.38, 0.42), (-0.32 + swing, 0.0), 0.1, 0.045),
    )
    head = _between((0.56 + 0.05 * held.turn, 0.84), (0.72, 0.16), held.down)
    nose = (head[0] + 0.28 * held.turn * (1 - 0.3 * held.down), head[1] - 0.05 - 0.1 * held.down)
    tip = (-0.98, 0.34)
    ears = [
        _limb(u, v, (head[0] + shift, head[1] + 0.08), (head[0] + 1.4 * shift, head[1] + 0.3), 0.08, 0.0)
        for shift in (-0.09, 0.07)
    ]
    coat = _union(
        near,
        _oval(u, v, (0.0, 0.5), 0.52, 0.19),
        _limb(u, v, (0.36, 0.56), head, 0.17, 0.14),
        _limb(u, v, head, nose, 0.14, 0.05),
        _limb(u, v, (-0.45, 0.54), tip, 0.08, 0.14),
        *ears,
    )
    white = _union(_oval(u, v, tip, 0.13, 0.12), _oval(u, v, (0.3, 0.4), 0.16, 0.09))
    return [
        (_shade(fur, 0.6), far),
        (fur, coat),
        ((0.95, 0.95, 0.93), white),
        ((0.08, 0.06, 0.05), _oval(u, v, nose, 0.06, 0.06)),
    ]


def _shade(fur: Color, share: float) -> Color:
    return (fur[0] * share, fur[1] * share, fur[2] * share)


# (fur, u, v, pose) -> paint and coverage (T, rows, columns) of each layer, from the back to the front
LOOKS = {"deer": _draw_deer, "dog": _draw_dog}
