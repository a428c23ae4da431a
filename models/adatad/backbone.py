"""VideoMAE (Tong et al. 2022) over chunks of a window, with the adapters of AdaTAD (Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth

from models.adatad.config import BackboneConfig
from models.attention import Block, initialise
from models.embed import resize_grid, sincos_in_turn, video_patches

# Mean and deviation of red, green and blue, from 0 to 255, that VideoMAE's checkpoints expect.
PIXELS = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


class Backbone(nn.Module):
    """Frames to a feature for each token step. Attention stays within a chunk; adapters alone look into its neighbours.

    What the mode trains: `adapter` an adapter behind each block, `side` adapters beside the blocks from `first_adapter`
    on, with no gradient through these, `full` the ViT itself, which has no adapters then, `frozen` nothing.
    """

    pixels: Tensor
    positions: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        dim, num_layers = config.dim, config.num_layers
        self.places = (config.frame_size // config.patch_size) ** 2  # of a token within the picture
        self.patch = nn.Linear(3 * config.tubelet * config.patch_size**2, dim)
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, mlp_dim=config.mlp_dim, key_bias=False) for _ in range(num_layers)
        )
        # The first block that has an adapter; num_layers = none has.
        self.first = {"adapter": 0, "side": config.first_adapter}.get(config.mode, num_layers)
        self.adapters = nn.ModuleList(Adapter(dim, config.adapter_dim) for _ in range(num_layers - self.first))
        self.register_buffer("pixels", torch.tensor(PIXELS)[:, :, None, None], persistent=False)  # (2, 3, 1, 1)
        self.register_buffer("positions", build_positions(config), persistent=False)
        for part in (self.patch, self.blocks):
            initialise(part)
            part.requires_grad_(config.mode == "full")

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, 3, S, S), uint8 or floats from 0 to 255 -> (B, dim, T / tubelet) float32, each the mean over a picture.

        T is a multiple of chunk_frames.
        """
        chunks = frames.unflatten(1, (-1, self.config.chunk_frames)).flatten(0, 1)
        groups = chunks.split(self.config.chunks_at_once or len(chunks))
        if self.config.mode in ("adapter", "full"):
            x = self.through(torch.cat([self.embed(group) for group in groups]), len(frames))
        else:
            outputs = zip(*[self.read(group) for group in groups], strict=True)
            x = self.beside([torch.cat(parts) for parts in outputs], len(frames))
        return x.view(len(frames), -1, self.places, self.config.dim).mean(2).transpose(1, 2).float()

    def embed(self, chunks: Tensor) -> Tensor:
        """(chunks, chunk_frames, 3, S, S) -> tokens (chunks, N, dim), in order of time, row, column."""
        x = (chunks.to(self.pixels.dtype) - self.pixels[0]) / self.pixels[1]
        return self.patch(video_patches(x, self.config.tubelet, self.config.patch_size)) + self.positions

    def through(self, x: Tensor, windows: int) -> Tensor:
        """Tokens (chunks, N, dim) through all blocks, with the adapters in between."""

        def layer(x: Tensor, kept: Tensor | None, block: nn.Module, adapters: Sequence[nn.Module]) -> Tensor:
            x = block(x, kept=kept)
            for adapter in adapters:
                x = x + self.change(adapter, x, windows)
            return x

        for depth, block in enumerate(self.blocks):
            x = self.run(layer, x, self.kept(x, depth), block, self.adapters[depth : depth + 1])
        return x

    def kept(self, x: Tensor, depth: int) -> Tensor | None:
        """(2, chunks, 1, 1) for the block at `depth` in training: 0 where a chunk skips one of its two branches."""
        rate = self.config.drop_path * depth / max(self.config.num_layers - 1, 1)
        if not (self.training and rate):
            return None
        return stochastic_depth(x.new_ones(2 * len(x), 1, 1), rate, "row").view(2, -1, 1, 1)

    def read(self, chunks: Tensor) -> list[Tensor]:
        """Of chunks, without gradients: the outputs (chunks, N, dim) of the blocks that adapters read, and of the last."""
        outputs: list[Tensor] = []
        with torch.no_grad():
            x = self.embed(chunks)
            for depth, block in enumerate(self.blocks):
                x = block(x)
                if depth >= min(self.first, self.config.num_layers - 1):
                    outputs.append(x)
        return outputs

    def beside(self, outputs: list[Tensor], windows: int) -> Tensor:
        """The last output, to which each adapter adds what it makes of its own."""
        x = outputs[-1]
        for output, adapter in zip(outputs, self.adapters, strict=False):  # frozen: no adapter
            x = x + self.run(self.change, adapter, output, windows)
        return x

    def change(self, adapter: nn.Module, x: Tensor, windows: int) -> Tensor:
        """What an adapter adds to tokens (chunks, N, dim), for which the chunks of a window lie behind each other."""
        return adapter(x.view(windows, -1, self.places, self.config.dim)).view_as(x)

    def run(self, layer: Callable[..., Tensor], *given: object) -> Tensor:
        """layer(*given), computed again in the backward pass where the config says so."""
        if self.config.checkpointing and torch.is_grad_enabled():
            # Nothing in a layer is random: what stochastic depth skips is drawn before.
            return cast(Tensor, checkpoint(layer, *given, use_reentrant=False, preserve_rng_state=False))
        return layer(*given)


class Adapter(nn.Module):
    """Temporal-Informative Adapter (AdaTAD §3.2): a bottleneck that looks one token step back and one ahead.

    It adds nothing at first.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, hidden)
        # Over time alone: as a 2-D convolution it takes tokens as they lie in memory, channels last.
        self.depthwise = nn.Conv2d(hidden, hidden, (3, 1), padding=(1, 0), groups=hidden)
        self.pointwise = nn.Linear(hidden, hidden)
        self.up = nn.Linear(hidden, dim)
        self.gamma = nn.Parameter(torch.ones(1))
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        nn.init.normal_(self.depthwise.weight, std=sqrt(2 / 3))
        nn.init.normal_(self.pointwise.weight, std=sqrt(2 / hidden))
        nn.init.zeros_(self.up.weight)
        for part in (self.down, self.depthwise, self.pointwise, self.up):
            assert part.bias is not None
            nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (windows, steps, places, dim) -> what is to be added to them."""
        z = functional.gelu(self.down(x))
        around = self.pointwise(self.depthwise(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.gamma * self.up(z + around)


def fixed_table(config: BackboneConfig) -> Tensor:
    """(steps · rows · columns, dim): VideoMAE's positions, which are not learned, for the grid of its checkpoint."""
    steps = config.chunk_frames // config.tubelet
    return sincos_in_turn(steps * config.pretrained_grid**2, config.dim)


def build_positions(config: BackboneConfig) -> Tensor:
    """The same for the grid of the frames here: each step's places resized as a picture, bicubic."""
    side = config.frame_size // config.patch_size
    steps = fixed_table(config).split(config.pretrained_grid**2)
    return torch.cat([resize_grid(step, side, side) for step in steps])
