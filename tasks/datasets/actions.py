"""The demo dataset `actions`: untrimmed videos in which a balloon has another size for a while, in ActivityNet's form.

As in such datasets at large, one annotation repeats itself, one is ambiguous, and one has another count of frames than its
file: `clean` tells of all three.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from models.family import InputError
from tasks.datasets import activitynet
from tasks.datasets.activitynet import AMBIGUOUS, Segment
from tasks.datasets.demo import Clip, Demo
from tasks.datasets.playground import ACTIONS, LENGTH, REST, Event, draw_events, draw_play, render_frames, render_wave
from tasks.datasets.scenes import FPS

FORMAT = activitynet
TEST_SHARE = 0.25
FEWEST = 20  # videos, so that no split lacks an action
SHORTEST = 30  # seconds
FAULTS = ("cut short", "no audio", "missing")  # of demo.FAULTS


@dataclass(frozen=True)
class Shown:
    """What `render` needs of a video."""

    seconds: float
    events: tuple[Event, ...]


def plan(demo: Demo) -> list[Clip]:
    """The good videos, those to train on first, then one of each fault."""
    if demo.clips < FEWEST or demo.seconds < SHORTEST:
        raise InputError(
            f"params.yaml: demo.clips is {demo.clips} and demo.seconds {demo.seconds:g}; actions are {FEWEST} videos or more "
            f"of {SHORTEST} s or more"
        )
    num_train = demo.clips - round(demo.clips * TEST_SHARE)
    clips = [_video(demo, index, "train" if index < num_train else "test") for index in range(demo.clips)]
    clips += [replace(_video(demo, demo.clips + k, "train"), fault=fault) for k, fault in enumerate(FAULTS)]
    return clips


def _video(demo: Demo, index: int, split: str) -> Clip:
    """A video named as THUMOS-14 names them, with as many events as there is room for on average."""
    rng = np.random.default_rng([demo.seed, index])
    frames = round(demo.seconds * FPS * rng.uniform(0.95, 1.1))
    seconds = frames / FPS
    number = int(seconds / (max(LENGTH) + REST))
    rounds = [name for _ in range(number // len(ACTIONS) + 1) for name in rng.permutation(list(ACTIONS)).tolist()]
    events = draw_events(seconds, rounds[:number], rng)
    name = f"video_{'validation' if split == 'train' else 'test'}_{index + 1:07d}"
    segments: list[Segment] = list(events)
    if index == 0:
        segments.append(segments[0])
    if index == 1:
        segments.append((0.0, events[0][0], AMBIGUOUS))
    row = activitynet.row(name, f"videos/{name}.mp4", split, segments, seconds, 2 * frames if index == 2 else frames)
    return Clip(index, Shown(seconds, events), row)


def render(demo: Demo, clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """(T, H, W, 3) uint8 and (N,) float32 of a video."""
    play = draw_play(clip.shows.seconds, clip.shows.events, np.random.default_rng([demo.seed, clip.index, 1]))
    return render_frames(play), render_wave(play)
