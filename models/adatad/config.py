"""adatad's values. Their names and the presets' values are OpenTAD's where it has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.family import InputError

Mode = Literal["adapter", "frozen", "full", "side"]


@dataclass(frozen=True)
class BackboneConfig:
    """Section `adatad.model.backbone`: VideoMAE over chunks of frames, and what of it is trained."""

    model_name: str  # VideoMAE checkpoint: name, folder, file or none
    mode: Mode  # what trains: adapters in the blocks | nothing | everything | adapters on a ladder beside the blocks
    dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    patch_size: int  # pixels
    tubelet: int  # frames a token spans
    chunk_frames: int  # frames that attend to each other
    frame_size: int  # pixels, square
    pretrained_grid: int  # rows (and columns) of the position table that the checkpoint was trained with
    adapter_dim: int  # width inside an adapter
    first_adapter: int  # of mode side: the first block with one, from 0
    drop_path: float  # of the last block; linear from 0 at the first
    checkpointing: bool  # compute activations again in the backward pass instead of keeping them
    chunks_at_once: int  # chunks that are embedded, and go through a frozen backbone, together; 0 = all


@dataclass(frozen=True)
class DetectorConfig:
    """Section `adatad.model.detector`: ActionFormer."""

    dim: int
    num_heads: int
    mlp_dim: int
    stem_layers: int
    num_levels: int  # of the pyramid, each half as long as the one before
    drop_path: float


@dataclass(frozen=True)
class ModelConfig:
    """Section `adatad.model`."""

    backbone: BackboneConfig
    detector: DetectorConfig
    window: int  # grid steps of a window: what the detector sees at once
    scale_factor: int  # stored frames a grid step: 1, or more frames than the detector has steps
    max_segments: int  # of a video: more is an error


@dataclass(frozen=True)
class Augmentation:
    """Section `adatad.finetune.augment`: one draw for all frames of a window."""

    min_area: float  # of the random crop; 1 = the middle crop, no flip
    rand_ops: int  # operations of RandAugment's kind
    color: float  # brightness, contrast and saturation from 1 - color to 1 + color
    hue: float  # up to this much of a turn


@dataclass(frozen=True)
class FinetuneConfig:
    """Phase `finetune`: action segments in untrimmed videos."""

    model: ModelConfig
    augment: Augmentation
    keep_threshold: float  # share of a segment that must lie within a training window for it to count
    crop_ratio: list[float]  # a video shorter than a window is cropped to such a share of it
    overlap: float  # of neighbouring windows in evaluation, below 1
    center_radius: float  # level's strides around a segment's centre in which points are positive
    label_smoothing: float
    normalizer: float  # the loss is divided by a moving average of the number of positive points, which starts here
    adapter_lr: float  # times the phase's lr: rate of the backbone's trained part
    min_score: float  # of a prediction
    max_per_window: int
    max_per_video: int
    nms_sigma: float
    # How many of the classes that a classifier of whole videos finds likeliest a video's detections may have in evaluation,
    # their scores multiplied by its; 0 = no such classifier.
    classifier_top: int


def check(config: ModelConfig) -> None:
    """InputError naming the key of `adatad.model` whose value does not fit the others."""
    back, detector = config.backbone, config.detector
    divisions = [
        ("backbone.frame_size", back.frame_size, "patch_size", back.patch_size),
        ("backbone.chunk_frames", back.chunk_frames, "tubelet", back.tubelet),
        ("backbone.dim", back.dim, "num_heads", back.num_heads),
        ("backbone.dim", back.dim, "a sine and a cosine", 2),
        ("window", config.window * config.scale_factor, "backbone.chunk_frames", back.chunk_frames),
        ("window", config.window, "2 ^ (detector.num_levels - 1)", 2 ** (detector.num_levels - 1)),
        ("detector.dim", detector.dim, "num_heads", detector.num_heads),
    ]
    for key, value, by, divisor in divisions:
        if divisor < 1 or value < 1 or value % divisor:
            raise InputError(f"params.yaml: adatad.model.{key} is {value}; it must be a multiple of {by} ({divisor})")
    if not 0 <= back.first_adapter < back.num_layers:
        raise InputError(
            f"params.yaml: adatad.model.backbone.first_adapter is {back.first_adapter}; it must lie below num_layers "
            f"({back.num_layers})"
        )
