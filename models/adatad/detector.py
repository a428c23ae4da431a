"""ActionFormer (Zhang et al. 2022): features in time to classes and borders at the points of a pyramid of levels.

Sequences are (B, T, C) with masks (B, T) of their valid steps, which come first. Every layer leaves zeros at the others,
so that what stands there reaches nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import stochastic_depth

from models.adatad.config import DetectorConfig


class Detector(nn.Module):
    """Projection into a pyramid, a norm a level, and two head towers that all levels share."""

    def __init__(self, config: DetectorConfig, input_dim: int, num_classes: int) -> None:
        super().__init__()
        dim = config.dim
        self.embed = nn.ModuleList([ConvUnit(input_dim, dim), ConvUnit(dim, dim)])
        self.stem = nn.ModuleList([Block(config, stride=1) for _ in range(config.stem_layers)])
        self.branch = nn.ModuleList([Block(config, stride=2) for _ in range(config.num_levels - 1)])
        self.neck = nn.ModuleList([nn.LayerNorm(dim, 1e-6) for _ in range(config.num_levels)])
        self.classes = Tower(dim, num_classes)
        self.offsets = Tower(dim, 2)
        # One tensor a level, of one dimension: FSDP shards no scalars.
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(config.num_levels)])
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.Conv1d)) and part.bias is not None:
                nn.init.zeros_(part.bias)
        # Every class begins at a probability of 1 % (RetinaNet, Lin et al. 2017).
        nn.init.constant_(self.classes.answer.get_parameter("bias"), -math.log(99))

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, W) features and (B, W) bool -> logits (B, P, classes), offsets (B, P, 2), valid points (B, P).

        Offsets to a segment's start and end are not negative, in strides of the point's level. W is a multiple of
        2 ^ (levels - 1), and the points stand as `targets.points` has them.
        """
        levels, masks = self.pyramid(features.transpose(1, 2) * mask[..., None], mask)
        logits = [self.classes(x, valid) for x, valid in zip(levels, masks, strict=True)]
        offsets = [
            functional.relu(scale * self.offsets(x, valid))
            for x, valid, scale in zip(levels, masks, self.scales, strict=True)
        ]
        return torch.cat(logits, 1), torch.cat(offsets, 1), torch.cat(masks, 1)

    def pyramid(self, x: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Features (B, W / 2^l, dim) of each level l, and their masks."""
        for unit in self.embed:
            x = unit(x, mask)
        for block in self.stem:
            x = block(x, mask)
        levels, masks = [x], [mask]
        for block in self.branch:
            mask = mask[:, ::2]
            x = block(x, mask)
            levels.append(x)
            masks.append(mask)
        normed = [norm(x) * mask[..., None] for norm, x, mask in zip(self.neck, levels, masks, strict=True)]
        return normed, masks


class ConvUnit(nn.Module):
    """Convolution over three steps, norm, ReLU."""

    def __init__(self, input_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(input_dim, dim, 3, padding=1, bias=False)
        self.norm = nn.LayerNorm(dim, 1e-6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, input_dim) -> (B, T, dim)."""
        x = self.conv(x.transpose(1, 2)).transpose(1, 2) * mask[..., None]
        return functional.relu(self.norm(x)) * mask[..., None]


class Tower(nn.Module):
    """A head: two conv units and a convolution that answers."""

    def __init__(self, dim: int, num_answers: int) -> None:
        super().__init__()
        self.units = nn.ModuleList([ConvUnit(dim, dim), ConvUnit(dim, dim)])
        self.answer = nn.Conv1d(dim, num_answers, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, num_answers)."""
        for unit in self.units:
            x = unit(x, mask)
        return self.answer(x.transpose(1, 2)).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block whose residual branches have learned scales; with stride 2 it halves the sequence."""

    def __init__(self, config: DetectorConfig, stride: int) -> None:
        super().__init__()
        dim = config.dim
        self.stride = stride
        self.norm1 = nn.LayerNorm(dim, 1e-5)
        self.attn = Attention(dim, config.num_heads, stride)
        self.norm2 = nn.LayerNorm(dim, 1e-5)
        self.fc1 = nn.Linear(dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, dim)
        self.branch1 = Branch(dim, config.drop_path)
        self.branch2 = Branch(dim, config.drop_path)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, stride T, C) -> (B, T, C); `mask` (B, T) is the output's."""
        skip = x if self.stride == 1 else functional.max_pool1d(x.transpose(1, 2), 3, 2, 1).transpose(1, 2)
        x = skip * mask[..., None] + self.branch1(self.attn(self.norm1(x), mask))
        hidden = self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return x + self.branch2(hidden * mask[..., None])


class Branch(nn.Module):
    """A learned scale of each channel, small at first, and drop-path."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), 1e-4))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C), of some samples zero in training."""
        return stochastic_depth(self.scale * x, self.drop_path, "row", self.training)


class Attention(nn.Module):
    """Multi-head self-attention of all valid steps; its queries, keys and values see their neighbours."""

    def __init__(self, dim: int, num_heads: int, stride: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value = (Local(dim, stride) for _ in range(3))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, stride T, C) -> (B, T, C), zero where `mask` (B, T) is False."""
        q, k, v = (self.heads(part(x, mask)) for part in (self.query, self.key, self.value))
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.out(found.transpose(1, 2).flatten(2)) * mask[..., None]

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, heads, T, C / heads)."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class Local(nn.Module):
    """Depth-wise convolution over three steps, norm, projection."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, 3, stride, padding=1, groups=dim, bias=False)
        self.norm = nn.LayerNorm(dim, 1e-5)
        self.project = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, stride T, C) -> (B, T, C)."""
        x = self.conv(x.transpose(1, 2)).transpose(1, 2) * mask[..., None]
        return self.project(self.norm(x))
