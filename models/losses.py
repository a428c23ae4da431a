"""Losses that families share, and which clips they see how often."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn import functional

from models.family import InputError


def reconstruction(predicted: Tensor, patches: Tensor, norm_pix: bool) -> Tensor:
    """(B,) mean squared error of each clip over its masked patches; predicted and patches (B, M, P).

    norm_pix: each target patch is (p - mean) / sqrt(var + 1e-6), var unbiased (MAE, He et al. 2022, eq. in §3).
    """
    target = patches.float()
    if norm_pix:
        variance, mean = torch.var_mean(target, -1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return (predicted.float() - target).square().mean((1, 2))


def info_nce(first: Tensor, second: Tensor, valid: Tensor, temperature: Tensor | float) -> Tensor:
    """Symmetric InfoNCE (CLIP, Radford et al. 2021) of unit vectors (B, E); pairs where `valid` (B,) is False do not count.

    Under torch.distributed give it what `gather_rows` returns. Every rank then computes the loss of the joined batch, and
    gradients flow back through the gathering, so that DDP's mean over ranks is its exact gradient.
    """
    logits = first.float() @ second.float().T / temperature
    logits = logits.masked_fill(~(valid[:, None] & valid[None, :]), -1e9)
    own = torch.arange(len(logits), device=logits.device)
    both = functional.cross_entropy(logits, own, reduction="none") + functional.cross_entropy(
        logits.T, own, reduction="none"
    )
    return (both * valid).sum() / 2 / valid.sum().clamp(min=1)


def gather_rows(local: Tensor) -> Tensor:
    """The rows of all ranks, in order of rank, unequal numbers allowed; with gradients for what has them."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local
    size = torch.tensor([len(local)])  # told from CPU to CPU, so that no GPU is waited for
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    lengths = [int(length) for length in sizes]
    padded = torch.cat([local, local.new_zeros(max(lengths) - len(local), *local.shape[1:])])
    if local.is_floating_point():
        parts = cast("tuple[Tensor, ...]", all_gather(padded))
    else:
        parts = tuple(torch.empty_like(padded) for _ in lengths)
        dist.all_gather(list(parts), padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def balance(annotations: Sequence[Mapping[str, Any]], heads: Sequence[str]) -> np.ndarray:
    """(N,) frequencies of clips by which every combination of the heads' labels that occurs comes equally often.

    A clip that lacks a label is as frequent as the mean clip that it agrees with on the others; one without any never comes.
    """
    labels = [tuple(annotation[head] for head in heads) for annotation in annotations]
    counts = Counter(label for label in labels if None not in label)
    if not counts:
        raise InputError(f"no training clip has {' and '.join(heads)} annotated; sampling cannot balance them")

    @cache
    def frequency(label: tuple[str | None, ...]) -> float:
        if not any(label):
            return 0.0
        known = {i for i, name in enumerate(label) if name is not None}
        like = [n for other, n in counts.items() if all(other[i] == label[i] for i in known)] or list(counts.values())
        return len(like) / sum(like)  # the mean of 1 / n over their clips

    return np.array([frequency(label) for label in labels])


def has_collapsed(embeddings: Tensor, loss: Tensor, num: int) -> Tensor:
    """1.0 where different clips look alike (mean cosine above 0.95) or InfoNCE stays within 1 % of ln(num), else 0.0."""
    unit = embeddings.detach().float()
    pairs = max(len(unit) * (len(unit) - 1), 1)
    cosine = (unit.sum(0).square().sum() - unit.square().sum()) / pairs
    chance = math.log(max(num, 2))
    return ((cosine > 0.95) | ((loss - chance).abs() < 0.01 * chance)).float()


def effective_number(counts: Sequence[int], beta: float) -> Tensor:
    """(C,) weights (1 - beta) / (1 - beta^n) of classes with n clips (Cui et al. 2019), scaled so that the mean clip has 1."""
    number = torch.tensor(counts, dtype=torch.float64)
    weights = (1 - beta) / (1 - beta**number)
    return (weights * number.sum() / (weights * number).sum()).float()


def log_prior(counts: Sequence[int]) -> Tensor:
    """(C,) log of the classes' shares, for logit adjustment (Menon et al. 2021): added to the logits in training alone."""
    number = torch.tensor(counts, dtype=torch.float64)
    return (number / number.sum()).log().float()


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(B,) T² KL(softmax(teacher / T) || softmax(student / T)) of (B, C) logits (Hinton et al. 2015, §2.1)."""
    ours = (student.float() / temperature).log_softmax(-1)
    theirs = (teacher.float() / temperature).log_softmax(-1)
    return temperature**2 * functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def annotated_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """(B,) cross-entropy of (B, C) logits, 0 for clips that nobody annotated (label -1).

    Its mean over all clips, annotated or not, is what micro-batches and processes can share out without changing it.
    """
    return functional.cross_entropy(
        logits.float(), labels, weights, ignore_index=-1, reduction="none", label_smoothing=smoothing
    )
