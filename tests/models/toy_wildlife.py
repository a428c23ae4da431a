"""A small wildlife model and clips for it."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

import models
from models.family import Facts, Sample
from models.wildlife.config import ModelConfig
from models.wildlife.model import Finetune, tiny_model
from tasks.data.batches import stack

FAMILY = models.load("wildlife")
PHASE = FAMILY.phases["finetune"]
FACTS = Facts(
    {"species": ["fox", "hare", "wolf"], "activity": ["foraging", "resting"]},
    -5.0,
    4.0,
    {"species": [60, 30, 10], "activity": [75, 25]},
)


def changed(**change) -> ModelConfig:
    """The tiny model with other values; those of an encoder by video_x and audio_x."""
    model = tiny_model()
    for side in ("video", "audio"):
        own = {
            k.removeprefix(f"{side}_"): v for k, v in change.items() if k.startswith(f"{side}_") and "feature" not in k
        }
        encoder = dataclasses.replace(getattr(model, f"{side}_encoder"), **own)
        model = dataclasses.replace(model, **{f"{side}_encoder": encoder})
    rest = {k: v for k, v in change.items() if not k.startswith(("video_", "audio_")) or "feature" in k}
    return dataclasses.replace(model, **rest)


def build(**change) -> Finetune:
    """A module in evaluation mode; values of the model, and of the phase itself in `phase`."""
    phase = change.pop("phase", {})
    torch.manual_seed(0)
    return Finetune(dataclasses.replace(PHASE.tiny, model=changed(**change), **phase), FACTS).eval()


def batch(config, clips: int = 4, silent: int = -1, blind: int = -1, training: bool = False) -> dict[str, Tensor]:
    spec = PHASE.clip(config)
    transform = PHASE.transform(config, FACTS, training)

    def sample(i: int) -> dict[str, Tensor]:
        rng = np.random.default_rng(i)
        frames = rng.integers(0, 256, (spec.num_frames, 16, 16, 3), dtype=np.uint8)
        wave = 0.1 * rng.standard_normal(round(spec.sample_rate * spec.audio_seconds)).astype(np.float32)
        annotation = {"species": FACTS.labels["species"][i % 3], "activity": ("foraging", "resting", None)[i % 3]}
        return transform(Sample(str(i), None if i == blind else frames, None if i == silent else wave, annotation, rng))

    return stack([sample(i) for i in range(clips)])
