"""Rows of features in time to one vector a clip. Rows past a clip's length change nothing in what it gets.

Every pooling takes (B, T, D) and lengths (B,), and has `dim`, the width of its (B, dim). A clip of length 0 gets numbers
that mean nothing, but are finite.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.attention import Block
from models.embed import sincos
from models.videotag.config import TaggerModel


def inside(x: Tensor, length: Tensor) -> Tensor:
    """(B, T) bool: which rows of (B, T, …) are there."""
    return torch.arange(x.shape[1], device=x.device) < length[:, None]


def mean(x: Tensor, length: Tensor) -> Tensor:
    """(B, T, D) -> (B, D) over the rows that are there; 0 where none are."""
    return (x * inside(x, length)[:, :, None]).sum(1) / length.clamp(min=1)[:, None]


def backwards(x: Tensor, length: Tensor) -> Tensor:
    """(B, T, D) with each clip's own rows in reverse; what follows them stays. Done twice it changes nothing."""
    rows = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    rows = torch.where(rows < length[:, None], length[:, None] - 1 - rows, rows)
    return x.gather(1, rows[:, :, None].expand_as(x))


class Dropout(nn.Module):
    """Dropout; `legacy` as Paddle 1 has it: training does not scale what it keeps, evaluation scales all by what is kept."""

    def __init__(self, share: float, legacy: bool) -> None:
        super().__init__()
        self.share, self.legacy = share, legacy

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        if not self.legacy:
            return functional.dropout(x, self.share, self.training)
        return x * (torch.rand_like(x) >= self.share) if self.training else x * (1 - self.share)


