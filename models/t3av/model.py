"""T3-AV's three modules: masked auto-encoder, contrastive aligner, classifier."""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.attention import Block, initialise
from models.embed import MaskToken, sincos, sincos_grid, take
from models.family import Batch, Facts
from models.losses import gather_rows, has_collapsed, info_nce, reconstruction
from models.masking import mask_sound, mask_video
from models.t3av.config import (
    ContrastiveConfig,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    check,
    sound_grid,
    video_grid,
)
from models.t3av.encoders import Trunk


def features(trunk: Trunk, batch: Batch) -> tuple[Tensor, Tensor]:
    """(B, D) of the picture and of the sound, each through the backbone alone; zero where a clip lacks it."""
    video = trunk.backbone(trunk.video_encoder(trunk.video_encoder.patches(batch["frames"])), "video").mean(1)
    patches = trunk.audio_encoder.patches(batch["wave"], batch["wave_length"], batch.get("bands"))
    audio = trunk.backbone(trunk.audio_encoder(patches), "audio").mean(1)
    return video * batch["has_video"][:, None], audio * batch["has_audio"][:, None]


# --- pretrain ------------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Predicts the hidden patches of one modality from the visible tokens (MAE, He et al. 2022)."""

    positions: Tensor

    def __init__(self, config: PretrainConfig, positions: Tensor, patch_dim: int) -> None:
        super().__init__()
        self.enter = nn.Linear(config.model.dim, config.dec_dim)
        self.mask = MaskToken(config.dec_dim)
        self.register_buffer("positions", positions[None], persistent=False)
        self.blocks = nn.ModuleList(Block(config.dec_dim, config.dec_heads) for _ in range(config.dec_layers))
        self.norm = nn.LayerNorm(config.dec_dim, 1e-6)
        self.leave = nn.Linear(config.dec_dim, patch_dim)

    def forward(self, tokens: Tensor, keep: Tensor, hidden: Tensor) -> Tensor:
        """(B, K, D) from places `keep` (B, K) -> (B, M, P) of the places `hidden` (B, M)."""
        x = self.mask(self.enter(tokens), keep, self.positions.shape[1]) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.leave(self.norm(take(x, hidden)))


class Pretrain(Trunk):
    """Masked auto-encoding of both modalities, weighted alike."""

    def __init__(self, config: PretrainConfig, facts: Facts) -> None:
        check(config.model)
        super().__init__(config.model, facts)
        model, dim = config.model, config.dec_dim
        time, rows, columns = video_grid(model)
        places = sincos_grid(rows, columns, dim).repeat(time, 1) + sincos(time, dim).repeat_interleave(
            rows * columns, 0
        )
        self.config = config
        self.video_decoder = Decoder(config, places, 3 * model.tubelet * model.patch_size**2)
        self.audio_decoder = Decoder(config, sincos_grid(*sound_grid(model), dim), model.audio_patch_size**2)
        initialise(self)
        for part in (self.video_encoder, self.video_decoder):
            part.requires_grad_(config.train_video_mae)
        for part in (self.audio_encoder, self.audio_decoder):
            part.requires_grad_(config.train_audio_mae)

    def video_loss(self, batch: Batch) -> Tensor:
        """(B,) error of the masked patches of the picture, 0 where there is none."""
        config = self.config
        patches = self.video_encoder.patches(batch["frames"])
        keep, hidden = mask_video(
            batch["video_noise"], video_grid(config.model), config.mask_ratio, config.video_mask_mode
        )
        seen = self.backbone(self.video_encoder(patches, keep), "video")
        error = reconstruction(self.video_decoder(seen, keep, hidden), take(patches, hidden), config.norm_pix_loss)
        return error * batch["has_video"]

    def audio_loss(self, batch: Batch) -> Tensor:
        """(B,) error of the masked patches of the sound, 0 where there is none."""
        config = self.config
        patches = self.audio_encoder.patches(batch["wave"], batch["wave_length"], batch.get("bands"))
        keep, hidden = mask_sound(
            batch["audio_noise"], sound_grid(config.model), config.audio_mask_ratio, config.audio_mask_mode
        )
        heard = self.backbone(self.audio_encoder(patches, keep), "audio")
        error = reconstruction(self.audio_decoder(heard, keep, hidden), take(patches, hidden), config.norm_pix_loss)
        return error * batch["has_audio"]

    def forward(self, batch: Batch) -> Batch:
        """Training: the mean losses over the batch. Evaluation: per-clip losses and the features of the whole clip."""
        losses: Batch = {}
        if self.config.train_video_mae:
            losses["loss_video"] = self.video_loss(batch)
        if self.config.train_audio_mae:
            losses["loss_audio"] = self.audio_loss(batch)
        if self.training:
            means = {key: value.mean() for key, value in losses.items()}
            return {"loss": torch.stack(list(means.values())).sum(), **means}
        total = torch.stack(list(losses.values())).sum(0)
        video, audio = features(self, batch)
        return {"loss": total, **losses, "video_feature": video, "audio_feature": audio}


