"""What each point of the pyramid should answer, how far off it is, and how its answers become segments again.

ActionFormer (Zhang et al. 2022, §3.3): a point answers for a segment in whose middle it lies and whose extent suits its
level. Point i of level l stands at i 2^l grid steps. Segments are (B, G, 2), padded to G with the class -1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from models.family import Batch

FIRST_RANGE = 4.0  # grid steps: the longest way to a border on the first level; it doubles with each
TIE = 1e-3  # segments whose lengths differ by less share a point


class Points(NamedTuple):
    """The P points of all levels, those of the first level first."""

    positions: Tensor  # (P,) grid steps
    strides: Tensor  # (P,) grid steps between the points of a point's level
    ranges: Tensor  # (P, 2) from and to which distance to the further border a point answers


class Targets(NamedTuple):
    """What the points should answer."""

    classes: Tensor  # (B, P, C) 0 or 1
    offsets: Tensor  # (B, P, 2) to start and end, in strides; to be read where positive
    positive: Tensor  # (B, P) bool


def points(window: int, num_levels: int) -> Points:
    """The points of a window of so many grid steps, float32."""
    positions, strides, ranges = [], [], []
    for level in range(num_levels):
        stride = 2**level
        reach = FIRST_RANGE * stride
        number = window // stride
        positions.append(torch.arange(number).float() * stride)
        strides.append(torch.full((number,), float(stride)))
        between = (reach / 2 if level else 0.0, reach if level < num_levels - 1 else math.inf)
        ranges.append(torch.tensor(between).expand(number, 2))
    return Points(torch.cat(positions), torch.cat(strides), torch.cat(ranges))


# --- targets -------------------------------------------------------------------------------------------------------------


def distances(at: Points, segments: Tensor) -> Tensor:
    """(B, P, G, 2) from each point back to each segment's start and on to its end; negative outside."""
    positions = at.positions[:, None]
    return torch.stack([positions - segments[:, None, :, 0], segments[:, None, :, 1] - positions], -1)


def lengths_of_candidates(at: Points, segments: Tensor, classes: Tensor, mask: Tensor, radius: float) -> Tensor:
    """(B, P, G) lengths of the segments that a point may answer for, infinite for all others.

    A point lies strictly within the segment, less than `radius` strides of its level from the centre, and the distance to
    the further border is in its level's range, both ends included. `mask` (B, W): the window's valid grid steps.
    """
    way = distances(at, segments)
    further, nearer = way.amax(-1), way.amin(-1)
    off_centre = (way[..., 0] - way[..., 1]).abs() / 2
    suits = (nearer > 0) & (off_centre < radius * at.strides[:, None])
    suits &= (further >= at.ranges[:, :1]) & (further <= at.ranges[:, 1:])
    suits &= (classes >= 0)[:, None] & valid(at, mask)[..., None]
    return torch.where(suits, way.sum(-1), math.inf)


def valid(at: Points, mask: Tensor) -> Tensor:
    """(B, P) which points stand on valid grid steps."""
    return mask[:, at.positions.long()]


def assign(at: Points, segments: Tensor, classes: Tensor, mask: Tensor, num_classes: int, radius: float) -> Targets:
    """Each point's targets: borders of the shortest segment that it may answer for, classes of all that are as short.

    Of segments exactly as short, the first in order gives the borders.
    """
    lengths = lengths_of_candidates(at, segments, classes, mask, radius)
    shortest, chosen = lengths.amin(-1, keepdim=True), lengths.argmin(-1)
    positive = shortest[..., 0].isfinite()
    as_short = (lengths <= shortest + TIE) & positive[..., None]
    named = classes[..., None] == torch.arange(num_classes, device=classes.device)  # (B, G, C)
    offsets = distances(at, segments).gather(2, chosen[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
    return Targets((as_short.float() @ named.float() > 0).float(), offsets / at.strides[:, None], positive)


def count_positive(at: Points, segments: Tensor, classes: Tensor, mask: Tensor, radius: float) -> Tensor:
    """() float32: how many points answer for one of a single window's segments (G, 2); what the loss is divided by."""
    lengths = lengths_of_candidates(at, segments[None], classes[None], mask[None], radius)
    return lengths.isfinite().any(-1).sum().float()


# --- losses --------------------------------------------------------------------------------------------------------------


def focal(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss of each answer (Lin et al. 2017, eq. 5); targets from 0 to 1 of the logits' shape."""
    logits = logits.float()
    probability = logits.sigmoid()
    missed = probability + targets - 2 * probability * targets  # 1 - p_t
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * missed**gamma * functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def distance_iou(ours: Tensor, theirs: Tensor) -> Tensor:
    """DIoU (Zheng et al. 2020) of segments that offsets (…, 2) from one point give; one of both is not empty."""
    ours = ours.float()
    shared, enclosing = torch.minimum(ours, theirs).sum(-1), torch.maximum(ours, theirs).sum(-1)
    union = ours.sum(-1) + theirs.sum(-1) - shared
    between = ((ours - theirs)[..., 1] - (ours - theirs)[..., 0]) / 2  # of the centres
    return shared / union - (between / enclosing).square()


def smooth(targets: Tensor, smoothing: float) -> Tensor:
    """Targets (…, C) moved towards one class of C and none."""
    return targets if smoothing == 0 else targets * (1 - smoothing) + smoothing / (targets.shape[-1] + 1)


def loss_sums(
    logits: Tensor, offsets: Tensor, mask: Tensor, targets: Targets, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Focal loss over valid points (B, P) and classes, and 1 - DIoU over positive points, summed over the batch."""
    loss_cls = focal(logits, smooth(targets.classes, smoothing)) * mask[..., None]
    wanted = torch.where(
        targets.positive[..., None], targets.offsets, 1.0
    )  # no empty segment, no gradient that is no number
    loss_reg = (1 - distance_iou(offsets, wanted)) * targets.positive
    return loss_cls.sum(), loss_reg.sum()


# --- answers -------------------------------------------------------------------------------------------------------------


def decode(at: Points, offsets: Tensor) -> Tensor:
    """(B, P, 2) segments in grid steps."""
    sides = torch.tensor([-1.0, 1.0], device=offsets.device)
    return at.positions[:, None] + sides * offsets.float() * at.strides[:, None]


def to_seconds(segments: Tensor, batch: Batch) -> Tensor:
    """(B, N, 2) grid steps of windows -> seconds of their videos, cut to these; batch has start, step, duration (B,)."""
    start, step, duration = (batch[key][:, None, None] for key in ("start", "step", "duration"))
    return torch.minimum((start + segments * step).clamp(min=0), duration)


def best_answers(segments: Tensor, logits: Tensor, mask: Tensor, min_score: float, number: int) -> Batch:
    """The `number` = K best answers of each window, over points and classes, that score above `min_score`; best first.

    Of segments (B, P, 2), logits (B, P, C) and valid points (B, P): segments (B, K, 2), scores (B, K), classes (B, K).
    Where there are fewer, segments and scores are 0 and classes -1.
    """
    scores = (logits.float().sigmoid() * mask[..., None]).flatten(1)
    scores, places = scores.topk(min(number, scores.shape[1]))
    missing = number - scores.shape[1]
    scores, places = functional.pad(scores, (0, missing)), functional.pad(places, (0, missing))
    point, label = places // logits.shape[-1], places % logits.shape[-1]
    kept = scores > min_score
    return {
        "segments": segments.gather(1, point[..., None].expand(-1, -1, 2)) * kept[..., None],
        "scores": scores * kept,
        "classes": torch.where(kept, label, -1),
    }
