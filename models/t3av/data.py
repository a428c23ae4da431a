"""T3-AV's samples: what the loader's workers make of a clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.family import Batch, ClipSpec, Facts, InputError, Sample
from models.t3av.config import Augmentation, ModelConfig, sound_grid, video_grid
from models.transforms import draw_bands, resized_crop


def clip(config: Any) -> ClipSpec:
    """What is read of a clip."""
    return ClipSpec(config.model.num_frames, config.model.sample_rate, config.model.audio_duration)


def labels(annotations: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
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

        def apply(sample: Sample) -> Batch:
            batch = media(sample, model, config.augment if training else None)
            if phase == "pretrain":
                for name, size in (("video", video_grid(model)), ("audio", sound_grid(model))):
                    noise = sample.rng.random(int(np.prod(size)), dtype=np.float32)
                    batch[f"{name}_noise"] = torch.from_numpy(noise)
            if phase == "finetune" and sample.annotation:
                batch["label"] = torch.tensor(class_index(sample.annotation, facts, sample.id))
            return batch

        return apply

    return build


def media(sample: Sample, model: ModelConfig, augment: Augmentation | None) -> Batch:
    """frames (T, 3, S, S) uint8, wave (N,) float32 with its true length, and which of the two the clip has."""
    rng = sample.rng
    frames, wave = sample.frames, sample.wave
    if augment and frames is not None and wave is not None and rng.random() < augment.modality_dropout:
        frames, wave = (None, wave) if rng.random() < 0.5 else (frames, None)
    num_samples = round(model.sample_rate * model.audio_duration)
    batch: Batch = {
        "frames": pictures(frames, model, augment, rng),
        "wave": torch.zeros(num_samples),
        "wave_length": torch.tensor(0 if wave is None else len(wave)),
        "has_video": torch.tensor(frames is not None),
        "has_audio": torch.tensor(wave is not None),
    }
    if wave is not None:
        batch["wave"][: len(wave)] = torch.from_numpy(vary(wave, augment, rng))
    if augment and augment.time_mask + augment.freq_mask:
        time, bins = sound_grid(model)[0] * model.audio_patch_size, model.num_mel_bins
        batch["bands"] = draw_bands(rng, time, bins, augment.time_mask, augment.freq_mask)
    return batch


def pictures(
    frames: np.ndarray | None, model: ModelConfig, augment: Augmentation | None, rng: np.random.Generator
) -> Tensor:
    """(T, 3, S, S) uint8, zeros where the clip has none."""
    if frames is None:
        return torch.zeros(model.num_frames, 3, model.frame_size, model.frame_size, dtype=torch.uint8)
    if augment is None or augment.min_area >= 1:
        return resized_crop(frames, model.frame_size, None, 1.0)
    return resized_crop(frames, model.frame_size, rng, augment.min_area)


def vary(wave: np.ndarray, augment: Augmentation | None, rng: np.random.Generator) -> np.ndarray:
    """The waveform louder or softer, and turned by a random length, as far as asked."""
    if augment is None:
        return wave
    if augment.roll:
        wave = np.roll(wave, int(rng.integers(0, len(wave))))
    return (wave * 10 ** (rng.uniform(-augment.gain, augment.gain) / 20)).astype(np.float32)
