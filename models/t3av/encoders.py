"""Patch encoders and the shared backbone of T3-AV. Masked tokens never enter: they are dropped before the first block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.attention import Block
from models.embed import sincos, sincos_grid, sound_patches, take, video_patches
from models.family import Facts
from models.t3av.config import ModelConfig, sound_grid, video_grid
from models.transforms import LogMel, hide_bands, standardise


class VideoEncoder(nn.Module):
    """A ViT over the patches of all frames; positions are learned, one table for places and one for time."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tubelet, self.size = config.tubelet, config.patch_size
        time, rows, columns = video_grid(config)
        self.patch = nn.Linear(3 * config.tubelet * config.patch_size**2, config.dim)
        self.places = nn.Parameter(sincos_grid(rows, columns, config.dim)[None])
        self.times = nn.Parameter(sincos(time, config.dim)[None] if time > 1 else torch.zeros(1, 1, config.dim))
        self.blocks = nn.ModuleList(Block(config.dim, config.encoder_heads) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.dim, 1e-6)

    def patches(self, frames: Tensor) -> Tensor:
        """(B, T, 3, S, S) uint8 -> (B, N, 3 · tubelet · patch²) in [-1, 1]."""
        return video_patches(frames.float() / 127.5 - 1, self.tubelet, self.size)

    def forward(self, patches: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, N, P) and the places (B, K) to look at -> (B, K, D); all places for None."""
        positions = (self.times[:, :, None] + self.places[:, None]).flatten(1, 2).expand(len(patches), -1, -1)
        x = self.patch(take(patches, keep)) + take(positions, keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class AudioEncoder(nn.Module):
    """A ViT over square patches of the log-mel picture."""

    def __init__(self, config: ModelConfig, facts: Facts) -> None:
        super().__init__()
        self.size = config.audio_patch_size
        self.mel = LogMel(config.sample_rate, config.num_mel_bins)
        self.num_frames = sound_grid(config)[0] * config.audio_patch_size
        self.mean, self.deviation = facts.mel_mean, facts.mel_std
        self.patch = nn.Linear(config.audio_patch_size**2, config.dim)
        self.places = nn.Parameter(sincos_grid(*sound_grid(config), config.dim)[None])
        self.blocks = nn.ModuleList(Block(config.dim, config.encoder_heads) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.dim, 1e-6)

    def patches(self, wave: Tensor, length: Tensor, bands: Tensor | None = None) -> Tensor:
        """(B, N) waveform with `length` (B,) true samples -> (B, N', patch²), standardised; silence after the end is 0."""
        mel = self.mel(wave)[:, : self.num_frames]
        valid = ((length - self.mel.length) // self.mel.shift + 1).clamp(min=0)
        mel = standardise(mel, valid, self.mean, self.deviation)
        mel = nn.functional.pad(mel, (0, 0, 0, self.num_frames - mel.shape[1]))
        return sound_patches(mel if bands is None else hide_bands(mel, bands), self.size)

    def forward(self, patches: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, N, P) and the places (B, K) to listen to -> (B, K, D); all places for None."""
        x = self.patch(take(patches, keep)) + take(self.places.expand(len(patches), -1, -1), keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Backbone(nn.Module):
    """Blocks that both modalities go through, one at a time or together; each has its own embedding and norms.

    Tokens carry the positions that their encoders gave them, so a dropped neighbour moves nobody.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        names = ("video", "audio")
        self.kind = nn.ParameterDict({name: nn.Parameter(torch.randn(1, 1, config.dim) * 0.02) for name in names})
        self.enter = nn.ModuleDict({name: nn.LayerNorm(config.dim, 1e-6) for name in names})
        self.blocks = nn.ModuleList(Block(config.dim, config.bb_heads) for _ in range(config.bb_layers))
        self.leave = nn.ModuleDict({name: nn.LayerNorm(config.dim, 1e-6) for name in names})

    def forward(self, tokens: Tensor, name: str) -> Tensor:
        """(B, N, D) of one modality, "video" or "audio" -> (B, N, D)."""
        x = self.enter[name](tokens) + self.kind[name]
        for block in self.blocks:
            x = block(x)
        return self.leave[name](x)

    def joint(self, video: Tensor, audio: Tensor, has_video: Tensor, has_audio: Tensor) -> tuple[Tensor, Tensor]:
        """Both together; tokens of a clip's missing modality (has_x (B,) False) are attended to by nobody."""
        x = torch.cat(
            [self.enter["video"](video) + self.kind["video"], self.enter["audio"](audio) + self.kind["audio"]], 1
        )
        keys = torch.cat(
            [has_video[:, None].expand(-1, video.shape[1]), has_audio[:, None].expand(-1, audio.shape[1])], 1
        )
        keys = keys | ~keys.any(1, keepdim=True)  # a clip without either must not divide by nothing
        for block in self.blocks:
            x = block(x, keys)
        return self.leave["video"](x[:, : video.shape[1]]), self.leave["audio"](x[:, video.shape[1] :])


class Trunk(nn.Module):
    """What all phases share: both encoders and the backbone, under the same names in every checkpoint."""

    def __init__(self, config: ModelConfig, facts: Facts) -> None:
        super().__init__()
        self.video_encoder = VideoEncoder(config)
        self.audio_encoder = AudioEncoder(config, facts)
        self.backbone = Backbone(config)
