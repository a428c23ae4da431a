"""Video Swin (Liu et al. 2022): frames to tokens that are each the neighbours of a window, from torchvision's parts."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.video.swin_transformer import SwinTransformer3d

from models.avlformer.config import VideoConfig, video_grid

PATCH = (2, 4, 4)  # frames, rows and columns of pixels in a token of the first stage


class VideoSwin(nn.Module):
    """torchvision's Swin3D without its classifier; its keys are torchvision's own."""

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        self.checkpointing = config.checkpointing and not config.freeze
        self.grid = video_grid(config)  # tokens in time, rows, columns
        self.width = config.embed_dim * 2 ** (len(config.depths) - 1)
        whole = SwinTransformer3d(
            list(PATCH),
            config.embed_dim,
            config.depths,
            config.num_heads,
            config.window,
            stochastic_depth_prob=0.0 if config.freeze else config.drop_path,
            num_classes=1,
        )
        self.patch_embed, self.features, self.norm = whole.patch_embed, whole.features, whole.norm
        self.requires_grad_(not config.freeze)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, 3, S, S) normalised as for ImageNet -> (B, T / 2 * h * w, width), in order of time, row, column."""
        x = self.patch_embed(frames.transpose(1, 2))
        for part in self.features:  # stages, and the merging of patches between them
            if self.checkpointing and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(part, x, use_reentrant=False))
            else:
                x = part(x)
        return self.norm(x).flatten(1, 3)
