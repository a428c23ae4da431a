"""From frames and waveform to tokens and a pooled vector: VideoMAE or a small 3-D CNN, and a ResNet on log-mel."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import cast

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, ResNet

from models.attention import Block, initialise
from models.embed import sincos_in_turn, video_patches
from models.family import Batch, Facts
from models.transforms import IMAGENET, LogMel, hide_bands, standardise
from models.wildlife.config import AudioConfig, ModelConfig, VideoConfig, mel_frames, video_grid


class VideoEncoder(nn.Module):
    """Frames to tokens (B, N, D) and a pooled vector (B, D), which is the final norm of the raw tokens' mean.

    Takes uint8 or floats in [0, 1], in the layout that the config declares, any number of frames.
    """

    scale: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config: VideoConfig = config.video_encoder
        kinds = {"videomae": VideoMAE, "cnn3d": Cnn3d}
        self.body = kinds[self.config.kind](config)
        self.norm = nn.LayerNorm(config.video_feature_dim, 1e-5)  # `fc_norm` of transformers' classifier
        self.register_buffer("scale", torch.tensor(IMAGENET)[:, :, None, None], persistent=False)  # (2, 3, 1, 1)

    def pixels(self, frames: Tensor) -> Tensor:
        """(B, T, 3, S, S) or (B, 3, T, S, S) as declared -> (B, num_frames, 3, S, S), normalised."""
        x = frames if self.config.layout == "btchw" else frames.transpose(1, 2)
        given, wanted = x.shape[1], self.config.num_frames
        if given != wanted:
            x = x[:, [round(i * (given - 1) / max(wanted - 1, 1)) for i in range(wanted)]]
        x = x if x.is_floating_point() else x.float() / 255
        return (x - self.scale[0]) / self.scale[1]

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens after the norm, in order of time, row, column, and the pooled vector."""
        return self.read(self.pixels(frames))

    def read(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The same of what `pixels` gives."""
        tokens = self.body(pixels)
        return self.norm(tokens), self.norm(tokens.mean(1))

    def attentions(self, frames: Tensor) -> Iterator[Tensor]:
        """(B, heads, N, N) a layer, from the first; none for the CNN. Only for looking at: training never holds them."""
        return self.body.attentions(self.pixels(frames)) if isinstance(self.body, VideoMAE) else iter(())


class VideoMAE(nn.Module):
    """The encoder of VideoMAE (Tong et al. 2022) without masking: a ViT over cubes of pixels with fixed positions."""

    positions: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        video, dim = config.video_encoder, config.video_feature_dim
        self.tubelet, self.size = video.tubelet, video.patch_size
        self.patch = nn.Linear(3 * video.tubelet * video.patch_size**2, dim)
        table = sincos_in_turn(torch.Size(video_grid(video)).numel(), dim)
        self.register_buffer("positions", table, persistent=False)
        self.blocks = nn.ModuleList(Block(dim, video.num_heads, 1e-12) for _ in range(video.num_layers))
        initialise(self)

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, T, 3, S, S) -> (B, N, D) before the first layer."""
        return self.patch(video_patches(pixels, self.tubelet, self.size)) + self.positions

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, T, 3, S, S) normalised -> (B, N, D), without a norm at the end."""
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return x

    def attentions(self, pixels: Tensor) -> Iterator[Tensor]:
        """(B, heads, N, N) of each layer in turn: all of them together would be gigabytes a clip."""
        x = self.embed(pixels)
        for block in cast("list[Block]", list(self.blocks)):
            yield block.attn.weights(block.norm1(x))
            x = block(x)


class Cnn3d(nn.Module):
    """A small R(2+1)D (Tran et al. 2018), one residual block a stage; group norm, so that no clip sees its neighbours."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = (32, 32, 64, 128, config.video_feature_dim)
        self.stem = nn.Sequential(
            nn.Conv3d(3, 32, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), group_norm(32), nn.ReLU()
        )
        stages = zip(widths[:-1], widths[1:], (1, 2, 2, 2), strict=True)
        self.stages = nn.ModuleList(Residual(inside, outside, stride) for inside, outside, stride in stages)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, T, 3, S, S) normalised -> (B, N, D) of a map that is an 8th as long and a 16th as wide and high."""
        x = self.stem(pixels.transpose(1, 2))
        for stage in self.stages:
            x = stage(x)
        return x.flatten(2).transpose(1, 2)


class Residual(nn.Module):
    """Two factorised convolutions beside a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*factorised(inside, outside, stride), group_norm(outside), nn.ReLU())
        self.second = nn.Sequential(*factorised(outside, outside, 1), group_norm(outside))
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv3d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inside, T, H, W) -> (B, outside, T / stride, H / stride, W / stride), rounded up."""
        return functional.relu(self.second(self.first(x)) + self.shortcut(x))


def factorised(inside: int, outside: int, stride: int) -> list[nn.Module]:
    """A 3 x 3 x 3 convolution as one in space and one in time, with as many weights (Tran et al. 2018, §3.5)."""
    middle = 27 * inside * outside // (9 * inside + 3 * outside)
    space = nn.Conv3d(inside, middle, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
    time = nn.Conv3d(middle, outside, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False)
    return [space, group_norm(middle), nn.ReLU(), time]


def group_norm(width: int) -> nn.GroupNorm:
    """Eight groups, or fewer where the width is no multiple of eight."""
    return nn.GroupNorm(gcd(8, width), width)


def build_resnet(name: str) -> ResNet:
    """torchvision's by its name, or resnet10: one block a stage, for students."""
    return ResNet(BasicBlock, [1, 1, 1, 1]) if name == "resnet10" else getattr(torchvision.models, name)(weights=None)


