"""videotag's tagger: pooled features of frames, and of sound, through fully connected layers to any number of tags."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.attention import initialise
from models.family import Batch, Facts
from models.transforms import LogMel, standardise
from models.videotag.config import TaggerConfig, TaggerModel, check_tagger
from models.videotag.data import HEAD
from models.videotag.losses import prior_bias, tag_loss
from models.videotag.pooling import build_pooling, inside

Streams = dict[str, tuple[Tensor, Tensor]]  # branch -> rows (B, T, D) in time, zeros after their lengths (B,)


class Tagger(nn.Module):
    """Tags of a clip from the features of its frames and, with the audio branch, from its sound where it has any."""

    def __init__(self, config: TaggerConfig, facts: Facts) -> None:
        check_tagger(config)
        super().__init__()
        model = config.model
        self.config, self.labels = config, facts.labels[HEAD]
        self.spectra = SecondSpectra(model, facts) if model.audio else None
        frames = build_pooling(model, model.feature_dim, config.max_frames, audio=False)
        self.branches = nn.ModuleDict({"frames": frames})
        if model.audio:
            self.branches["audio"] = build_pooling(model, model.num_mel_bins, model.audio_seconds, audio=True)
        widths = [sum(int(branch.dim) for branch in self.branches.values()), *model.hidden]  # pyright: ignore
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.output = nn.Linear(widths[-1], len(self.labels))
        initialise(self.hidden)
        initialise(nn.ModuleList([self.output]))
        if config.prior_bias:
            self.output.bias.data = prior_bias(facts)

    def forward(self, batch: Batch) -> Batch:
        """Training: the loss. Evaluation: logits (B, C), and what `segments` gives where the config asks for segments."""
        streams = self.streams(batch)
        if not self.training:
            answers = {"logits": self.classify(streams)}
            return answers | self.segments(streams, batch["times"]) if self.config.segment_frames else answers
        tags = batch["tags"]
        if "mix" in batch:
            streams = {name: mixed(*stream, batch["mix"]) for name, stream in streams.items()}
            tags = blend(tags, batch["mix"])
        return self.loss(self.classify(streams), tags, batch)

    def streams(self, batch: Batch) -> Streams:
        """What the branches read; a clip without sound has a length of 0 there."""
        streams = {"frames": (batch["features"].float(), batch["length"])}
        if self.spectra is not None:
            streams["audio"] = self.spectra(batch)
        return streams

    def classify(self, streams: Streams) -> Tensor:
        """(B, C) logits; a branch without rows adds zeros."""
        pooled = [self.branches[name](x, length) * (length > 0)[:, None] for name, (x, length) in streams.items()]
        x = torch.cat(pooled, -1)
        for i, layer in enumerate(self.hidden):
            x = layer(x).tanh() if i else functional.relu(layer(x))
        return self.output(x)

    def loss(self, logits: Tensor, tags: Tensor, batch: Batch) -> Batch:
        """The mean over classes and clips; with sum_loss their sum over the step's clips, `total_clips` () of them.

        The step's gradient is the mean over its clips: the sum is that times their number.
        """
        loss = tag_loss(logits, tags, self.config).mean()
        if self.config.sum_loss:
            return {"loss": loss * batch.get("total_clips", len(logits))}
        return {"loss": loss / logits.shape[1]}

    def segments(self, streams: Streams, times: Tensor) -> Batch:
        """The best classes of each segment of frames, tagged on its own with the sound of its seconds.

        segment_scores (B, S, K) probabilities, best first, segment_classes (B, S, K); segment_starts and segment_ends
        (B, S) seconds, both 0 where the clip has fewer segments.
        """
        (features, length), size = streams["frames"], self.config.segment_frames
        num = -(-features.shape[1] // size)
        short = num * size - features.shape[1]
        features, times = functional.pad(features, (0, 0, 0, short)), functional.pad(times, (0, short))
        lengths = (length[:, None] - torch.arange(num, device=length.device) * size).clamp(0, size)  # (B, S)
        starts, ends = spans(times.unflatten(1, (num, size)), lengths, frame_step(times, length))
        pieces: Streams = {"frames": (features.unflatten(1, (num, size)).flatten(0, 1), lengths.flatten())}
        if "audio" in streams:
            pieces["audio"] = heard(*streams["audio"], starts, ends)
        scores = self.classify(pieces).float().sigmoid().unflatten(0, (len(length), num))
        best, classes = scores.topk(min(self.config.topk, scores.shape[-1]), -1)
        found = {"segment_scores": best * (lengths > 0)[:, :, None], "segment_classes": classes}
        return found | {"segment_starts": starts, "segment_ends": ends}


class SecondSpectra(nn.Module):
    """Sound as a log-mel spectrum a second, the mean of its 10 ms frames."""

    def __init__(self, model: TaggerModel, facts: Facts) -> None:
        super().__init__()
        self.mel = LogMel(model.sample_rate, model.num_mel_bins)
        self.seconds, self.mean, self.deviation = model.audio_seconds, facts.mel_mean, facts.mel_std

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """wave (B, N) with wave_length and has_audio (B,) -> (B, seconds, mel), standardised, and how many are there (B,)."""
        mel = self.mel(batch["wave"])[:, : 100 * self.seconds]
        shift, length = self.mel.shift, self.mel.length
        valid = ((batch["wave_length"] - length) // shift + 1).clamp(0, mel.shape[1]) * batch["has_audio"]
        mel = standardise(mel, valid, self.mean, self.deviation)
        mel = functional.pad(mel, (0, 0, 0, 100 * self.seconds - mel.shape[1])).unflatten(1, (self.seconds, 100))
        second = torch.arange(self.seconds, device=mel.device)
        frames = (valid[:, None] - 100 * second).clamp(0, 100)
        return mel.sum(2) / frames.clamp(min=1)[:, :, None], (valid + 99) // 100


def blend(x: Tensor, mix: Tensor) -> Tensor:
    """Each clip's share `mix` (B,) of itself, the rest of the clip before it (mixup, Zhang et al. 2018)."""
    share = mix.view(-1, *[1] * (x.ndim - 1))
    return share * x + (1 - share) * x.roll(1, 0)