# --- contrastive ---------------------------------------------------------------------------------------------------------


def projection(dim: int, hidden: int, out: int) -> nn.Sequential:
    """The small network between features and the space in which they are compared."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, out))


class Contrastive(Trunk):
    """Symmetric InfoNCE between the projected features of picture and sound."""

    def __init__(self, config: ContrastiveConfig, facts: Facts) -> None:
        check(config.model)
        super().__init__(config.model, facts)
        dim = config.model.dim
        self.config = config
        self.video_head = projection(dim, config.proj_hidden_dim, config.contrastive_dim)
        self.audio_head = projection(dim, config.proj_hidden_dim, config.contrastive_dim)
        start = torch.tensor([math.log(config.temperature)])
        self.log_temperature = nn.Parameter(start, requires_grad=config.learn_temperature)
        initialise(self)
        freeze(self, config.freeze_encoders, config.freeze_backbone)

    def encode(self, batch: Batch) -> Batch:
        """Features before the projection heads."""
        video, audio = features(self, batch)
        return {"video_feature": video, "audio_feature": audio}

    def embed(self, batch: Batch) -> Batch:
        """Unit vectors (B, E) of both modalities, zero where a clip lacks it, and which clips are pairs."""
        encoded = batch if "video_feature" in batch else self.encode(batch)
        video = functional.normalize(self.video_head(encoded["video_feature"]).float(), dim=-1)
        audio = functional.normalize(self.audio_head(encoded["audio_feature"]).float(), dim=-1)
        has_video, has_audio = batch["has_video"], batch["has_audio"]
        return {
            "video_embedding": video * has_video[:, None],
            "audio_embedding": audio * has_audio[:, None],
            "pair": has_video & has_audio,
        }

    def joint_loss(self, embeddings: Batch) -> Batch:
        """InfoNCE over the batch of all ranks, with the temperature it used and the alarm that tells a collapse."""
        video, audio = (gather_rows(embeddings[f"{name}_embedding"]) for name in ("video", "audio"))
        pair = gather_rows(embeddings["pair"])
        temperature = self.log_temperature[0].exp().clamp(0.01, 1.0)
        loss = info_nce(video, audio, pair, temperature)
        collapse = has_collapsed(video, loss.detach(), len(video))
        return {"loss": loss, "temperature": temperature.detach(), "collapse": collapse}

    def forward(self, batch: Batch, part: Literal["", "embeddings", "loss"] = "") -> Batch:
        """Training: the loss, or one of its two parts. Evaluation: embeddings, and the features behind them."""
        if part:
            return self.embed(batch) if part == "embeddings" else self.joint_loss(batch)
        if self.training:
            return self.joint_loss(self.embed(batch))
        encoded = batch if "video_feature" in batch else self.encode(batch)
        return {key: encoded[key] for key in ("video_feature", "audio_feature")} | self.embed({**batch, **encoded})


# --- finetune ------------------------------------------------------------------------------------------------------------


class Finetune(Trunk):
    """A classifier on both modalities' tokens after a joint pass through the backbone."""

    def __init__(self, config: FinetuneConfig, facts: Facts) -> None:
        check(config.model)
        super().__init__(config.model, facts)
        self.config = config
        dim, num_classes = config.model.dim, len(facts.labels["label"])
        self.classifier = nn.Sequential(
            nn.Linear(2 * dim, config.clf_hidden_dim), nn.GELU(), nn.Linear(config.clf_hidden_dim, num_classes)
        )
        self.absent = nn.ParameterDict({name: nn.Parameter(torch.zeros(1, dim)) for name in ("video", "audio")})
        initialise(self)
        everything = config.freeze_all_except_head
        freeze(self, config.freeze_encoders or everything, config.freeze_backbone or everything)
        if not everything:
            self._unfreeze()

    def _unfreeze(self) -> None:
        """Open the last layers of what is frozen, with the norms behind them."""
        backbone, encoder = self.backbone, self.audio_encoder
        if self.config.unfreeze_backbone_layers:
            for part in [*list(backbone.blocks)[-self.config.unfreeze_backbone_layers :], backbone.leave]:
                part.requires_grad_(True)
        if self.config.unfreeze_encoder_layers:
            for part in [*list(encoder.blocks)[-self.config.unfreeze_encoder_layers :], encoder.norm]:
                part.requires_grad_(True)

    def encode(self, batch: Batch) -> Batch:
        """(B, D) a modality after the joint pass; zero where the clip lacks it."""
        video = self.video_encoder(self.video_encoder.patches(batch["frames"]))
        patches = self.audio_encoder.patches(batch["wave"], batch["wave_length"], batch.get("bands"))
        has_video, has_audio = batch["has_video"], batch["has_audio"]
        seen, heard = self.backbone.joint(video, self.audio_encoder(patches), has_video, has_audio)
        return {"seen": seen.mean(1) * has_video[:, None], "heard": heard.mean(1) * has_audio[:, None]}

    def forward(self, batch: Batch) -> Batch:
        """Training: cross-entropy. Evaluation: logits (B, C)."""
        encoded = batch if "seen" in batch else self.encode(batch)
        seen = torch.where(batch["has_video"][:, None], encoded["seen"], self.absent["video"])
        heard = torch.where(batch["has_audio"][:, None], encoded["heard"], self.absent["audio"])
        logits = self.classifier(torch.cat([heard, seen], -1))
        if not self.training:
            return {"logits": logits}
        return {
            "loss": functional.cross_entropy(
                logits.float(), batch["label"], label_smoothing=self.config.label_smoothing
            )
        }


def freeze(trunk: Trunk, encoders: bool, backbone: bool) -> None:
    """Take encoders and backbone out of training where asked."""
    for part, frozen in ((trunk.video_encoder, encoders), (trunk.audio_encoder, encoders), (trunk.backbone, backbone)):
        cast(nn.Module, part).requires_grad_(not frozen)


def is_frozen(config: ContrastiveConfig | FinetuneConfig) -> bool:
    """Whether all that precedes the heads is frozen, so that features may be computed once."""
    if isinstance(config, FinetuneConfig):
        if config.freeze_all_except_head:
            return True
        if config.unfreeze_backbone_layers or config.unfreeze_encoder_layers:
            return False
    return config.freeze_encoders and config.freeze_backbone


def tiny_model() -> ModelConfig:
    """The smallest model, for tests on a CPU."""
    return ModelConfig(
        vit_model_name="none",
        dim=16,
        encoder_layers=1,
        encoder_heads=2,
        num_frames=2,
        frame_size=16,
        patch_size=8,
        audio_patch_size=8,
        tubelet=1,
        sample_rate=16000,
        audio_duration=0.5,
        num_mel_bins=16,
        bb_layers=1,
        bb_heads=2,
    )
