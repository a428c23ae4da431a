"""wildlife's module: two encoders, their fusion, and a classifier for the species and one for the activity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.family import Batch, Facts, InputError
from models.losses import annotated_cross_entropy, effective_number, log_prior
from models.wildlife.config import HEADS, AudioConfig, FinetuneConfig, ModelConfig, VideoConfig, check, check_imbalance
from models.wildlife.encoders import AudioEncoder, VideoEncoder
from models.wildlife.fusion import KINDS, Streams


class Finetune(nn.Module):
    """Species and activity of a clip from its frames and its sound, or from whichever of the two it has."""

    def __init__(self, config: FinetuneConfig, facts: Facts) -> None:
        check(config.model)
        check_imbalance(config)
        super().__init__()
        model = config.model
        self.config = config
        self.video_encoder = VideoEncoder(model)
        self.audio_encoder = AudioEncoder(model.audio_encoder, facts)
        dims = {"video": model.video_feature_dim, "audio": self.audio_encoder.dim}
        self.fusion = KINDS[model.fusion](model, dims)
        self.heads = nn.ModuleDict({head: classifier(model, len(facts.labels[head])) for head in HEADS})
        self.losses = nn.ModuleDict({head: HeadLoss(config, head, facts) for head in HEADS})
        self.video_encoder.requires_grad_(not model.video_encoder.freeze_backbone)
        self.audio_encoder.requires_grad_(not model.audio_encoder.freeze_backbone)

    def encode(self, batch: Batch) -> Batch:
        """What precedes the fusion: each encoder's pooled vector, and its tokens where the fusion reads them."""
        return self.read(self.video_encoder.pixels(batch["frames"]), self.audio_encoder.picture(batch))

    def read(self, pixels: Tensor, picture: Tensor) -> Batch:
        """The same from the encoders' own inputs."""
        seen, video = self.video_encoder.read(pixels)
        heard, audio = self.audio_encoder.read(picture)
        features = {"video_feature": video, "audio_feature": audio}
        return features if self.fusion.pooled else features | {"video_tokens": seen, "audio_tokens": heard}

    def fuse(self, encoded: Batch, batch: Batch) -> Tensor:
        """(B, fusion_hidden_dim)."""
        kind = "feature" if self.fusion.pooled else "tokens"
        given: Streams = {name: encoded[f"{name}_{kind}"] for name in ("video", "audio")}
        return self.fusion(given, {name: batch[f"has_{name}"] for name in given})

    def forward(self, batch: Batch) -> Batch:
        """Training: the losses. Evaluation: logits (B, C) of both heads and the features behind them."""
        answer = self.answer(batch)
        return self.loss(answer, batch) if self.training else answer

    def answer(self, batch: Batch) -> Batch:
        """<head>_logits (B, C), video_feature, audio_feature and fused_feature (B, D)."""
        encoded = batch if "video_feature" in batch else self.encode(batch)
        fused = self.fuse(encoded, batch)
        logits = {f"{head}_logits": self.heads[head](fused) for head in HEADS}
        features = {key: encoded[key] for key in ("video_feature", "audio_feature")}
        return logits | features | {"fused_feature": fused}

    def loss(self, answer: Batch, batch: Batch) -> Batch:
        """Both heads' losses and their sum."""
        losses: Batch = {}
        terms = []
        for head in HEADS:
            losses[f"loss_{head}"], term = self.losses[head](answer[f"{head}_logits"], batch[head])
            terms.append(term)
        return {"loss": torch.stack(terms).sum(), **losses}


class HeadLoss(nn.Module):
    """One head's part of the loss: the mean over all clips of the batch, of which those not annotated add nothing.

    With `uncertainty` it is exp(-s) L + s / 2 a clip with a learned s, the log of the head's variance (Kendall et al. 2018).
    """

    weights: Tensor | None
    prior: Tensor | None

    def __init__(self, config: FinetuneConfig, head: str, facts: Facts) -> None:
        super().__init__()
        self.scale = {"species": config.species_weight, "activity": config.activity_weight}[head]
        self.smoothing = config.label_smoothing
        self.log_variance = nn.Parameter(torch.zeros(1)) if config.uncertainty else None
        counts = class_counts(facts.counts, head) if config.imbalance != "none" else []
        weights = effective_number(counts, config.beta) if config.imbalance == "effective_number" else None
        prior = config.tau * log_prior(counts) if config.imbalance == "logit_adjustment" else None
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("prior", prior, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The head's cross-entropy, for logs, and its part of the loss."""
        adjusted = logits if self.prior is None else logits.float() + self.prior
        error = annotated_cross_entropy(adjusted, labels, self.weights, self.smoothing)
        if self.log_variance is None:
            return error.mean().detach(), self.scale * error.mean()
        term = (-self.log_variance).exp() * error + 0.5 * self.log_variance * (labels >= 0)
        return error.mean().detach(), self.scale * term.mean()


def class_counts(counts: Mapping[str, list[int]], head: str) -> list[int]:
    """Training clips of each class; InputError where the facts do not tell, or a class has none."""
    if not counts.get(head) or min(counts[head]) < 1:
        raise InputError(
            f"wildlife.finetune.imbalance: no count of clips for each {head}; train anew, or set it to none"
        )
    return counts[head]


def classifier(config: ModelConfig, num_classes: int) -> nn.Sequential:
    """A head as the seed has it."""
    dim, dropout = config.fusion_hidden_dim, config.dropout
    narrow, answer = nn.Linear(dim, dim // 2), nn.Linear(dim // 2, num_classes)
    return nn.Sequential(nn.Dropout(dropout), narrow, nn.ReLU(), nn.Dropout(dropout), answer)


def is_frozen(config: FinetuneConfig) -> bool:
    """Whether features may be computed once. Not for mbt: it reads all tokens, megabytes a clip."""
    model = config.model
    frozen = model.video_encoder.freeze_backbone and model.audio_encoder.freeze_backbone
    return frozen and KINDS[model.fusion].pooled


def tiny_model() -> ModelConfig:
    """The smallest model, for tests on a CPU; the ResNet has one size, so it rests."""
    return ModelConfig(
        video_encoder=VideoConfig(
            kind="videomae",
            model_name="none",
            fallback="error",
            freeze_backbone=False,
            layout="btchw",
            num_layers=1,
            num_heads=2,
            num_frames=2,
            frame_size=16,
            patch_size=8,
            tubelet=1,
        ),
        audio_encoder=AudioConfig(
            model_name="resnet18",
            pretrained="none",
            freeze_backbone=True,
            sample_rate=16000,
            audio_duration=0.5,
            num_mel_bins=16,
            mel_step=1,
        ),
        video_feature_dim=16,
        fusion="mbt",
        fusion_hidden_dim=16,
        fusion_num_layers=2,
        fusion_num_heads=2,
        fusion_layer=0,
        num_bottlenecks=2,
        dropout=0.0,
    )
