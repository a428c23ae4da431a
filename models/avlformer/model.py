"""avlformer's module: what is seen and heard, BERT that reads it and writes the description, and the three losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.avlformer.bert import Bert, Context
from models.avlformer.config import (
    AudioConfig,
    Augment,
    Decoding,
    FinetuneConfig,
    ModelConfig,
    TextConfig,
    VideoConfig,
    check,
    mel_frames,
    num_audio_tokens,
    num_video_tokens,
)
from models.avlformer.data import CLS, HEAD, MASK, SEP
from models.avlformer.links import Links
from models.avlformer.swin import VideoSwin
from models.avlformer.writing import Words, write
from models.family import Batch, Facts, ParameterGroup
from models.passt import PaSST, Spectrum
from models.transforms import IMAGENET, hide_bands


class Finetune(nn.Module):
    """Describes a clip from its frames and its sound, or from whichever of the two it has."""

    scale: Tensor

    def __init__(self, config: FinetuneConfig, facts: Facts) -> None:
        check(config)
        super().__init__()
        model = config.model
        video, audio, text = model.video, model.audio, model.text
        self.config, self.words = config, special_words(facts.labels[HEAD])
        self.video = VideoSwin(video)
        self.video_proj = nn.Linear(self.video.width, model.feature_dim)
        self.spectrum = Spectrum(audio.sample_rate, audio.num_mel_bins)
        sizes = audio.hidden_size, audio.num_layers, audio.num_heads, audio.stride
        self.audio = PaSST(audio.num_mel_bins, mel_frames(audio), *sizes)
        self.audio_proj = nn.Linear(audio.hidden_size, model.feature_dim)
        self.features = nn.Linear(model.feature_dim, text.hidden_size)
        self.bert = Bert(text, self.words.vocab_size)
        num = num_video_tokens(video) + num_audio_tokens(audio)
        self.links = None if model.mask == "none" else Links(num, model.legacy)
        self.register_buffer("scale", torch.tensor(IMAGENET)[:, :, None, None], persistent=False)  # (2, 3, 1, 1)
        self.audio.requires_grad_(not audio.freeze)

    def forward(self, batch: Batch) -> Batch:
        """Losses in training mode. Otherwise tokens (B, max_length), 0 after [SEP], their confidence (B,) in [0, 1] and
        has_sound (B,).
        """
        context = self.context(batch)
        if self.training:
            return self.losses(batch, context)
        tokens, confidence = write(self.bert, context, self.config.decoding, self.words, clip_rows(batch))
        return {"tokens": tokens, "confidence": confidence, "has_sound": batch["has_audio"]}

    def context(self, batch: Batch) -> Context:
        """What words see of the clips: video tokens by time, row and column, then those of sound by pitch and time."""
        pixels = (batch["frames"].float() / 255 - self.scale[0]) / self.scale[1]
        seen = self.video_proj(self.video(pixels))  # (B, V, F)
        spectrum = self.spectrum(batch["wave"], batch.get("mel_ends"))  # (B, mel, frames)
        if "bands" in batch:
            # FAVDBench hides by the 0 of the logarithm, which is 0.9 here and louder than most of a clip.
            level = 0.9 if self.config.model.legacy else 0.0
            spectrum = hide_bands((spectrum - level).transpose(1, 2), batch["bands"]).transpose(1, 2) + level
        rows, columns = batch["rows"], batch["columns"]
        heard = self.audio_proj(self.audio(spectrum, rows, columns))  # (B, A, F)
        heard = heard / (heard.norm(dim=-1, keepdim=True) / heard.shape[-1] ** 0.5 + 1e-6)
        inside = self.audio.heard(self.spectrum.num_frames(batch["wave_length"]), rows, columns)
        if self.config.model.legacy:
            inside = torch.ones_like(inside)
        has_video, has_audio = batch["has_video"][:, None], batch["has_audio"][:, None]
        present = torch.cat([has_video.expand(-1, seen.shape[1]), has_audio, inside & has_audio], 1)
        hard = self.config.model.mask == "hard" and not self.training
        links = None if self.links is None else self.links.bias(hard)
        return self.bert.read(self.features(torch.cat([seen, heard], 1)), present, links)

    def losses(self, batch: Batch, context: Context) -> Batch:
        """What training minimises (specs/avlformer.md §3), with the mean over the step's words, asked or foretold.

        lm_weight · foretelling each next wordpiece + (1 - lm_weight) · naming those that are hidden + sparse_weight · openness.
        """
        config = self.config
        foretold, named = (self.legacy_logits if config.model.legacy else self.logits)(batch, context)
        # FAVDBench hides words before it takes what is to be foretold, so that there it is [MASK]s, too.
        text = batch["read"] if config.model.legacy else batch["text"]
        wanted = batch["text"].gather(1, batch["asked"]) * (batch["asked"] > 0)
        lm = self.surprise(foretold, text[:, 1:], batch, "words")
        mask = self.surprise(named, wanted, batch, "asked")
        loss = config.lm_weight * lm + (1 - config.lm_weight) * mask
        parts = {"loss_lm": lm.detach(), "loss_mask": mask.detach()}
        if self.links is not None:
            openness = self.links.openness()
            loss, parts["loss_sparse"] = loss + config.sparse_weight * openness, openness.detach()
        return {"loss": loss, **parts}

    def logits(self, batch: Batch, context: Context) -> tuple[Tensor, Tensor]:
        """Of each word but the last, having seen it and those before it; and of each [MASK], in the place of a word that is
        asked for, having seen the words before that, as in writing: (B, L - 1, V) and (B, M, V).
        """
        text = batch["text"]
        ids, places, visible = questions(text, batch["asked"], self.words.mask)
        hidden = self.bert.write(self.bert.embed(ids, places), visible, context)
        length = text.shape[1]
        answers = self.bert.answer(torch.cat([hidden[:, : length - 1], hidden[:, length:]], 1))
        return answers[:, : length - 1], answers[:, length - 1 :]

    def legacy_logits(self, batch: Batch, context: Context) -> tuple[Tensor, Tensor]:
        """The same shapes as FAVDBench has them: both of one caption in which the words that are asked for are hidden."""
        read, asked = batch["read"], batch["asked"]
        places = torch.arange(read.shape[1], device=read.device).expand_as(read)
        visible = (places[:, :, None] >= places[:, None, :]) & (batch["text"] != 0)[:, None, :]
        hidden = self.bert.write(self.bert.embed(read, places), visible, context)
        answers = self.bert.answer(hidden)
        return answers[:, :-1], answers.gather(1, asked[:, :, None].expand(-1, -1, answers.shape[-1]))

    def surprise(self, logits: Tensor, wanted: Tensor, batch: Batch, counted: str) -> Tensor:
        """() mean cross-entropy of (B, L, V) over wordpieces `wanted` (B, L), 0 for none, of all that the step counts."""
        total = functional.cross_entropy(
            logits.flatten(0, 1).float(),
            wanted.flatten(),
            ignore_index=0,
            reduction="sum",
            label_smoothing=self.config.label_smoothing,
        )
        if f"total_{counted}" in batch:
            return total / batch[f"total_{counted}"] * (batch["total_clips"] / len(wanted))
        return total / batch[f"num_{counted}"].sum()


def clip_rows(batch: Batch) -> Tensor:
    """(B,) int64 numbers by which drawing tells clips apart: their rows in the split, or in the batch where it has none."""
    return batch.get("row", torch.arange(len(batch["frames"]), device=batch["frames"].device))


def questions(text: Tensor, asked: Tensor, mask: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and places (B, L + M) of a caption's words (B, L) and of a [MASK] for each place in `asked` (B, M), and who sees whom.

    Words see those up to themselves, a [MASK] the words before its place and itself: (B, L + M, L + M) bool. 0 in text is no
    word; a [MASK] at place 0, which fills up, sees itself alone.
    """
    places = torch.arange(text.shape[1], device=text.device).expand_as(text)
    there = (text != 0)[:, None, :]
    before = (places[:, :, None] >= places[:, None, :]) & there  # (B, L, L)
    lower = (places[:, None, :] < asked[:, :, None]) & there  # (B, M, L)
    itself = torch.eye(asked.shape[1], dtype=torch.bool, device=text.device).expand(len(text), -1, -1)
    none = torch.zeros_like(lower).transpose(1, 2)
    visible = torch.cat([torch.cat([before, none], 2), torch.cat([lower, itself], 2)], 1)
    return torch.cat([text, torch.full_like(asked, mask)], 1), torch.cat([places, asked], 1), visible