class AudioEncoder(nn.Module):
    """torchvision's ResNet on the log-mel picture (pitch x time): its last map as tokens (B, N, D), and their mean (B, D).

    Its batch norm sees a process's micro-batch: with other sizes of that, training differs in more than rounding.
    """

    def __init__(self, config: AudioConfig, facts: Facts) -> None:
        super().__init__()
        self.mel = LogMel(config.sample_rate, config.num_mel_bins)
        self.num_frames, self.step = mel_frames(config), config.mel_step
        self.mean, self.deviation = facts.mel_mean, facts.mel_std
        self.resnet = build_resnet(config.model_name)
        self.dim = self.resnet.fc.in_features
        self.resnet.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        stem = self.resnet.conv1
        self.resnet.conv1 = nn.Conv2d(1, stem.out_channels, 7, 2, 3, bias=False)
        nn.init.kaiming_normal_(self.resnet.conv1.weight, mode="fan_out", nonlinearity="relu")

    def picture(self, batch: Batch) -> Tensor:
        """(B, 1, mel, columns), standardised; what follows the end of a sound is 0.

        Of `wave` (B, N) with `wave_length` (B,), or of `mel` (B, frames, mel) with `mel_length` (B,) as it was prepared;
        `bands` (B, 4) are hidden where there are any.
        """
        if "mel" in batch:
            mel, valid = batch["mel"], batch["mel_length"]
        else:
            mel = self.mel(batch["wave"])[:, : self.num_frames]
            valid = ((batch["wave_length"] - self.mel.length) // self.mel.shift + 1).clamp(min=0)
        mel = standardise(mel, valid, self.mean, self.deviation)
        mel = hide_bands(mel, batch["bands"]) if "bands" in batch else mel
        return functional.avg_pool1d(mel.transpose(1, 2), self.step)[:, None]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens, in order of pitch, time, and the pooled vector."""
        return self.read(self.picture(batch))

    def read(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """The same of what `picture` gives."""
        net = self.resnet
        # Channels last make convolutions faster; weights stay as they are stored and FSDP shards them.
        x = net.maxpool(net.relu(net.bn1(net.conv1(picture.to(memory_format=torch.channels_last)))))
        tokens = net.layer4(net.layer3(net.layer2(net.layer1(x)))).flatten(2).transpose(1, 2)
        return tokens, tokens.mean(1)
