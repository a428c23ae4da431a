"""Three ways from two encoders to one vector a clip. A modality that a clip lacks is left out of it, clip by clip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.attention import Block, initialise
from models.embed import sincos, sincos_grid
from models.wildlife.config import ModelConfig, sound_grid, video_grid

MODALITIES = ("video", "audio")
Streams = dict[str, Tensor]  # one tensor a modality


def mean_present(streams: Streams, present: Streams) -> Tensor:
    """Mean over the modalities that a clip has (present[name] (B,) bool) of (B, ...) each; zeros where it has none."""
    weights = {name: has.view(-1, *[1] * (streams[name].ndim - 1)) for name, has in present.items()}
    total = torch.stack([streams[name].where(weights[name], 0) for name in MODALITIES]).sum(0)
    return total / torch.stack([weights[name] for name in MODALITIES]).sum(0).clamp(min=1)


class Bottleneck(nn.Module):
    """Multimodal bottleneck transformer (MBT, Nagrani et al. 2021): modalities meet in a few shared tokens alone.

    Below `fusion_layer` a modality's layers see its own tokens: z_m = T_m(z_m). From there on [z_m, b_m] = T_m([z_m; b])
    for each modality from the same b, and b becomes the mean of b_m over the modalities that the clip has.
    """

    pooled = False  # takes the encoders' tokens (B, N, D)

    def __init__(self, config: ModelConfig, dims: dict[str, int]) -> None:
        super().__init__()
        dim, layers = config.fusion_hidden_dim, config.fusion_num_layers
        time, rows, columns = video_grid(config.video_encoder)
        cubes = sincos_grid(rows, columns, dim).repeat(time, 1) + sincos(time, dim).repeat_interleave(rows * columns, 0)
        places = {"video": cubes, "audio": sincos_grid(*sound_grid(config.audio_encoder), dim)}
        self.fusion_layer = config.fusion_layer
        self.enter = nn.ModuleDict(
            {m: nn.Sequential(nn.LayerNorm(dims[m]), nn.Linear(dims[m], dim)) for m in MODALITIES}
        )
        self.kind = nn.ParameterDict({m: nn.Parameter(0.02 * torch.randn(1, 1, dim)) for m in MODALITIES})
        self.places = nn.ParameterDict({m: nn.Parameter(places[m][None]) for m in MODALITIES})
        heads = config.fusion_num_heads
        self.blocks = nn.ModuleDict({m: nn.ModuleList(Block(dim, heads) for _ in range(layers)) for m in MODALITIES})
        shared = 0.02 * torch.randn(1, config.num_bottlenecks, dim)
        self.bottlenecks = nn.Parameter(shared) if config.fusion_layer < layers else None  # late fusion has none
        self.leave = nn.ModuleDict({m: nn.LayerNorm(dim, 1e-6) for m in MODALITIES})
        initialise(self)

    def embed(self, given: Streams) -> Streams:
        """The encoders' tokens at this width, with what and where they are."""
        return {m: self.enter[m](given[m]) + self.kind[m] + self.places[m] for m in MODALITIES}

    def step(self, depth: int, z: Streams, b: Tensor | None, present: Streams) -> tuple[Streams, Tensor | None]:
        """One layer of both modalities."""
        if depth < self.fusion_layer or b is None:
            return {m: self._block(m, depth)(z[m]) for m in MODALITIES}, b
        mixed = {m: self._block(m, depth)(torch.cat([z[m], b], 1)) for m in MODALITIES}
        after = {m: mixed[m][:, z[m].shape[1] :] for m in MODALITIES}
        return {m: mixed[m][:, : z[m].shape[1]] for m in MODALITIES}, mean_present(after, present)

    def _block(self, name: str, depth: int) -> Block:
        return cast(Block, cast(nn.ModuleList, self.blocks[name])[depth])

    def tokens(self, given: Streams, present: Streams) -> Streams:
        """Each modality's tokens (B, N, dim) after the last layer and its norm."""
        z = self.embed(given)
        b = None if self.bottlenecks is None else self.bottlenecks.expand(len(z["video"]), -1, -1)
        for depth in range(len(cast(nn.ModuleList, self.blocks["video"]))):
            z, b = self.step(depth, z, b, present)
        return {m: self.leave[m](z[m]) for m in MODALITIES}

    def forward(self, given: Streams, present: Streams) -> Tensor:
        """(B, N, D) a modality -> (B, dim): each modality's mean token, then the mean over the modalities there are."""
        return mean_present({m: z.mean(1) for m, z in self.tokens(given, present).items()}, present)

    def attentions(self, given: Streams, present: Streams) -> Iterator[Streams]:
        """Layer after layer (B, heads, N, N) a modality; from `fusion_layer` on the last places are the bottlenecks."""
        z = self.embed(given)
        b = None if self.bottlenecks is None else self.bottlenecks.expand(len(z["video"]), -1, -1)
        for depth in range(len(cast(nn.ModuleList, self.blocks["video"]))):
            mixes = depth >= self.fusion_layer and b is not None
            x = {m: torch.cat([z[m], b], 1) if mixes and b is not None else z[m] for m in MODALITIES}
            blocks = {m: self._block(m, depth) for m in MODALITIES}
            yield {m: blocks[m].attn.weights(blocks[m].norm1(x[m])) for m in MODALITIES}
            z, b = self.step(depth, z, b, present)


class Concat(nn.Module):
    """Both pooled vectors side by side through one layer; zeros stand for a missing one."""

    pooled = True  # takes the encoders' pooled vectors (B, D)

    def __init__(self, config: ModelConfig, dims: dict[str, int]) -> None:
        super().__init__()
        dim = config.fusion_hidden_dim
        self.enter = nn.ModuleDict(
            {m: nn.Sequential(nn.LayerNorm(dims[m]), nn.Linear(dims[m], dim)) for m in MODALITIES}
        )
        self.mix = nn.Linear(2 * dim, dim)
        initialise(self)

    def forward(self, given: Streams, present: Streams) -> Tensor:
        """(B, D) a modality -> (B, dim)."""
        both = [self.enter[m](given[m]).where(present[m][:, None], 0) for m in MODALITIES]
        return functional.gelu(self.mix(torch.cat(both, -1)))


class TwoToken(nn.Module):
    """What the seed calls MBT: a post-norm transformer over two tokens, the pooled vectors, then their mean and a norm.

    No bottlenecks and no order: its answer stays the same when the two change places.
    """

    pooled = True

    def __init__(self, config: ModelConfig, dims: dict[str, int]) -> None:
        super().__init__()
        dim = config.fusion_hidden_dim
        self.enter = nn.ModuleDict({m: nn.Linear(dims[m], dim) for m in MODALITIES})
        layer = nn.TransformerEncoderLayer(
            dim, config.fusion_num_heads, 4 * dim, config.dropout, activation="gelu", batch_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, config.fusion_num_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, given: Streams, present: Streams) -> Tensor:
        """(B, D) a modality -> (B, dim)."""
        tokens = torch.stack([self.enter[m](given[m]) for m in MODALITIES], 1)
        has = torch.stack([present[m] for m in MODALITIES], 1)
        mask = torch.zeros_like(has, dtype=tokens.dtype).masked_fill(~has & has.any(1, keepdim=True), float("-inf"))
        mixed = self.transformer(tokens, src_key_padding_mask=mask)
        return self.norm(mean_present({m: mixed[:, i] for i, m in enumerate(MODALITIES)}, present))


KINDS = {"mbt": Bottleneck, "concat": Concat, "twotoken": TwoToken}