class AttentionPool(nn.Module):
    """A learned score for each row, without a bias; the rows' mean, weighted by the softmax of the scores."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1, bias=False)
        nn.init.xavier_uniform_(self.score.weight)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        """(B, T, D) -> (B, D)."""
        scores = self.score(x)[:, :, 0].float().masked_fill(~inside(x, length), -1e30)
        return (scores.softmax(1)[:, :, None] * x).sum(1)


# --- recurrent -----------------------------------------------------------------------------------------------------------


class PeepholeLSTM(nn.Module):
    """A bidirectional LSTM whose gates see the cell (Gers et al. 2002), in VideoTag's layout: (B, T, D) -> (B, T, 2H).

    The input's part, without a bias, is one product for all steps and both directions. Then a step of both directions is
    i = s(i + p_i c), f = s(f + p_f c), c' = f c + i tanh(g), o = s(o + p_o c'), h' = o tanh(c'), from zeros on, where
    g, i, f, o (in this order in all weights) are the input's part + h R + b. `bias` has b and then p_i, p_f, p_o.
    """

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.project = nn.Linear(dim, 8 * size, bias=False)  # forward, backward
        self.recurrent = nn.Parameter(torch.empty(2, size, 4 * size))
        self.bias = nn.Parameter(torch.zeros(2, 7 * size))
        for weight in (*self.project.weight.data.chunk(2), *self.recurrent.data):
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, 2H), forward and backward states of the same step side by side."""
        ahead, back = self.project(x).chunk(2, -1)
        gates = torch.stack([ahead, backwards(back, length)])  # (2, B, T, 4H)
        bias, peepholes = self.bias[:, None].split([4 * self.size, 3 * self.size], -1)
        gates, peeps = gates.float() + bias[:, :, None], peepholes.chunk(3, -1)
        hidden = cell = gates.new_zeros(2, len(x), self.size)
        steps = []
        for gate in gates.unbind(2):
            hidden, cell = self.step(gate + torch.bmm(hidden, self.recurrent).float(), cell, peeps)
            steps.append(hidden)
        first, second = torch.stack(steps, 2)
        return torch.cat([first, backwards(second, length)], -1)

    @staticmethod
    def step(gates: Tensor, cell: Tensor, peeps: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Hidden state and cell after a step; gates (2, B, 4H), cell (2, B, H), peepholes (2, 1, H)."""
        new, enter, forget, leave = gates.chunk(4, -1)
        to_enter, to_forget, to_leave = peeps
        enter, forget = (enter + to_enter * cell).sigmoid(), (forget + to_forget * cell).sigmoid()
        cell = forget * cell + enter * new.tanh()
        return (leave + to_leave * cell).sigmoid() * cell.tanh(), cell


class Direction(nn.Module):
    """One direction of PyTorch's LSTM: its kernels and its names of weights, where a compiler refuses nn.LSTM itself.

    It counts in float32, whatever is around it.
    """

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        blank = nn.LSTM(dim, size, batch_first=True)
        for name, weight in blank.named_parameters():
            self.register_parameter(name, weight)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, H)."""
        x = x.float()
        weights = [self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0]
        start = x.new_zeros(1, len(x), self.weight_hh_l0.shape[1])
        return torch.lstm(x, (start, start), weights, True, 1, 0.0, self.training, False, True)[0]


class FusedLSTM(nn.Module):
    """A bidirectional LSTM of cuDNN's kind, without peepholes: (B, T, D) -> (B, T, 2H)."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.ahead, self.back = Direction(dim, size), Direction(dim, size)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        """Forward and backward states of the same step side by side."""
        return torch.cat([self.ahead(x), backwards(self.back(backwards(x, length)), length)], -1)


class Recurrent(nn.Module):
    """VideoTag's: a tanh layer, an LSTM in both directions, dropout, attention that scores and weighs the dropped states."""

    def __init__(self, model: TaggerModel, dim: int) -> None:
        super().__init__()
        self.dim = 2 * model.lstm_size
        self.embed = nn.Linear(dim, model.embedding_size)
        nn.init.xavier_uniform_(self.embed.weight)
        nn.init.zeros_(self.embed.bias)
        kind = PeepholeLSTM if model.pooling == "peephole" else FusedLSTM
        self.lstm = kind(model.embedding_size, model.lstm_size)
        self.dropout = Dropout(model.dropout, model.legacy_dropout)
        self.attend = AttentionPool(self.dim)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        """(B, T, D) -> (B, dim)."""
        return self.attend(self.dropout(self.lstm(self.embed(x).tanh(), length)), length)


# --- without recurrence --------------------------------------------------------------------------------------------------


class Mean(nn.Module):
    """The baseline: the mean of what is there."""

    def __init__(self, model: TaggerModel, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        """(B, T, D) -> (B, D)."""
        return self.dropout(mean(x, length))


class Transformer(nn.Module):
    """Pre-norm blocks over the rows with fixed positions, then attention over what they made of them."""

    positions: Tensor

    def __init__(self, model: TaggerModel, dim: int, most: int) -> None:
        super().__init__()
        self.dim = model.embedding_size
        self.embed = nn.Linear(dim, self.dim)
        self.register_buffer("positions", sincos(most, self.dim), persistent=False)
        self.blocks = nn.ModuleList(Block(self.dim, model.heads) for _ in range(model.layers))
        self.norm = nn.LayerNorm(self.dim)
        self.dropout = nn.Dropout(model.dropout)
        self.attend = AttentionPool(self.dim)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        """(B, T, D), T not above `most` -> (B, dim)."""
        keys = inside(x, length.clamp(min=1))  # nobody attends to nothing
        x = self.embed(x) + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x, keys)
        return self.attend(self.dropout(self.norm(x)), length)


class RowNorm(nn.Module):
    """Batch norm over the rows (N, D) that are there; running statistics in evaluation, biased as in training."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """(N, D) and there (N,) bool -> (N, D)."""
        x, center, spread = x.float(), self.running_mean, self.running_var
        if self.training:
            shares = (there / there.sum().clamp(min=1))[:, None]
            center = (shares * x).sum(0)
            spread = (shares * (x - center).square()).sum(0)
            with torch.no_grad():
                self.running_mean.lerp_(center.detach(), 0.1)
                self.running_var.lerp_(spread.detach(), 0.1)
        return (x - center) * (spread + 1e-5).rsqrt() * self.weight + self.bias


class NextVlad(nn.Module):
    """NeXtVLAD (Lin et al. 2018): expanded rows in groups, each a soft member of clusters; residuals summed over time.

    Each group of a row has an attention; the sums of each cluster have norm 1; dropout, a layer of `embedding_size` and a
    context gate (squeeze and excitation, reduction 8) make the clip's vector of them.
    """

    def __init__(self, model: TaggerModel, dim: int, clusters: int, groups: int) -> None:
        super().__init__()
        self.dim, self.clusters, self.groups = model.embedding_size, clusters, groups
        wide = model.expansion * dim
        self.expand = nn.Linear(dim, wide)
        self.attend = nn.Linear(wide, groups)
        self.assign = nn.Linear(wide, groups * clusters, bias=False)
        self.assign_norm = RowNorm(groups * clusters)
        self.centers = nn.Parameter(torch.randn(clusters, wide // groups) / clusters**0.5)
        self.vlad_norm = RowNorm(clusters * wide // groups)
        self.dropout = nn.Dropout(model.dropout)
        self.reduce = nn.Linear(clusters * wide // groups, self.dim, bias=False)
        self.reduce_norm = RowNorm(self.dim)
        narrow = max(self.dim // 8, 1)
        self.gate = nn.Sequential(nn.Linear(self.dim, narrow), nn.ReLU(), nn.Linear(narrow, self.dim), nn.Sigmoid())

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        """(B, T, D) -> (B, dim)."""
        there = inside(x, length)
        sums = self.sums(self.expand(x), there)
        heard = length > 0
        vlad = self.vlad_norm(functional.normalize(sums, dim=-1).flatten(1), heard)
        reduced = self.reduce_norm(self.reduce(self.dropout(vlad)), heard)
        return reduced * self.gate(reduced)

    def sums(self, wide: Tensor, there: Tensor) -> Tensor:
        """Expanded rows (B, T, G·D') -> residuals (B, K, D') to the clusters' centres, over time and groups."""
        batch, num, _ = wide.shape
        attention = self.attend(wide).sigmoid() * there[:, :, None]  # (B, T, G)
        logits = self.assign_norm(self.assign(wide).flatten(0, 1), there.flatten())
        shares = logits.view(batch, num, self.groups, self.clusters).softmax(-1) * attention[..., None]
        shares, rows = shares.flatten(1, 2), wide.reshape(batch, num * self.groups, -1)  # (B, T·G, K), (B, T·G, D')
        return shares.transpose(1, 2).to(rows.dtype) @ rows - shares.sum(1)[:, :, None] * self.centers


def build_pooling(model: TaggerModel, dim: int, most: int, audio: bool) -> nn.Module:
    """The pooling of a branch: rows of `dim` features, `most` of them at the most. Sound has half of nextvlad's numbers."""
    if model.pooling == "nextvlad":
        clusters, groups = audio_vlad(model) if audio else (model.clusters, model.groups)
        return NextVlad(model, dim, clusters, groups)
    if model.pooling == "transformer":
        return Transformer(model, dim, most)
    return Mean(model, dim) if model.pooling == "mean" else Recurrent(model, dim)


def audio_vlad(model: TaggerModel) -> tuple[int, int]:
    """Clusters and groups for sound: half as many, and no more groups than divide a spectrum."""
    groups = gcd(max(model.groups // 2, 1), model.num_mel_bins * model.expansion)
    return max(model.clusters // 2, 1), groups
