"""BERT (Devlin et al. 2019) as avlformer uses it: it reads video and audio features once and writes words that see them.

Features never see words, so what words need of them, each layer's keys and values, is made once by `read`. Training goes
on from there with all words of a caption, writing with one word after the other: the same arithmetic, nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.avlformer.config import POSITIONS, TextConfig

EPS = 1e-12  # of every LayerNorm
SPREAD = 0.02  # BERT's deviation of random weights, at its width
WIDTH = 768


class Context(NamedTuple):
    """What words attend to of the features: keys and values of each layer (B, heads, N, D / heads), first layer first."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    present: Tensor  # (B, N) bool: the others are attended to by nobody


class Layer(nn.Module):
    """A post-norm transformer layer whose keys and values are handed to it, so that others may be among them."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        dim, wide = config.hidden_size, config.intermediate_size
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.query, self.key, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.norm1 = nn.LayerNorm(dim, EPS)
        self.fc1, self.fc2 = nn.Linear(dim, wide), nn.Linear(wide, dim)
        self.norm2 = nn.LayerNorm(dim, EPS)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, D / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def offer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of (B, N, D), each (B, heads, N, D / heads)."""
        return self.split(self.key(x)), self.split(self.value(x))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), attending to (B, heads, K, D / heads) where `mask` (B, 1, L or 1, K) allows it.

        The mask is bool, or float that is added to the scores.
        """
        share = self.dropout if self.training else 0.0
        out = functional.scaled_dot_product_attention(
            self.split(self.query(x)), keys, values, attn_mask=mask, dropout_p=share
        )
        out = self.proj(out.transpose(1, 2).flatten(2))
        x = self.norm1(x + functional.dropout(out, share, self.training))
        out = self.fc2(functional.gelu(self.fc1(x)))
        return self.norm2(x + functional.dropout(out, share, self.training))


class Head(nn.Module):
    """What stands between the last layer and the vocabulary."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.norm(functional.gelu(self.dense(x)))


class Bert(nn.Module):
    """BERT without pooler: `read` features, `embed` and `write` words that see them, `answer` with logits of words."""

    gathered_whole = True  # writing enters its layers as often as there are words, not equally often in all processes

    def __init__(self, config: TextConfig, vocab_size: int) -> None:
        super().__init__()
        dim = config.hidden_size
        self.dropout = config.dropout
        self.words = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(POSITIONS, dim)
        self.segments = nn.Embedding(2, dim)  # a caption is the first; the second is kept for weights made elsewhere
        self.norm = nn.LayerNorm(dim, EPS)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.head = Head(dim)
        self.decoder = nn.Linear(dim, vocab_size)
        # A narrower model sums fewer products: with 0.02 its layers would hand on next to nothing of the features.
        spread = SPREAD * (WIDTH / dim) ** 0.5
        for part in self.modules():
            if isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=SPREAD)
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=spread)
                nn.init.zeros_(part.bias)
        if config.tie_weights:
            self.decoder.weight = self.words.weight

    def read(self, features: Tensor, present: Tensor, links: Tensor | None) -> Context:
        """Features (B, N, D) that see those that are `present` (B, N) bool, as `links` (N, N) lets them.

        `links` is added to the scores (from row to column), None = all see all. Dropout of the features is done here. The
        features of a clip that has none at all see one another, and nothing else sees them. The last layer only offers.
        """
        x = functional.dropout(features, self.dropout, self.training)
        seen = (present | ~present.any(1, keepdim=True))[:, None, None, :]  # (B, 1, 1, N)
        mask = seen if links is None else links.to(x.dtype).where(seen, -torch.inf)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for depth, part in enumerate(self.layers):
            layer = cast(Layer, part)
            key, value = layer.offer(x)
            keys.append(key)
            values.append(value)
            if depth < len(self.layers) - 1:
                x = layer(x, key, value, mask if mask.dtype == torch.bool else mask.to(key.dtype))
        return Context(tuple(keys), tuple(values), present)

    def embed(self, ids: Tensor, places: Tensor) -> Tensor:
        """Wordpieces (B, L) at their places (B, L) from 0 on -> (B, L, D)."""
        x = self.words(ids) + self.positions(places) + self.segments.weight[0]
        return functional.dropout(self.norm(x), self.dropout, self.training)

    def write(self, words: Tensor, visible: Tensor, context: Context) -> Tensor:
        """Words (B, L, D) that see the present features and the words that `visible` (B, L, L) bool says -> (B, L, D).

        visible[b, i, j]: i sees j. One that sees nothing at all sees itself.
        """
        mask = torch.cat([context.present[:, None, :].expand(-1, words.shape[1], -1), visible], 2)  # (B, L, N + L)
        own = torch.eye(visible.shape[1], mask.shape[2], dtype=torch.bool, device=mask.device)
        own = own.roll(context.present.shape[1], 1)
        mask = (mask | (own & ~mask.any(2, keepdim=True)))[:, None]
        x = words
        for part, others, their in zip(self.layers, context.keys, context.values, strict=True):
            layer = cast(Layer, part)
            key, value = layer.offer(x)
            x = layer(x, torch.cat([others, key], 2), torch.cat([their, value], 2), mask)
        return x

    def answer(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)."""
        return self.decoder(self.head(hidden))
