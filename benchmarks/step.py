"""What a step costs: t3av's pre-training and wildlife's fusion. The other families' steps are in steps.py and caption.py.

    python benchmarks/step.py [t3av] [wildlife]

t3av: a pre-training step against the same step without token dropping and against transformers' peers.
wildlife: the bottleneck fusion against as many layers of full attention over the tokens of both modalities.

A step is forward and backward on random inputs and random weights, in fp32 and under bf16 autocast. Each pair is timed in
turns, by the CPU time of all threads, which other programs on the machine change little; figures are medians, ratios hold
within a run only. The peers get float pixels already normalised, ours starts from uint8 frames and does that inside.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForPreTraining, ViTMAEConfig, ViTMAEForPreTraining

from benchmarks import table
from benchmarks.table import Row, rates
from models.attention import Block
from models.embed import take
from models.family import Batch, Facts
from models.losses import reconstruction
from models.masking import mask_sound, mask_video
from models.t3av import FAMILY
from models.t3av.config import ModelConfig, PretrainConfig, sound_grid, video_grid
from models.t3av.model import Decoder, Pretrain
from models.wildlife.config import ModelConfig as WildlifeConfig
from models.wildlife.fusion import MODALITIES, Bottleneck, Streams
from models.wildlife.model import tiny_model
from tasks.engine import distributed

FACTS = Facts({"label": []}, -5.0, 4.5)
Step = Callable[[], Tensor]  # returns the loss


@dataclass(frozen=True)
class Size:
    """A ViT and a batch of it that a laptop trains in seconds."""

    name: str
    dim: int
    heads: int
    clips: int


SIZES = (Size("ViT-S", 384, 6, 2), Size("ViT-B", 768, 12, 1))


def build_config(size: Size, frames: int, layers: tuple[int, int], decoder: tuple[int, int, int]) -> PretrainConfig:
    """224 px, 10 s; layers = (encoder, backbone), decoder = (width, layers, heads)."""
    model = ModelConfig(
        vit_model_name="none",
        dim=size.dim,
        encoder_layers=layers[0],
        encoder_heads=size.heads,
        num_frames=frames,
        frame_size=224,
        patch_size=16,
        audio_patch_size=16,
        tubelet=min(2, frames),
        sample_rate=16000,
        audio_duration=10.0,
        num_mel_bins=128,
        bb_layers=layers[1],
        bb_heads=size.heads,
    )
    shape = dict(zip(("dec_dim", "dec_layers", "dec_heads"), decoder, strict=True))
    return replace(FAMILY.phases["pretrain"].tiny, model=model, mask_ratio=0.75, audio_mask_ratio=0.75, **shape)


def build_batch(config: PretrainConfig, clips: int) -> Batch:
    """What the loader hands over: random frames, waveform and mask noise."""
    model = config.model
    samples = round(model.sample_rate * model.audio_duration)
    shape = (clips, model.num_frames, 3, model.frame_size, model.frame_size)
    return {
        "frames": torch.randint(0, 256, shape, dtype=torch.uint8),
        "wave": 0.1 * torch.randn(clips, samples),
        "wave_length": torch.full((clips,), samples),
        "has_video": torch.ones(clips, dtype=torch.bool),
        "has_audio": torch.ones(clips, dtype=torch.bool),
        "video_noise": torch.rand(clips, torch.Size(video_grid(model)).numel()),
        "audio_noise": torch.rand(clips, torch.Size(sound_grid(model)).numel()),
    }


# --- the peers -----------------------------------------------------------------------------------------------------------


def undropped(module: Pretrain, batch: Batch) -> Tensor:
    """The loss of `module` with masked places kept in the encoder, each as the same learned vector (the stem's bias)."""
    config, model = module.config, module.config.model
    video, audio = batch["video_noise"], batch["audio_noise"]
    splits = {
        "video": mask_video(video, video_grid(model), config.mask_ratio, config.video_mask_mode),
        "audio": mask_sound(audio, sound_grid(model), config.audio_mask_ratio, config.audio_mask_mode),
    }
    patches = {
        "video": module.video_encoder.patches(batch["frames"]),
        "audio": module.audio_encoder.patches(batch["wave"], batch["wave_length"]),
    }
    losses = []
    for name, (_, hidden) in splits.items():
        visible = torch.ones_like(batch[f"{name}_noise"]).scatter(1, hidden, 0)
        tokens = getattr(module, f"{name}_encoder")(patches[name] * visible[:, :, None])
        decoder: Decoder = getattr(module, f"{name}_decoder")
        everywhere = torch.arange(visible.shape[1]).expand_as(visible)
        predicted = decoder(module.backbone(tokens, name), everywhere, hidden)
        losses.append(reconstruction(predicted, take(patches[name], hidden), config.norm_pix_loss).mean())
    return torch.stack(losses).sum()


def build_videomae(config: PretrainConfig, batch: Batch) -> Step:
    """transformers' VideoMAE of the same sizes on the same frames with the same tokens masked."""
    model = config.model
    peer = VideoMAEForPreTraining(
        VideoMAEConfig(
            hidden_size=model.dim,
            num_hidden_layers=model.encoder_layers + model.bb_layers,
            num_attention_heads=model.encoder_heads,
            intermediate_size=4 * model.dim,
            decoder_hidden_size=config.dec_dim,
            decoder_num_hidden_layers=config.dec_layers,
            decoder_num_attention_heads=config.dec_heads,
            decoder_intermediate_size=4 * config.dec_dim,
        )
    ).train()
    pixels = batch["frames"].float() / 127.5 - 1
    noise = batch["video_noise"]
    hidden = mask_video(noise, video_grid(model), config.mask_ratio, config.video_mask_mode)[1]
    masked = torch.zeros_like(noise, dtype=torch.bool).scatter(1, hidden, True)
    return lambda: peer(pixels, bool_masked_pos=masked).loss


def build_vitmae(config: PretrainConfig, batch: Batch) -> Step:
    """transformers' ViTMAE of the same sizes on the clip's only frame."""
    model = config.model
    peer = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=model.dim,
            num_hidden_layers=model.encoder_layers + model.bb_layers,
            num_attention_heads=model.encoder_heads,
            intermediate_size=4 * model.dim,
            decoder_hidden_size=config.dec_dim,
            decoder_num_hidden_layers=config.dec_layers,
            decoder_num_attention_heads=config.dec_heads,
            decoder_intermediate_size=4 * config.dec_dim,
            mask_ratio=config.mask_ratio,
            norm_pix_loss=config.norm_pix_loss,
        )
    ).train()
    pixels = batch["frames"][:, 0].float() / 127.5 - 1
    return lambda: peer(pixels, noise=batch["video_noise"]).loss


