"""wildlife's values. What the seed's config.yaml names has its name here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.family import InputError
from models.samples import Augmentation

HEADS = ("species", "activity")  # names of the annotations, of the label maps and of the classifiers


@dataclass(frozen=True)
class VideoConfig:
    """Section `wildlife.model.video_encoder`."""

    kind: Literal["videomae", "cnn3d"]
    model_name: str  # VideoMAE checkpoint: name, folder, file or none
    fallback: Literal["error", "cnn3d"]  # where that name is not on this machine and the hub cannot be reached
    freeze_backbone: bool
    layout: Literal["btchw", "bcthw"]  # of the batch's `frames`
    num_layers: int
    num_heads: int
    num_frames: int  # the encoder's own count; a clip of another is resampled uniformly
    frame_size: int  # pixels, square
    patch_size: int  # pixels
    tubelet: int  # frames a token spans


@dataclass(frozen=True)
class AudioConfig:
    """Section `wildlife.model.audio_encoder`."""

    model_name: Literal["resnet10", "resnet18", "resnet34", "resnet50"]
    pretrained: str  # torchvision's weights: file, folder, name on the hub such as timm/resnet18.tv_in1k, or none
    freeze_backbone: bool
    sample_rate: int  # Hz
    audio_duration: float  # seconds
    num_mel_bins: int
    mel_step: int  # 10 ms frames averaged into one column of the picture


@dataclass(frozen=True)
class ModelConfig:
    """Section `wildlife.model`."""

    video_encoder: VideoConfig
    audio_encoder: AudioConfig
    video_feature_dim: int
    fusion: Literal["mbt", "concat", "twotoken"]
    fusion_hidden_dim: int
    fusion_num_layers: int
    fusion_num_heads: int
    fusion_layer: int  # of mbt: the first layer with bottlenecks, from 0; fusion_num_layers = late fusion
    num_bottlenecks: int  # of mbt
    dropout: float


@dataclass(frozen=True)
class FinetuneConfig:
    """Phase `finetune`: species and activity from both modalities."""

    model: ModelConfig
    augment: Augmentation
    species_weight: float  # of the head's loss
    activity_weight: float
    uncertainty: bool  # learn both heads' scales too (Kendall et al. 2018)
    label_smoothing: float
    imbalance: Literal["none", "effective_number", "logit_adjustment"]
    beta: float  # of effective_number
    tau: float  # of logit_adjustment
    balanced_sampler: bool  # draw every pair of species and activity equally often


@dataclass(frozen=True)
class DistillConfig:
    """Phase `distill`: a smaller model learns from `finetune`'s answers beside the annotations."""

    model: (
        ModelConfig  # the student's; it sees and hears what the teacher does, hence the same sizes of frames and sound
    )
    augment: Augmentation
    species_weight: float  # of the head's loss
    activity_weight: float
    label_smoothing: float  # of what the annotations say
    temperature: float  # at which both answers are compared
    alpha: float  # share of the loss that the teacher's answers have; the annotations have the rest


PhaseConfig = FinetuneConfig | DistillConfig


def check_imbalance(config: FinetuneConfig) -> None:
    """InputError where the same imbalance would be weighed twice."""
    if config.balanced_sampler and config.imbalance != "none":
        raise InputError(
            f"params.yaml: wildlife.finetune has imbalance {config.imbalance} and balanced_sampler, which weigh the same "
            "thing twice; set imbalance to none or balanced_sampler to false"
        )


def check(config: ModelConfig, where: str = "wildlife.model") -> None:
    """InputError naming the key below `where` whose value does not fit the others."""
    video, audio, dim = config.video_encoder, config.audio_encoder, config.fusion_hidden_dim
    divisions = [
        ("video_encoder.frame_size", video.frame_size, "patch_size", video.patch_size),
        ("video_encoder.num_frames", video.num_frames, "tubelet", video.tubelet),
        ("video_feature_dim", config.video_feature_dim, "video_encoder.num_heads", video.num_heads),
        ("video_feature_dim", config.video_feature_dim, "a sine and a cosine", 2),
        ("fusion_hidden_dim", dim, "fusion_num_heads", config.fusion_num_heads),
        ("fusion_hidden_dim", dim, "the 4 parts of a position", 4),
    ]
    for key, value, by, divisor in divisions:
        if divisor < 1 or value < 1 or value % divisor:
            raise InputError(f"params.yaml: {where}.{key} is {value}; it must be a multiple of {by} ({divisor})")
    if not 0 <= config.fusion_layer <= config.fusion_num_layers:
        raise InputError(
            f"params.yaml: {where}.fusion_layer is {config.fusion_layer}; it must lie between 0 and "
            f"fusion_num_layers ({config.fusion_num_layers})"
        )
    if config.num_bottlenecks < 1:
        raise InputError(f"params.yaml: {where}.num_bottlenecks is {config.num_bottlenecks}; 1 is the least")
    if audio.mel_step < 1 or mel_frames(audio) < audio.mel_step:
        raise InputError(
            f"params.yaml: {where}.audio_encoder.audio_duration is {audio.audio_duration} s, {mel_frames(audio)} "
            f"mel frames; it must give one column of mel_step ({audio.mel_step}) frames at least"
        )


def mel_frames(config: AudioConfig) -> int:
    """10 ms frames of the waveform, each 25 ms long."""
    samples = round(config.audio_duration * config.sample_rate)
    length, shift = round(config.sample_rate * 0.025), round(config.sample_rate * 0.010)
    return max(0, (samples - length) // shift + 1)


def video_grid(config: VideoConfig) -> tuple[int, int, int]:
    """Video tokens in time, rows, columns."""
    if config.kind == "cnn3d":
        side = -(-config.frame_size // 16)
        return -(-config.num_frames // 8), side, side
    side = config.frame_size // config.patch_size
    return config.num_frames // config.tubelet, side, side


def sound_grid(config: AudioConfig) -> tuple[int, int]:
    """Places of the ResNet's map in pitch and in time: each side halved five times, rounded up."""
    return -(-config.num_mel_bins // 32), -(-(mel_frames(config) // config.mel_step) // 32)
