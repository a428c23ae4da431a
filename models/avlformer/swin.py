"""Video Swin (Liu et al. 2022): frames to tokens, each of which sees those of its window and then of a shifted one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.models.video.swin_transformer import SwinTransformer3d

from models.avlformer.config import VideoConfig, video_grid

PATCH = (2, 4, 4)  # frames, rows and columns of pixels in a token of the first stage
APART = -100.0  # added to the score of two tokens whom only the shift brought into one window


class VideoSwin(nn.Module):
    """torchvision's Swin3D with fused attention and without its classifier; its keys are torchvision's own."""

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
            block=_block,
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


def _block(*given: Any, **named: Any) -> SwinTransformerBlock:
    """torchvision's block, with the attention below in place of the one it is asked for."""
    return SwinTransformerBlock(*given, **(named | {"attn_layer": WindowAttention}))


class WindowAttention(nn.Module):
    """Attention within windows of a map, with a learned bias by relative place, through PyTorch's fused kernels.

    torchvision's composition takes as long in training at FAVDBench's sizes (on a CPU), 1.3 to 2.5 times as long without
    gradients, and keeps the scores of all windows for the backward pass. A side that is cut to the map's takes its biases
    from the first entries of the index, as in both originals.
    """

    index: Tensor

    def __init__(
        self,
        dim: int,
        window_size: Sequence[int],
        shift_size: Sequence[int],
        num_heads: int,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0 and dropout == 0, "Video Swin has none"
        self.window, self.shift, self.num_heads = tuple(window_size), tuple(shift_size), num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        distances = torch.Size(2 * side - 1 for side in self.window)
        self.relative_position_bias_table = nn.Parameter(torch.empty(distances.numel(), num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("index", _distances(self.window), persistent=False)  # (N, N) of a whole window

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) -> the same. Along a side that is no longer than the window there is one window and no shift."""
        size = x.shape[1:4]
        window = [min(have, want) for have, want in zip(size, self.window, strict=True)]
        shift = [s if have > want else 0 for have, want, s in zip(size, self.window, self.shift, strict=True)]
        fill = [-have % want for have, want in zip(size, window, strict=True)]
        padded = functional.pad(x, (0, 0, 0, fill[2], 0, fill[1], 0, fill[0]))
        turned = padded.roll([-s for s in shift], (1, 2, 3)) if any(shift) else padded
        rows = self.attend(_windows(turned, window), self.bias(padded.shape[1:4], window, shift))
        out = _whole(rows, padded.shape, window)
        out = out.roll(shift, (1, 2, 3)) if any(shift) else out
        return out[:, : size[0], : size[1], : size[2]].contiguous()

    def attend(self, x: Tensor, bias: Tensor) -> Tensor:
        """Windows (M, N, C) -> the same; bias (heads, N, N), or (windows of a clip * heads, N, N)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (M, heads, N, C / heads)
        q, k, v = (part.reshape(-1, len(bias), *part.shape[2:]) for part in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        return self.proj(out.reshape(len(x), self.num_heads, x.shape[1], -1).transpose(1, 2).flatten(2))

    def bias(self, size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
        """What is added to scores: by relative place alone, or with a shift by window too, as `attend` takes it."""
        num = torch.Size(window).numel()
        bias = self.relative_position_bias_table[self.index[:num, :num]].permute(2, 0, 1)  # (heads, N, N)
        if not any(shift):
            return bias
        regions = _regions(size, window, shift, bias.device)
        apart = regions[:, None, :, None] != regions[:, None, None, :]  # (windows, 1, N, N)
        return (bias + APART * apart).flatten(0, 1)


def _distances(window: Sequence[int]) -> Tensor:
    """(N, N) row of the table of biases for each two tokens of a window, by how far they are apart in each direction."""
    places = torch.cartesian_prod(*[torch.arange(side) for side in window]).view(-1, 3)  # (N, 3)
    apart = places[:, None] - places + torch.tensor(window) - 1
    return (apart[..., 0] * (2 * window[1] - 1) + apart[..., 1]) * (2 * window[2] - 1) + apart[..., 2]


def _regions(size: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device) -> Tensor:
    """(windows, N) int64: tokens that were neighbours before the map was turned by `shift` have the same number."""
    sides = []
    for length, side, by in zip(size, window, shift, strict=True):
        place = torch.arange(length, device=device)
        sides.append((place >= length - side).long() + (place >= length - by).long())
    whole = (sides[0][:, None, None] * 3 + sides[1][:, None]) * 3 + sides[2]
    return _windows(whole[None, ..., None], window)[..., 0]


def _windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """(B, T, H, W, C) -> (B * windows, N, C)."""
    for dim, side in zip((1, 3, 5), window, strict=True):
        x = x.unflatten(dim, (-1, side))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)


def _whole(windows: Tensor, shape: Sequence[int], window: Sequence[int]) -> Tensor:
    """(B * windows, N, C) -> (B, T, H, W, C) of this shape."""
    counts = [length // side for length, side in zip(shape[1:4], window, strict=True)]
    x = windows.reshape(-1, *counts, *window, shape[-1])
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(shape)
