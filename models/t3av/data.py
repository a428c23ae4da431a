"""T3-AV's samples: what the loader's workers make of a clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from models.family import Batch, ClipSpec, Facts, InputError, Sample
from models.samples import MediaShape, lose_one, media
from models.t3av.config import ModelConfig, sound_grid, video_grid


def clip(config: Any) -> ClipSpec:
    """What is read of a clip."""
    return ClipSpec(config.model.num_frames, config.model.sample_rate, config.model.audio_duration)


def labels(annotations: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, list[str]]:
    """The sorted sound names of the training clips."""
    return {"label": sorted({annotation["label"] for annotation in annotations})}


def class_index(annotation: Mapping[str, Any], facts: Facts, where: str) -> int:
    """Position of the clip's label; InputError for one that training never saw."""
    known = facts.labels["label"]
    if annotation["label"] not in known:
        raise InputError(
            f"clip {where}: label {annotation['label']!r} is not among the {len(known)} of training: {known}"
        )
    return known.index(annotation["label"])


def transform(phase: str) -> Callable[[Any, Facts, bool], Callable[[Sample], Batch]]:
    """The phase's transform: pictures, waveform, and for `pretrain` the noise its masks are drawn from."""

    def build(config: Any, facts: Facts, training: bool) -> Callable[[Sample], Batch]:
        model: ModelConfig = config.model
        shape = media_shape(model)

        def apply(sample: Sample) -> Batch:
            given = lose_one(sample, config.augment.modality_dropout) if training else sample
            batch = media(given, shape, config.augment if training else None)
            if phase == "pretrain":
                for name, size in (("video", video_grid(model)), ("audio", sound_grid(model))):
                    noise = sample.rng.random(int(np.prod(size)), dtype=np.float32)
                    batch[f"{name}_noise"] = torch.from_numpy(noise)
            if phase == "finetune" and sample.annotation:
                batch["label"] = torch.tensor(class_index(sample.annotation, facts, sample.id))
            return batch

        return apply

    return build


def media_shape(model: ModelConfig) -> MediaShape:
    """The sizes of the batch's tensors."""
    mel_frames = sound_grid(model)[0] * model.audio_patch_size
    num_samples = round(model.sample_rate * model.audio_duration)
    return MediaShape(model.num_frames, model.frame_size, num_samples, mel_frames, model.num_mel_bins)
