"""The demo dataset `sounds`: which scene each clip shows, in VGGSound's layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from models.family import InputError
from tasks.datasets import vggsound
from tasks.datasets.demo import FAULTS, Clip, Demo
from tasks.datasets.scenes import CLASSES, draw_scene, render_frames, render_wave

FORMAT = vggsound
ALPHABET = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))


def plan(demo: Demo) -> list[Clip]:
    """The good clips class by class, four fifths of each for training, then one clip of each fault."""
    per_class, rest = divmod(demo.clips, len(CLASSES))
    if rest or per_class < 2:
        raise InputError(
            f"params.yaml: demo.clips is {demo.clips}; take a multiple of {len(CLASSES)}, twice it or more"
        )
    rng = np.random.default_rng(demo.seed)
    num_train = per_class * 4 // 5
    clips = [
        _place(rng, index, label, "train" if index % per_class < num_train else "test")
        for index, label in enumerate(label for label in CLASSES for _ in range(per_class))
    ]
    labels = list(CLASSES)
    for k, fault in enumerate(FAULTS):
        split = "test" if fault == "duplicate" else "train"
        clip = _place(rng, len(clips), labels[k % len(labels)], split)
        # A duplicate is the first training clip of its class once more, in the other split.
        source = clips[(k % len(labels)) * per_class].index if fault == "duplicate" else clip.index
        clips.append(replace(clip, index=source, fault=fault))
    return clips


def _place(rng: np.random.Generator, index: int, label: str, split: str) -> Clip:
    """A clip with an id as YouTube gives them: 11 characters, now and then a leading hyphen."""
    ytid = "".join(rng.choice(ALPHABET, 11))
    row = vggsound.row("-" + ytid[1:] if index % 40 == 5 else ytid, int(rng.integers(0, 600)), label, split)
    return Clip(index, label, row)


def render(demo: Demo, clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """(T, H, W, 3) uint8 and (N,) float32 of a clip."""
    scene = draw_scene(*CLASSES[clip.shows], demo.seconds, np.random.default_rng([demo.seed, clip.index]))
    return render_frames(scene), render_wave(scene)
