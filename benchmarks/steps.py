"""A training step of a family against the same network put together from transformers' and torchvision's parts.

    python benchmarks/steps.py [wildlife] [adatad] [videotag]

wildlife: fine-tuning as the preset `mammalps` has it. The peer is transformers' VideoMAE-B and torchvision's ResNet-18 on a
spectrogram that it finds ready, then PyTorch's transformer over the tokens of both and the two classifiers.

adatad: VideoMAE-S over 32 frames of 160 pixels in chunks of 16, adapters in its blocks, and the detector. The peer is
transformers' VideoMAE, whose layers are called one by one, an adapter of two 1-D convolutions behind each, as AdaTAD's own
code has it; detector and loss are ours in both, and both begin with uint8 frames. Without augmentation, checkpointing and
stochastic depth.
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
from models.adatad.backbone import PIXELS
from models.adatad.config import Augmentation, BackboneConfig
from models.adatad.model import Finetune
from models.family import Batch, Facts
from models.transforms import IMAGENET
from models.videotag.config import TsnConfig, TsnModel
from models.videotag.data import HEAD
from models.videotag.tsn import Tsn
from models.wildlife import FAMILY as WILDLIFE
from models.wildlife.config import FinetuneConfig as WildlifeConfig
from models.wildlife.config import ModelConfig as WildlifeModel
from models.wildlife.config import mel_frames
from models.wildlife.model import Finetune as WildlifeFinetune

FRAMES, PRESET = 32, "thumos_videomae_s"
CLIPS, TAGS = 2, 3396
TSN = TsnConfig(
    model=TsnModel(depth=50, model_name="none", head="fresh"), seg_num=3, seg_len=1, loss="bce", sampling="uniform",
    fps=1.0, max_frames=300, resize="keep", short_size=256, target_size=224, min_area=1.0, flip=False,
)  # fmt: skip


class PlainPair(nn.Module):
    """VideoMAE and a ResNet, joined by attention over the tokens of both."""

    def __init__(self, config: WildlifeModel, species: int, activities: int) -> None:
        super().__init__()
        video, dim = config.video_encoder, config.fusion_hidden_dim
        self.vit = VideoMAEModel(
            VideoMAEConfig(
                image_size=video.frame_size,
                num_frames=video.num_frames,
                hidden_size=config.video_feature_dim,
                num_hidden_layers=video.num_layers,
                num_attention_heads=video.num_heads,
                intermediate_size=4 * config.video_feature_dim,
            )
        )
        resnet = torchvision.models.resnet18()
        resnet.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
        self.resnet = nn.Sequential(*list(resnet.children())[:-2])
        self.enter = nn.ModuleList([nn.Linear(config.video_feature_dim, dim), nn.Linear(512, dim)])
        layer = nn.TransformerEncoderLayer(
            dim, config.fusion_num_heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.mix = nn.TransformerEncoder(layer, config.fusion_num_layers, enable_nested_tensor=False)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim // 2), nn.ReLU(), nn.Linear(dim // 2, classes))
            for classes in (species, activities)
        )

    def forward(self, pixels: Tensor, picture: Tensor) -> list[Tensor]:
        """(B, T, 3, S, S) normalised and (B, 1, mel, frames) -> logits (B, C) of both heads."""
        streams = (self.vit(pixels).last_hidden_state, self.resnet(picture).flatten(2).transpose(1, 2))
        tokens = torch.cat([enter(stream) for enter, stream in zip(self.enter, streams, strict=True)], 1)
        joined = self.mix(tokens).mean(1)
        return [head(joined) for head in self.heads]


def wildlife(quick: bool) -> Iterator[Row]:
    """Both modalities of a clip."""
    torch.manual_seed(0)
    config = build_wildlife()
    classes = {"species": 5, "activity": 11}
    facts = Facts({head: [f"{head} {i}" for i in range(n)] for head, n in classes.items()}, -5.0, 4.5)
    module = WildlifeFinetune(config, facts).train()
    peer = PlainPair(config.model, *classes.values()).train()
    video, audio = config.model.video_encoder, config.model.audio_encoder
    samples = round(audio.sample_rate * audio.audio_duration)
    shape = (1, video.num_frames, 3, video.frame_size, video.frame_size)
    batch: Batch = {
        "frames": torch.randint(0, 256, shape, dtype=torch.uint8),
        "wave": 0.1 * torch.randn(1, samples),
        "wave_length": torch.tensor([samples]),
        "has_video": torch.ones(1, dtype=torch.bool),
        "has_audio": torch.ones(1, dtype=torch.bool),
        **{head: torch.zeros(1, dtype=torch.long) for head in classes},
    }
    pixels, picture = torch.randn(shape), torch.randn(1, 1, audio.num_mel_bins, mel_frames(audio))

    def composed() -> Tensor:
        logits = peer(pixels, picture)
        return torch.stack([functional.cross_entropy(one.float(), batch["species"]) for one in logits]).sum()

    title = f"wildlife step, VideoMAE-B, {video.num_frames} frames, and ResNet-18, {audio.audio_duration:g} s"
    against = "transformers' VideoMAE + torchvision's ResNet + nn.TransformerEncoder"
    yield from compare(title, 1, whole(module, batch), composed, against, ">= 1", 1 if quick else 5)


def build_wildlife() -> WildlifeConfig:
    """The sizes of `mammalps`, without dropout."""
    config = WILDLIFE.phases["finetune"].tiny
    video = replace(config.model.video_encoder, num_layers=12, num_heads=12, num_frames=16, frame_size=224)
    audio = replace(config.model.audio_encoder, freeze_backbone=False, audio_duration=10.0, num_mel_bins=128)
    model = replace(
        config.model,
        video_encoder=replace(video, patch_size=16, tubelet=2),
        audio_encoder=audio,
        video_feature_dim=768,
        fusion_hidden_dim=512,
        fusion_num_layers=4,
        fusion_num_heads=8,
        fusion_layer=2,
        num_bottlenecks=4,
    )
    return replace(config, model=model)


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
    mean, deviation = torch.tensor(PIXELS)[:, :, None, None]

    def composed() -> Tensor:
        pixels = (batch["frames"].float() - mean) / deviation
        features = functional.interpolate(peer(pixels), size=config.model.window, mode="linear")
        logits, offsets, valid = module.detector(features, batch["mask"])
        return module.loss(logits, offsets, valid, batch)["loss"]

    title = f"adatad step, VideoMAE-S with adapters, {FRAMES} frames"
    against = "transformers' VideoMAE with AdaTAD's adapter"
    yield from compare(title, 1, whole(module, batch), composed, against, ">= 1", 1 if quick else 15)


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
        title, CLIPS, whole(module, batch), composed, "torchvision's ResNet-50", ">= 1", 1 if quick else 5
    )


PARTS = {"wildlife": wildlife, "adatad": adatad, "videotag": videotag}

if __name__ == "__main__":
    table.main(__doc__, PARTS)
