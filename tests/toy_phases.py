"""Random clips for every phase there is, through its own transform, at its smallest size; and the phase as an engine's task."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import models
from models.family import Batch, Facts, Phase, Sample, Window
from tasks.data.batches import stack
from tasks.engine import loop
from tasks.engine.distributed import Place, launched
from tasks.engine.optim import rest_frozen_parts
from tasks.engine.run import Fitted, Task
from tasks.train import taught
from tests.tasks import toy_training as toy

PHASES = [(family, phase) for family in models.names() for phase in models.load(family).phases]
# One annotation a clip as the family's dataset writes it; a family whose annotations look otherwise adds its own kind.
ANNOTATIONS = [
    {
        "label": "dog barking",
        "species": "red_deer",
        "activity": "foraging",
        "segments": [(0.3, 1.1, "Diving")],
        "tags": [0, 2],
        "caption": "a red kite flies over a meadow. a dog barks.",
    },
    {
        "label": "bee, wasp, etc. buzzing",
        "species": "fox",
        "activity": None,
        "segments": [],
        "tags": [1],
        "caption": "it rains.",
    },
    {
        "label": "dog barking",
        "species": None,
        "activity": "resting",
        "segments": [(0.0, 0.9, "Shotput")],
        "tags": [],
        "caption": "a drum is seen. nothing is heard.",
    },
]
STEP = 0.1  # seconds between stored frames
CLIPS = 4
NUM_TRAIN, NUM_VAL, BATCH = 10, 3, 4  # of a run; neither is a multiple of a batch


def facts_of(family: str) -> Facts:
    """What these annotations tell."""
    return Facts(models.load(family).labels(ANNOTATIONS, []), -5.0, 4.0)


class RandomClips:
    """Random clips through the phase's transform, the one at `silent` without sound. A clip is the same in each epoch."""

    def __init__(
        self, family: str, phase: Phase, facts: Facts, training: bool, silent: int = -1, num: int = CLIPS
    ) -> None:
        self.family, self.spec, self.silent, self.num = family, phase.clip(phase.tiny), silent, num
        self.transform: Callable[[Sample], Batch] = phase.transform(phase.tiny, facts, training)

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        i, spec = key[1], self.spec
        rng = np.random.default_rng(i)
        frames = rng.integers(0, 256, (spec.num_frames, 20, 24, 3), dtype=np.uint8)
        wave = 0.1 * rng.standard_normal(round(spec.sample_rate * spec.audio_seconds)).astype(np.float32)
        annotation = ANNOTATIONS[i % len(ANNOTATIONS)]
        window = Window(0, STEP, STEP * spec.num_frames, i) if spec.window else None
        clip = Sample(str(i), frames, None if i == self.silent else wave, annotation, rng, window=window)
        if spec.features:
            maker = models.load(self.family).phases[spec.features]
            assert maker.features is not None
            clip.features = rng.standard_normal((3 + i, maker.features(maker.tiny).dim)).astype(np.float32)
            clip.feature_times = STEP * np.arange(3 + i, dtype=np.float32)
        return {**self.transform(clip), "row": torch.tensor(i)}


def teacher_of(family: str, phase: Phase, facts: Facts) -> Callable[[Batch], Batch]:
    """What adds a teacher's answers to a training batch, where the phase has one."""
    if not phase.teacher:
        return lambda batch: batch
    teacher = models.load(family).phases[phase.teacher]
    return partial(taught, teacher.build(teacher.tiny, facts).eval())


def batch_of(family: str, phase: Phase, facts: Facts, training: bool, silent: int = -1) -> Batch:
    """CLIPS random clips in one batch, taught where that is due."""
    clips = RandomClips(family, phase, facts, training, silent)
    batch = stack([clips[0, i] for i in range(CLIPS)])
    return teacher_of(family, phase, facts)(batch) if training else batch


def task_of(family: str, name: str) -> Task:
    """The phase as the engine trains it, from fixed weights."""
    phase, facts = models.load(family).phases[name], facts_of(family)
    torch.manual_seed(1)
    return Task(
        phase.build(phase.tiny, facts),
        RandomClips(family, phase, facts, training=True, silent=1, num=NUM_TRAIN),
        RandomClips(family, phase, facts, training=False, silent=1, num=NUM_VAL),
        partial(phase.metrics, phase.tiny, facts),
        phase.best,
        teach=teacher_of(family, phase, facts),
        parameter_groups=phase.parameter_groups(phase.tiny),
    )


# --- trained by the engine ----------------------------------------------------------------------------------------------

# Gradients as they are: AdamW would make a difference in rounding as large as any other where a gradient is nearly none.
SETTINGS: dict[str, Any] = {
    "optimizer": "sgd", "lr": 0.1, "epochs": 1, "batch_size": BATCH, "ema_decay": 0.8, "checkpoint_interval": 100,
}  # fmt: skip


def has_batch_norm(module: nn.Module) -> bool:
    """Whether one is trained: what it sees is what a process holds at once."""
    rest_frozen_parts(module)
    return any(part.training and hasattr(part, "running_mean") for part in module.modules())


def train(task: Task, work: Path, place: Place, **changes: Any) -> Fitted:
    """Train in this process, which may be one of several."""
    work.mkdir(parents=True, exist_ok=True)
    # The norm of shards differs in its last bit, and batch norm over four values makes 1e-5 of that: a limit out of reach.
    clip = {"clip_grad": 1000.0} if has_batch_norm(task.module) else {}
    return loop.fit(task, toy.settings(**SETTINGS | clip | changes), place, work, lambda metrics, step: None)


def train_all(work: Path, rank: int, world: int, port: int) -> None:
    """All phases one after the other, by both strategies: a process for each would spend its time on imports."""
    toy.join(rank, world, port)
    with launched("cpu") as place, contextlib.redirect_stderr(Path(os.devnull).open("w")):
        for strategy in ("ddp", "fsdp"):
            for case in PHASES:
                train(task_of(*case), work / strategy / "-".join(case), place, strategy=strategy)