# --- timing --------------------------------------------------------------------------------------------------------------


def seconds(step: Step, amp: bool) -> float:
    """CPU time of one forward and backward pass."""
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = step()
    loss.backward()
    return time.process_time() - began


def compare(title: str, clips: int, ours: Step, peer: Step, against: str, asked: str, repeats: int) -> Iterator[Row]:
    """Clips per second of both, in each precision, on one thread: several would count the time that they wait for each other."""
    torch.set_num_threads(1)
    distributed.keep_freed_memory()  # as in training, for both
    for kind, amp in (("fp32", False), ("bf16", True)):
        for step in (ours, peer):
            seconds(step, amp)  # the first pass allocates
        times: dict[Step, list[float]] = {ours: [], peer: []}
        for turn in range(repeats):
            for step in (ours, peer) if turn % 2 == 0 else (peer, ours):
                times[step].append(seconds(step, amp))
        mine, theirs = (statistics.median(times[step]) for step in (ours, peer))
        yield rates(f"{title}, {kind}", "clips a CPU s", clips / mine, clips / theirs, against, asked)


def t3av(quick: bool) -> Iterator[Row]:
    """Video and sound as the `vggsound` preset masks and decodes them, then each peer at its published decoder."""
    torch.manual_seed(0)
    for size in SIZES[: 1 if quick else None]:
        repeats = 1 if quick or size.dim > 500 else 3  # without dropping, ViT-B takes half a minute a step
        config = build_config(size, 16, (12, 6), (512, 2, 8))
        module, batch = Pretrain(config, FACTS).train(), build_batch(config, size.clips)
        title, peer = f"t3av pre-training, {size.name}, 16 frames + 10 s", lambda m=module, b=batch: undropped(m, b)
        yield from compare(title, size.clips, whole(module, batch), peer, "no token dropping", ">= 3", repeats)
        half = size.heads // 2
        config = replace(
            build_config(size, 16, (8, 4), (size.dim // 2, 4, half)), mask_ratio=0.9, train_audio_mae=False
        )
        module, batch = Pretrain(config, FACTS).train(), build_batch(config, size.clips)
        title, peer = f"t3av pre-training, {size.name}, 16 frames", build_videomae(config, batch)
        yield from compare(title, size.clips, whole(module, batch), peer, "transformers' VideoMAE", ">= 1", repeats)
        images = 4 * size.clips
        config = replace(build_config(size, 1, (8, 4), (512, 8, 16)), video_mask_mode="random", train_audio_mae=False)
        module, batch = Pretrain(config, FACTS).train(), build_batch(config, images)
        title, peer = f"t3av pre-training, {size.name}, 1 frame", build_vitmae(config, batch)
        yield from compare(title, images, whole(module, batch), peer, "transformers' ViTMAE", ">= 1", repeats)


# --- wildlife ------------------------------------------------------------------------------------------------------------


class FullAttention(nn.Module):
    """What a bottleneck saves: the same entrance, then layers in which all tokens of both attend to all.

    One set of weights for both modalities, so that it has the fewer kernels to launch; operations a token are as many.
    """

    def __init__(self, config: WildlifeConfig, entrance: Bottleneck) -> None:
        super().__init__()
        self.entrance = [entrance]  # in a list: its weights are not this module's
        dim, heads = config.fusion_hidden_dim, config.fusion_num_heads
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(config.fusion_num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, given: Streams) -> Tensor:
        """(B, N, D) a modality -> (B, dim)."""
        x = torch.cat(list(self.entrance[0].embed(given).values()), 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)


def build_fusion(seconds: float, layers: int, fusion_layer: int, bottlenecks: int) -> WildlifeConfig:
    """The sizes of the `mammalps` preset: VideoMAE-B's 1,568 tokens and the map of a ResNet-18 on 128 mel bins."""
    tiny = tiny_model()
    return replace(
        tiny,
        video_encoder=replace(tiny.video_encoder, num_frames=16, frame_size=224, patch_size=16, tubelet=2),
        audio_encoder=replace(tiny.audio_encoder, audio_duration=seconds, num_mel_bins=128),
        fusion_hidden_dim=512,
        fusion_num_heads=8,
        fusion_num_layers=layers,
        fusion_layer=fusion_layer,
        num_bottlenecks=bottlenecks,
    )


def wildlife(quick: bool) -> Iterator[Row]:
    """The preset's four layers, two of them fused, and all of them; with ten seconds of sound and with a minute."""
    torch.manual_seed(0)
    clips, dims = 2, {"video": 768, "audio": 512}
    for seconds_of_sound in (10.0,) if quick else (10.0, 60.0):
        for fusion_layer in (2, 0):
            config = build_fusion(seconds_of_sound, 4, fusion_layer, 4)
            fusion = Bottleneck(config, dims).train()
            peer = FullAttention(config, fusion).train()
            places = {m: fusion.places[m].shape[1] for m in MODALITIES}
            given: Streams = {m: torch.randn(clips, places[m], dims[m], requires_grad=True) for m in MODALITIES}
            present: Streams = {m: torch.ones(clips, dtype=torch.bool) for m in MODALITIES}
            tokens = f"{places['video']} + {places['audio']} tokens, {4 - fusion_layer} of 4 layers fused"
            ours, theirs = partial(mean_square, fusion, given, present), partial(mean_square, peer, given)
            title, repeats = f"wildlife's mbt fusion, {tokens}", 1 if quick else 3
            yield from compare(title, clips, ours, theirs, "attention over all tokens", ">= 1", repeats)


def mean_square(module: nn.Module, *given: Streams) -> Tensor:
    """A loss that reaches every weight."""
    return module(*given).square().mean()


def whole(module: nn.Module, batch: Batch) -> Step:
    """The training step that the engine makes."""
    return lambda: module(batch)["loss"]


PARTS = {"t3av": t3av, "wildlife": wildlife}

if __name__ == "__main__":
    table.main(__doc__, PARTS)
