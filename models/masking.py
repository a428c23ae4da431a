"""Which tokens a masked auto-encoder sees. Every choice follows from a noise that belongs to the clip, not to the batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

VideoMode = Literal["random", "tube"]
SoundMode = Literal["random", "time", "freq", "tf"]


def num_visible(num: int, ratio: float) -> int:
    """Tokens left of `num` when `ratio` of them is masked; at least one."""
    return max(1, round(num * (1 - ratio)))


def split_lowest(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(B, N) scores -> places of the `count` lowest (B, count) and of the others (B, N - count), both ascending."""
    order = score.argsort(1)
    return order[:, :count].sort(1).values, order[:, count:].sort(1).values


def mask_video(noise: Tensor, grid: tuple[int, int, int], ratio: float, mode: VideoMode) -> tuple[Tensor, Tensor]:
    """Places kept (B, K) and hidden (B, N - K) for (B, N) noise over a grid (time, rows, columns); N is their product.

    tube: the same places in every slice of time (VideoMAE, Tong et al. 2022), so that motion gives nothing away.
    """
    if mode == "random":
        return split_lowest(noise, num_visible(noise.shape[1], ratio))
    time, places = grid[0], grid[1] * grid[2]
    keep, hidden = split_lowest(noise[:, :places], num_visible(places, ratio))
    starts = torch.arange(time, device=noise.device)[None, :, None] * places
    return (starts + keep[:, None]).flatten(1), (starts + hidden[:, None]).flatten(1)


def mask_sound(noise: Tensor, grid: tuple[int, int], ratio: float, mode: SoundMode) -> tuple[Tensor, Tensor]:
    """Places kept (B, K) and hidden (B, N - K) for (B, N) noise over a grid (time, pitch).

    time, freq: whole columns or rows, one of them in part where the count asks for it. tf: 0.7 · ratio of both axes, then
    single places up to the exact count (AudioMAE, Huang et al. 2022).
    """
    count = num_visible(noise.shape[1], ratio)
    if mode == "random":
        return split_lowest(noise, count)
    field = noise.view(-1, *grid)
    # Whole columns go by rank, not by noise: two of nearly the same noise must not be hidden in halves.
    if mode == "time":
        score = _rank(field[:, :, 0])[:, :, None] + field / 2
    elif mode == "freq":
        score = _rank(field[:, 0, :])[:, None, :] + field / 2
    else:
        hidden = (_rank(field[:, :, 0]) >= num_visible(grid[0], 0.7 * ratio))[:, :, None]
        hidden = hidden | (_rank(field[:, 0, :]) >= num_visible(grid[1], 0.7 * ratio))[:, None, :]
        score = field + hidden
    return split_lowest(score.flatten(1), count)


def _rank(values: Tensor) -> Tensor:
    return values.argsort(1).argsort(1)
