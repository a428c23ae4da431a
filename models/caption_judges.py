"""Scores of a caption without a reference, from embeddings of the clip and of the caption: CLIPScore and AudioScore."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

CLIP_WEIGHT = 2.5  # Hessel et al. 2021
CLIP_PROMPT = "A photo depicts "  # before the caption
STEEPNESS, OFFSET = 10.0, 0.693  # c and b of the curve in the paper
LEGACY_OFFSET = 0.693179  # b in the published code


def curve(x: Tensor, offset: float = OFFSET) -> Tensor:
    """f(x) = a exp(-b exp(-10 x)), same shape: 0.5 at 0, 1 at 1; steep, as AudioScore has it. `offset` is b."""
    return torch.exp(-offset * torch.exp(-STEEPNESS * x)) / math.exp(-offset * math.exp(-STEEPNESS))


def clip_score(image: Tensor, text: Tensor) -> Tensor:
    """(...) CLIPScore in [0, 2.5] of CLIP's embeddings (..., E) of a frame and of CLIP_PROMPT with the caption."""
    return CLIP_WEIGHT * functional.cosine_similarity(image, text, dim=-1).clamp(min=0)


def audio_score(image: Tensor, text: Tensor, audio: Tensor) -> Tensor:
    """(...) AudioScore in [0, 1] by the paper's formula: the sound beside the caption and beside the frame, (..., E) each."""
    told = functional.cosine_similarity(audio, text, dim=-1)
    seen = functional.cosine_similarity(audio, image, dim=-1)
    return curve((told / 2 + seen / 2 + 1) / 2)


def legacy_audio_score(image: Tensor, text: Tensor, audio: Tensor, scales: Tensor) -> Tensor:
    """(...) AudioScore in [0, 100] as the published code computes it: TriLip's embeddings (..., E), its scales (2,).

    Against the paper's formula: dot products, not cosines, and the frame beside the caption, not beside the sound.
    """
    logit = scales[0] * ((image * text).sum(-1) + 1) / 2 + scales[1] * ((audio * text).sum(-1) + 1) / 2
    return 100 * curve(2 * (logit / 2 / 100 - 0.5), LEGACY_OFFSET)


def audible_sentence(caption: str) -> str:
    """The last sentence, where captions of FAVDBench tell what is heard: what AudioScore reads."""
    return caption.strip().split(". ")[-1]
