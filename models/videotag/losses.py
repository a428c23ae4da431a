"""Losses of answers that hold any number of tags, and where a classifier of rare tags starts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from models.family import Facts, InputError
from models.videotag.config import TaggerConfig
from models.videotag.data import HEAD


def tag_loss(logits: Tensor, tags: Tensor, config: TaggerConfig) -> Tensor:
    """(B,) the loss of each clip, summed over its classes; logits and tags (B, C), tags from 0 to 1."""
    logits = logits.float()
    if config.loss == "focal":
        return focal(logits, tags, config.alpha, config.gamma).sum(-1)
    if config.loss == "asymmetric":
        return asymmetric(logits, tags, config.gamma_positive, config.gamma_negative, config.margin).sum(-1)
    return functional.binary_cross_entropy_with_logits(logits, tags, reduction="none").sum(-1)


def focal(logits: Tensor, tags: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss of each answer (Lin et al. 2017, eq. 5); of a tag between 0 and 1 that share of both of its losses."""
    there, absent = logits.sigmoid(), (-logits).sigmoid()
    positive = -alpha * absent**gamma * functional.logsigmoid(logits)
    negative = -(1 - alpha) * there**gamma * functional.logsigmoid(-logits)
    return tags * positive + (1 - tags) * negative


def asymmetric(logits: Tensor, tags: Tensor, gamma_positive: float, gamma_negative: float, margin: float) -> Tensor:
    """Asymmetric loss of each answer (Ridnik et al. 2021, eq. 7): probabilities below `margin` cost absent tags nothing."""
    absent = (-logits).sigmoid()
    positive = -(absent**gamma_positive) * functional.logsigmoid(logits)
    shifted = (absent + margin).clamp(1e-8, 1.0)
    negative = -((1 - shifted) ** gamma_negative) * shifted.log()
    return tags * positive + (1 - tags) * negative


def prior_bias(facts: Facts) -> Tensor:
    """(C,) log-odds of each tag in the training clips, half a clip with it and half a clip without it added.

    So the first answers are as frequent as the tags (Lin et al. 2017, §4.1, with each class's own prior). InputError where
    the facts do not tell.
    """
    if not facts.counts.get(HEAD) or not facts.num_clips:
        raise InputError("videotag.tagger.prior_bias: no count of clips for each tag; train anew, or set it to false")
    there = torch.tensor(facts.counts[HEAD], dtype=torch.float64)
    return ((there + 0.5) / (facts.num_clips - there + 0.5)).log().float()