def mixed(x: Tensor, length: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B, T, D) blended with those of the clip before, and their lengths; where only one has a row it stays whole.

    Clips are mixed within what a process holds at once: with other micro-batches they find other partners.
    """
    there = inside(x, length)
    both = (there & there.roll(1, 0))[:, :, None]
    return torch.where(both, blend(x, mix), x + x.roll(1, 0)), torch.maximum(length, length.roll(1, 0))


# --- segments ------------------------------------------------------------------------------------------------------------


def frame_step(times: Tensor, length: Tensor) -> Tensor:
    """(B,) mean seconds from a frame of (B, T) to the next, jumps back not counted; 1 where there is no next one."""
    steps = times.diff(dim=1)
    ahead = (steps > 0) & (torch.arange(1, times.shape[1], device=times.device) < length[:, None])
    return torch.where(ahead.any(1), (steps * ahead).sum(1) / ahead.sum(1).clamp(min=1), 1.0)


def spans(times: Tensor, lengths: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end (B, S) of segments of frames shown at (B, S, F), of which (B, S) are there: half a step around them."""
    there = torch.arange(times.shape[2], device=times.device) < lengths[:, :, None]
    first = times.masked_fill(~there, torch.inf).amin(2) - step[:, None] / 2
    last = times.masked_fill(~there, -torch.inf).amax(2) + step[:, None] / 2
    some = lengths > 0
    return torch.where(some, first.clamp(min=0), 0.0), torch.where(some, last, 0.0)


def heard(x: Tensor, length: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The seconds of sound (B, T, D) that touch each segment (B, S), as rows of (B · S, T, D), and how many they are."""
    first = starts.floor().long().minimum(length[:, None])
    num = (ends.ceil().long().minimum(length[:, None]) - first).clamp(min=0)
    place = torch.arange(x.shape[1], device=x.device)
    rows = (first[:, :, None] + place).clamp(max=x.shape[1] - 1).flatten(1)
    taken = x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2])).unflatten(1, (starts.shape[1], -1))
    kept = (place < num[:, :, None])[..., None]
    return (taken * kept).flatten(0, 1), num.flatten()


def tiny_tagger() -> TaggerConfig:
    """The smallest config, for tests on a CPU."""
    model = TaggerModel(
        pooling="peephole", feature_dim=512, embedding_size=16, lstm_size=8, dropout=0.0, legacy_dropout=False,
        hidden=[32], clusters=4, groups=2, expansion=2, layers=1, heads=2, audio=True, sample_rate=16000,
        audio_seconds=2, num_mel_bins=16, model_name="none", head="fresh",
    )  # fmt: skip
    return TaggerConfig(
        model=model, max_frames=6, loss="bce", gamma=2.0, alpha=0.25, gamma_positive=0.0, gamma_negative=4.0,
        margin=0.05, sum_loss=False, prior_bias=False, mixup=0.0, frame_dropout=0.0, topk=5, segment_frames=3,
    )  # fmt: skip
