"""What a loader's workers make of a clip: pictures of one size, a waveform of one length, and their augmentation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.family import Batch, Sample
from models.transforms import draw_bands, resized_crop


@dataclass(frozen=True)
class Augmentation:
    """Section `augment` of a phase: what training sees of a clip."""

    min_area: float  # of the random crop; 1 = the middle crop, no flip
    time_mask: int  # widest SpecAugment band, in mel frames; 0 = none
    freq_mask: int  # in mel bins
    gain: float  # dB up or down
    roll: bool  # turn the waveform by a random length
    modality_dropout: float  # probability that a clip loses one of its two modalities


@dataclass(frozen=True)
class MediaShape:
    """The sizes that a batch needs all clips to have."""

    num_frames: int
    frame_size: int  # pixels, square
    num_samples: int  # of the waveform
    mel_frames: int
    num_mel_bins: int


def media(sample: Sample, shape: MediaShape, augment: Augmentation | None) -> Batch:
    """frames (T, 3, S, S) uint8, wave (N,) float32 with its true length, and which of the two the clip has.

    Both are zeros where the clip has none. Under SpecAugment there are `bands` (4,) for `transforms.hide_bands`, too.
    """
    rng, frames, wave = sample.rng, sample.frames, sample.wave
    batch: Batch = {"frames": pictures(frames, shape, augment, rng), "has_video": torch.tensor(frames is not None)}
    batch |= sound(None if wave is None else vary(wave, augment, rng), shape.num_samples)
    if augment and augment.time_mask + augment.freq_mask:
        batch["bands"] = draw_bands(rng, shape.mel_frames, shape.num_mel_bins, augment.time_mask, augment.freq_mask)
    return batch


def sound(wave: np.ndarray | None, num_samples: int) -> Batch:
    """wave (num_samples,) float32, zeros behind its end, its true length as wave_length (), and has_audio ()."""
    whole = torch.zeros(num_samples)
    if wave is not None:
        whole[: len(wave)] = torch.from_numpy(wave)
    length = torch.tensor(0 if wave is None else len(wave))
    return {"wave": whole, "wave_length": length, "has_audio": torch.tensor(wave is not None)}


def lose_one(sample: Sample, probability: float) -> Sample:
    """The clip without its sound or without its picture, with this probability; one that lacks either stays as it is."""
    whole = sample.frames is not None and sample.wave is not None
    if not whole or sample.rng.random() >= probability:
        return sample
    if sample.rng.random() < 0.5:
        return dataclasses.replace(sample, frames=None)
    return dataclasses.replace(sample, wave=None)


def pictures(
    frames: np.ndarray | None, shape: MediaShape, augment: Augmentation | None, rng: np.random.Generator
) -> Tensor:
    """(T, 3, S, S) uint8, zeros where the clip has none."""
    if frames is None:
        return torch.zeros(shape.num_frames, 3, shape.frame_size, shape.frame_size, dtype=torch.uint8)
    if augment is None or augment.min_area >= 1:
        return resized_crop(frames, shape.frame_size, None, 1.0)
    return resized_crop(frames, shape.frame_size, rng, augment.min_area)


def vary(wave: np.ndarray, augment: Augmentation | None, rng: np.random.Generator) -> np.ndarray:
    """The waveform louder or softer, and turned by a random length, as far as asked."""
    if augment is None:
        return wave
    if augment.roll:
        wave = np.roll(wave, int(rng.integers(0, len(wave))))
    return (wave * 10 ** (rng.uniform(-augment.gain, augment.gain) / 20)).astype(np.float32, copy=False)
