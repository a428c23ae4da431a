"""A training step of adatad and videotag against the same network put together from transformers' and torchvision's parts.

    python benchmarks/steps.py [adatad] [videotag]

adatad: VideoMAE-S over 32 frames of 160 pixels in chunks of 16, adapters in its blocks, and the detector. The peer is
transformers' VideoMAE, whose layers are called one by one, an adapter of two 1-D convolutions behind each, as AdaTAD's own
code has it; detector and loss are ours in both. Without augmentation, checkpointing and stochastic depth.
videotag: a ResNet-50 on 3 frames of 224 pixels of 2 clips with 3,396 tags. The peer is torchvision's with a classifier of
that size, its answers averaged over a clip's frames.

As in step.py: forward and backward on random inputs and weights, fp32 and bf16 autocast, timed in turns by CPU time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from transformers import VideoMAEConfig, VideoMAEModel

from benchmarks import table
from benchmarks.step import compare, whole
from benchmarks.table import Row
from benchmarks.tad_modes import Case, build_batch
from models.adatad.config import Augmentation, BackboneConfig
from models.adatad.model import Finetune
from models.family import Batch, Facts
from models.transforms import IMAGENET
from models.videotag.config import TsnConfig, TsnModel
from models.videotag.data import HEAD
from models.videotag.tsn import Tsn

FRAMES, PRESET = 32, "thumos_videomae_s"
CLIPS, TAGS = 2, 3396
TSN = TsnConfig(
    model=TsnModel(depth=50, model_name="none", head="fresh"), seg_num=3, seg_len=1, loss="bce", sampling="uniform",
    fps=1.0, max_frames=300, resize="keep", short_size=256, target_size=224, min_area=1.0, flip=False,
)  # fmt: skip


class PlainAdapter(nn.Module):
    """AdaTAD's adapter over sequences in time, one a place of the picture."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.depthwise = nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden)
        self.pointwise = nn.Conv1d(hidden, hidden, 1)
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, places: int) -> Tensor:
        """Tokens (chunks, N, dim) of one window."""
        z = functional.gelu(self.down(x))
        sequences = z.view(-1, places, z.shape[2]).permute(1, 2, 0)  # (places, hidden, steps)
        around = self.pointwise(self.depthwise(sequences))
        return x + self.gamma * self.up(z + around.permute(2, 0, 1).reshape(z.shape))


class PlainBackbone(nn.Module):
    """transformers' VideoMAE with an adapter behind each layer."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.chunk_frames, self.places = config.chunk_frames, (config.frame_size // config.patch_size) ** 2
        self.vit = VideoMAEModel(
            VideoMAEConfig(
                image_size=config.frame_size,
                patch_size=config.patch_size,
                num_frames=config.chunk_frames,
                tubelet_size=config.tubelet,
                hidden_size=config.dim,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                intermediate_size=config.mlp_dim,
            )
        ).requires_grad_(False)
        self.adapters = nn.ModuleList(PlainAdapter(config.dim, config.adapter_dim) for _ in range(config.num_layers))

    def forward(self, frames: Tensor) -> Tensor:
        """(1, T, 3, S, S) normalised -> (1, dim, steps)."""
        x = self.vit.embeddings(frames.unflatten(1, (-1, self.chunk_frames)).flatten(0, 1), None)
        for layer, adapter in zip(self.vit.encoder.layer, self.adapters, strict=True):
            found = layer(x)
            x = adapter(found[0] if isinstance(found, tuple) else found, self.places)
        return x.view(1, -1, self.places, x.shape[2]).mean(2).transpose(1, 2).float()


def adatad(quick: bool) -> Iterator[Row]:
    """End to end with adapters, as the presets train."""
    torch.manual_seed(0)
    config = Case(PRESET, "adapter", False, FRAMES, False).read()[0]
    backbone = replace(config.model.backbone, drop_path=0.0, chunks_at_once=0)
    config = replace(config, model=replace(config.model, backbone=backbone), augment=Augmentation(1.0, 0, 0.0, 0.0))
    batch = build_batch(config)
    module = Finetune(config, Facts({"label": [f"action {i}" for i in range(20)]}, 0.0, 1.0)).train()
    peer = PlainBackbone(backbone).train()
    pixels = torch.rand(1, FRAMES, 3, backbone.frame_size, backbone.frame_size)

    def composed() -> Tensor:
        features = functional.interpolate(peer(pixels), size=config.model.window, mode="linear")
        logits, offsets, valid = module.detector(features, batch["mask"])
        return module.loss(logits, offsets, valid, batch)["loss"]

    title = f"adatad step, VideoMAE-S with adapters, {FRAMES} frames"
    against = "transformers' VideoMAE with AdaTAD's adapter"
    yield from compare(title, 1, whole(module, batch), composed, against, ">= 1", 1 if quick else 3)


def videotag(quick: bool) -> Iterator[Row]:
    """The phase that trains the network on pictures."""
    torch.manual_seed(0)
    module = Tsn(TSN, Facts({HEAD: [f"tag {i}" for i in range(TAGS)]}, 0.0, 1.0)).train()
    peer = torchvision.models.resnet50(num_classes=TAGS).train()
    frames = torch.randint(0, 256, (CLIPS, TSN.seg_num, 3, TSN.target_size, TSN.target_size), dtype=torch.uint8)
    batch: Batch = {"frames": frames, "tags": (torch.rand(CLIPS, TAGS) < 0.001).float()}
    mean, deviation = torch.tensor(IMAGENET)[:, :, None, None]
    pixels = (frames.flatten(0, 1) / 255 - mean) / deviation

    def composed() -> Tensor:
        logits = peer(pixels).unflatten(0, frames.shape[:2]).mean(1)
        return functional.binary_cross_entropy_with_logits(logits.float(), batch["tags"])

    title = f"videotag tsn step, ResNet-50, {TSN.seg_num} frames"
    yield from compare(
        title, CLIPS, whole(module, batch), composed, "torchvision's ResNet-50", ">= 1", 1 if quick else 3
    )


PARTS = {"adatad": adatad, "videotag": videotag}

if __name__ == "__main__":
    table.main(__doc__, PARTS)
