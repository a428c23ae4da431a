"""T3-AV's values. What the seed's commands call by a flag has the flag's name here."""

from __future__ import annotations

from dataclasses import dataclass

from models.family import InputError
from models.masking import SoundMode, VideoMode
from models.samples import Augmentation


@dataclass(frozen=True)
class ModelConfig:
    """Section `t3av.model`: what the phases must agree on."""

    vit_model_name: str  # ViT checkpoint that both encoders start from: name, folder or none
    dim: int
    encoder_layers: int
    encoder_heads: int
    num_frames: int
    frame_size: int  # pixels, square
    patch_size: int  # pixels
    audio_patch_size: int  # mel frames, and mel bins
    tubelet: int  # frames a video token spans
    sample_rate: int  # Hz
    audio_duration: float  # seconds
    num_mel_bins: int
    bb_layers: int
    bb_heads: int


@dataclass(frozen=True)
class PretrainConfig:
    """Phase `pretrain`: masked auto-encoding of each modality."""

    model: ModelConfig
    augment: Augmentation
    train_video_mae: bool
    train_audio_mae: bool
    mask_ratio: float
    audio_mask_ratio: float
    video_mask_mode: VideoMode
    audio_mask_mode: SoundMode
    norm_pix_loss: bool
    dec_dim: int
    dec_layers: int
    dec_heads: int


@dataclass(frozen=True)
class ContrastiveConfig:
    """Phase `contrastive`: picture and sound of a clip find each other."""

    model: ModelConfig
    augment: Augmentation
    contrastive_dim: int
    proj_hidden_dim: int
    temperature: float
    learn_temperature: bool
    freeze_encoders: bool
    freeze_backbone: bool


@dataclass(frozen=True)
class FinetuneConfig:
    """Phase `finetune`: sound events from both modalities."""

    model: ModelConfig
    augment: Augmentation
    clf_hidden_dim: int
    label_smoothing: float
    freeze_encoders: bool
    freeze_backbone: bool
    freeze_all_except_head: bool
    unfreeze_backbone_layers: int  # of a frozen backbone, counted from its end
    unfreeze_encoder_layers: int  # of the frozen audio encoder, counted from its end


def video_grid(config: ModelConfig) -> tuple[int, int, int]:
    """Tokens in time, rows, columns."""
    side = config.frame_size // config.patch_size
    return config.num_frames // config.tubelet, side, side


def sound_grid(config: ModelConfig) -> tuple[int, int]:
    """Tokens in time and in pitch; the last patch in time may be filled up with silence."""
    samples = round(config.audio_duration * config.sample_rate)
    length, shift = round(config.sample_rate * 0.025), round(config.sample_rate * 0.010)
    frames = max(0, (samples - length) // shift + 1)
    return -(-frames // config.audio_patch_size), config.num_mel_bins // config.audio_patch_size


def check(config: ModelConfig) -> None:
    """InputError naming the key whose value does not fit the others."""
    divisions = [
        ("frame_size", config.frame_size, "patch_size", config.patch_size),
        ("num_mel_bins", config.num_mel_bins, "audio_patch_size", config.audio_patch_size),
        ("num_frames", config.num_frames, "tubelet", config.tubelet),
        ("dim", config.dim, "encoder_heads", config.encoder_heads),
        ("dim", config.dim, "bb_heads", config.bb_heads),
        ("dim", config.dim, "the 4 parts of a position", 4),
    ]
    for key, value, by, divisor in divisions:
        if divisor < 1 or value < 1 or value % divisor:
            raise InputError(f"params.yaml: t3av.model.{key} is {value}; it must be a multiple of {by} ({divisor})")
    if sound_grid(config)[0] == 0:
        raise InputError(f"params.yaml: t3av.model.audio_duration is {config.audio_duration}; 0.025 s is the least")
