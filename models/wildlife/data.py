"""wildlife's samples: what the loader's workers make of a clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from models.family import Batch, ClipSpec, Facts, InputError, Sample
from models.losses import balance
from models.samples import MediaShape, media
from models.transforms import fit_mel
from models.wildlife.config import HEADS, FinetuneConfig, ModelConfig, PhaseConfig, mel_frames


def clip(config: PhaseConfig) -> ClipSpec:
    """What is read of a clip; the seed's own spectrograms will do in place of a waveform."""
    video, audio = config.model.video_encoder, config.model.audio_encoder
    return ClipSpec(video.num_frames, audio.sample_rate, audio.audio_duration, takes_mel=True)


def labels(annotations: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, list[str]]:
    """The sorted species and activities of the training clips; clips that lack one say nothing of it."""
    found = {head: sorted({clip[head] for clip in annotations if clip[head] is not None}) for head in HEADS}
    for head, names in found.items():
        if not names:
            raise InputError(f"no clip of the train split has its {head} annotated; both heads need some")
    return found


def frequencies(config: FinetuneConfig, annotations: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """How often each training clip is drawn: every pair of species and activity equally often, where the config says so."""
    return balance(annotations, HEADS) if config.balanced_sampler else None


def class_index(annotation: Mapping[str, Any], head: str, facts: Facts, where: str) -> int:
    """Position of a head's class, -1 where it is not annotated; InputError for one that training never saw."""
    name, known = annotation[head], facts.labels[head]
    if name is None:
        return -1
    if name not in known:
        raise InputError(f"clip {where}: {head} {name!r} is not among the {len(known)} of training: {known}")
    return known.index(name)


def transform(config: PhaseConfig, facts: Facts, training: bool) -> Callable[[Sample], Batch]:
    """Pictures, waveform (or `mel` where that was prepared elsewhere), both labels.

    Modality dropout only hides: the tensors stay, so that the batch norm of the audio encoder never learns from silence
    that no clip has.
    """
    shape, bcthw = media_shape(config.model), config.model.video_encoder.layout == "bcthw"

    def apply(sample: Sample) -> Batch:
        batch = media(sample, shape, config.augment if training else None)
        if sample.mel is not None:
            del batch["wave"], batch["wave_length"]
            batch["mel"], batch["mel_length"] = fit_mel(
                sample.mel, shape.mel_frames, shape.num_mel_bins, f"clip {sample.id}"
            )
            batch["has_audio"] = torch.tensor(True)
        if (
            training
            and batch["has_video"]
            and batch["has_audio"]
            and sample.rng.random() < config.augment.modality_dropout
        ):
            batch["has_video" if sample.rng.random() < 0.5 else "has_audio"] = torch.tensor(False)
        if bcthw:
            batch["frames"] = batch["frames"].transpose(0, 1).contiguous()
        if sample.annotation:
            batch |= {head: torch.tensor(class_index(sample.annotation, head, facts, sample.id)) for head in HEADS}
        return batch

    return apply


def media_shape(model: ModelConfig) -> MediaShape:
    """The sizes of the batch's tensors."""
    video, audio = model.video_encoder, model.audio_encoder
    num_samples = round(audio.sample_rate * audio.audio_duration)
    return MediaShape(video.num_frames, video.frame_size, num_samples, mel_frames(audio), audio.num_mel_bins)
