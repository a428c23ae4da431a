"""Attention rollout (Abnar and Zuidema 2020): how much each place of the input goes into each token after some layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def mixing(weights: Tensor) -> Tensor:
    """What a layer does to its tokens: (B, heads, N, N) attention -> (B, N, N) = rownorm(mean over heads + I).

    The unit matrix stands for the connection around the attention; networks within a token mix nothing.
    """
    mixed = weights.float().mean(1) + torch.eye(weights.shape[-1], device=weights.device)
    return mixed / mixed.sum(-1, keepdim=True)


def rollout(layers: Iterable[Tensor], start: Tensor) -> Tensor:
    """(B, N, P) whose row n says what token n is made of after all layers, from `start` (B, N, P) before the first.

    `layers` gives the attention (B, heads, N, N) of each layer; only one is held at a time. Where the rows of `start`
    add up to 1, so do the result's.
    """
    found = start
    for weights in layers:
        found = mixing(weights) @ found
    return found


def own_places(batch: int, num: int, device: torch.device) -> Tensor:
    """(B, N, N): before the first layer each token is its own place and nothing else."""
    return torch.eye(num, device=device).expand(batch, -1, -1)


def ranks(relevance: Tensor) -> Tensor:
    """(B, P) -> (B, P) int64: 0 for the most relevant place of a clip; of equal ones the first comes first."""
    order = relevance.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)
