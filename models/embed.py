"""Pictures and sounds as rows of patches, and where each patch stands."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def video_patches(frames: Tensor, tubelet: int, size: int) -> Tensor:
    """(B, T, C, H, W) -> (B, T/tubelet · H/size · W/size, C · tubelet · size²), in order of time, row, column."""
    batch, time, channels, height, width = frames.shape
    x = frames.reshape(batch, time // tubelet, tubelet, channels, height // size, size, width // size, size)
    return x.permute(0, 1, 4, 6, 3, 2, 5, 7).reshape(batch, -1, channels * tubelet * size * size)


def video_pictures(patches: Tensor, tubelet: int, size: int, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of video_patches; `shape` is the grid (time, rows, columns)."""
    batch, (time, rows, columns) = len(patches), shape
    x = patches.view(batch, time, rows, columns, -1, tubelet, size, size)
    return x.permute(0, 1, 5, 4, 2, 6, 3, 7).reshape(batch, time * tubelet, -1, rows * size, columns * size)


def sound_patches(mel: Tensor, size: int) -> Tensor:
    """(B, frames, mel) -> (B, frames/size · mel/size, size²), in order of time, pitch."""
    batch, frames, bins = mel.shape
    x = mel.reshape(batch, frames // size, size, bins // size, size)
    return x.transpose(2, 3).reshape(batch, -1, size * size)


def sincos(length: int, dim: int) -> Tensor:
    """(length, dim) fixed positions (Vaswani et al. 2017): the first half sines, the second cosines. dim is even."""
    rates = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def sincos_in_turn(length: int, dim: int) -> Tensor:
    """(length, dim) fixed positions with sines and cosines in turn (Vaswani et al. 2017), as VideoMAE has them. dim is even."""
    return sincos(length, dim).unflatten(1, (2, -1)).transpose(1, 2).flatten(1)


def sincos_grid(rows: int, columns: int, dim: int) -> Tensor:
    """(rows · columns, dim): half of the channels for the row, half for the column (MAE, He et al. 2022). dim % 4 == 0."""
    row, column = sincos(rows, dim // 2), sincos(columns, dim // 2)
    return torch.cat([row.repeat_interleave(columns, 0), column.repeat(rows, 1)], 1)


def resize_grid(table: Tensor, rows: int, columns: int) -> Tensor:
    """A square table of positions (N, D) resized to (rows · columns, D), bicubic; as it is where the size fits."""
    side = round(len(table) ** 0.5)
    if (side, side) == (rows, columns):
        return table
    grid = table.view(1, side, side, -1).permute(0, 3, 1, 2)
    return functional.interpolate(grid, (rows, columns), mode="bicubic").permute(0, 2, 3, 1).reshape(rows * columns, -1)


def take(tokens: Tensor, index: Tensor | None) -> Tensor:
    """Tokens (B, N, D) at `index` (B, K) -> (B, K, D); all of them for None."""
    return tokens if index is None else tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[-1]))


class MaskToken(nn.Module):
    """Puts encoded tokens back in their places; one learned token stands for each of the others."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.normal_(self.token, std=0.02)

    def forward(self, tokens: Tensor, index: Tensor, num: int) -> Tensor:
        """(B, K, D) that came from places `index` (B, K) -> (B, num, D)."""
        whole = self.token.to(tokens.dtype).expand(len(tokens), num, -1)
        return whole.scatter(1, index[:, :, None].expand_as(tokens), tokens)