def special_words(names: list[str]) -> Words:
    """Ids of the wordpieces that are no words, and of the end of a sentence."""
    cls, sep, mask = (names.index(name) for name in (CLS, SEP, MASK))
    return Words(cls=cls, sep=sep, mask=mask, stop=names.index(".") if "." in names else -1, vocab_size=len(names))


def parameter_groups(config: FinetuneConfig) -> dict[str, ParameterGroup]:
    """Video Swin learns more slowly."""
    return {"video.": ParameterGroup(config.backbone_lr, decay_all=False)}


def tiny() -> FinetuneConfig:
    """The smallest, for tests on a CPU."""
    return FinetuneConfig(
        model=ModelConfig(
            model_name="none",
            video=VideoConfig("none", False, False, 2, 32, 8, [1, 1], [1, 2], [1, 2, 2], 0.0),
            audio=AudioConfig("none", False, 16000, 0.4, 32, 16, 1, 2, 10, 0, 0),
            text=TextConfig("none", 16, 2, 2, 32, 40, 0.0, False),
            feature_dim=16,
            mask="learned",
            legacy=False,
        ),
        augment=Augment(1.0, [0.0, 0.0], 0, 0, 0, 0, 0),
        mask_prob=0.5,
        max_masked=75,
        masking="random",
        parts=["noun", "verb"],
        parts_share=0.8,
        lm_weight=0.1,
        sparse_weight=0.1,
        label_smoothing=0.0,
        backbone_lr=1.0,
        decoding=Decoding(20, 1, 1.0, 1.0, False, 1.0, 0, 1.0, 0),
    )
