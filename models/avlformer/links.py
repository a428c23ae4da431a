"""Which features see which: the mask that AVLFormer learns, open where every feature sees every other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CLOSED = -10000.0  # what FAVDBench adds to a score in place of minus infinity: a row of such alone is still no NaN
OPEN = 4.0  # W at first: sigmoid(4) = 0.982
LEAST_OPEN = 0.5  # of a link that stays when links are all or nothing


class Links(nn.Module):
    """A = I + (1 - I) · sigmoid(W) over N features (AVLFormer, Shen et al. 2023): how open is the link row -> column.

    Scores are weighed by A where they are exponentiated, by adding log A: a link half open has half its share, and its
    gradient is finite however closed it is. `legacy` adds (1 - A) · -10000 as FAVDBench does, which closes every link
    below 0.999 and passes next to no gradient; there W starts from N(0, 1).
    """

    def __init__(self, num: int, legacy: bool) -> None:
        super().__init__()
        self.legacy = legacy
        self.weight = nn.Parameter(torch.empty(num, num))
        nn.init.normal_(self.weight, 0.0 if legacy else OPEN, 1.0 if legacy else 0.02)

    def bias(self, hard: bool) -> Tensor:
        """(N, N) to be added to scores, 0 on the diagonal; `hard`: links of 0.5 on are whole, the others closed."""
        itself = torch.eye(len(self.weight), dtype=torch.bool, device=self.weight.device)
        if hard:
            return torch.zeros_like(self.weight).where((self.weight.sigmoid() >= LEAST_OPEN) | itself, CLOSED)
        added = (1 - self.weight.sigmoid()) * CLOSED if self.legacy else functional.logsigmoid(self.weight)
        return added.masked_fill(itself, 0.0)

    def openness(self) -> Tensor:
        """() the sparse loss: mean of (1 - I) · sigmoid(W) over all N² entries, the zeros of the diagonal among them."""
        open_ = self.weight.sigmoid()
        return (open_.sum() - open_.diagonal().sum()) / open_.numel()
