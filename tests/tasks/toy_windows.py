"""Three short videos in memory, in which a colour tells the action, and adatad at its smallest to train on them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from models.adatad import FAMILY
from models.adatad.config import FinetuneConfig
from models.family import Facts, Sample, Window
from tasks.data.batches import TensorClips, stack
from tasks.data.windows import window_starts
from tasks.engine.run import Task

LABELS = ["blue", "green", "red"]
FACTS = Facts({"label": LABELS}, 0.0, 1.0)
STEP, STORED = 0.25, 48  # seconds from frame to frame, frames of a video, five windows of the smallest model
# Each video's segments in seconds.
VIDEOS = [
    [(1.0, 3.5, "red"), (6.0, 8.0, "green")],
    [(2.0, 4.0, "blue"), (7.0, 11.0, "red")],
    [(0.5, 4.5, "green"), (8.5, 11.0, "blue")],
]
PHASE = FAMILY.phases["finetune"]


def build_config(**changes: Any) -> FinetuneConfig:
    """The smallest one; `changes` are the detector's."""
    model = PHASE.tiny.model
    return replace(PHASE.tiny, model=replace(model, detector=replace(model.detector, **changes)))


def build_clips(config: FinetuneConfig, training: bool) -> TensorClips:
    """All windows of all videos as the phase's transform makes them."""
    transform = PHASE.transform(config, FACTS, training)
    return TensorClips(stack([transform(sample) for sample in samples(config)]))


def samples(config: FinetuneConfig) -> Iterator[Sample]:
    """A video's pictures are grey noise, in which an action puts a square of its colour."""
    rng, spec = np.random.default_rng(3), PHASE.clip(config)
    assert spec.window is not None
    for clip, segments in enumerate(VIDEOS):
        pictures = rng.integers(90, 130, (STORED, 16, 16, 3), dtype=np.uint8)
        for start, end, label in segments:
            pictures[round(start / STEP) : round(end / STEP), 4:12, 4:12, 2 - LABELS.index(label)] = 250
        for first in window_starts(STORED, spec.num_frames, spec.window.stride):
            place = Window(first, STEP, STORED * STEP, clip)
            shown = pictures[first : first + spec.num_frames]
            yield Sample(f"video {clip}", shown, None, {"segments": segments}, rng, window=place)


def build_task(kill_at: int = 0, **changes: Any) -> Task:
    """Training on these windows, judged on the same; SIGKILL in the forward pass `kill_at`."""
    config = build_config(**changes)
    torch.manual_seed(1)
    module, calls = PHASE.build(config, FACTS), iter(range(1, 1 << 30))

    def dying(*_: object) -> None:
        if module.training and next(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    module.register_forward_pre_hook(dying)
    train, val = build_clips(config, True), build_clips(config, False)
    rules = PHASE.parameter_groups(config)
    return Task(module, train, val, lambda: PHASE.metrics(config, FACTS), PHASE.best, parameter_groups=rules)
