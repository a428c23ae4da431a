"""Models that judge captions, where their weights are given: CLIP, TriLip (with CLIP and PaSST) and T5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, normalize, resize
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, CLIPConfig, CLIPModel, T5Config, T5EncoderModel

from models.caption_judges import CLIP_PROMPT, audible_sentence, audio_score, clip_score, legacy_audio_score
from models.entity_score import entities, entity_overlap, entity_score, legacy_likeness, likeness
from models.family import InputError
from models.trilip import TriLip, clip_image, clip_text, load_published
from models.weights import load_matching
from tasks.pretrained import load_state

NONE = "none"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pixels


@dataclass(frozen=True)
class Weights:
    """What judges are made of; "none" leaves a judge out."""

    clip: str  # folder of openai/clip-vit-base-patch32 as transformers has it, its tokenizer included: CLIPScore
    trilip: str  # TriLip.bin of FAVDBench: AudioScore, with clip
    t5: str  # folder of t5-base as transformers has it, its tokenizer included: EntityScore
    spice: str  # spice-1.0.jar; see tasks/spice.py


@dataclass(frozen=True)
class Ear:
    """The sound encoder of TriLip, which belongs to a family."""

    module: nn.Module  # waveforms (1, N) at the rate of the clips' -> tokens (1, T, width): PaSST behind its spectrum
    width: int
    read: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]  # PaSST's tensors as published -> a state of `module`


@dataclass(frozen=True)
class Judged:
    """A clip and the caption to judge."""

    id: str
    frames: np.ndarray  # (T, H, W, 3) uint8, of which the published AudioScore sees the first
    wave: np.ndarray | None  # (N,) float32 in [-1, 1], None where the clip is silent
    caption: str


class Judges:
    """CLIPScore and AudioScore of captions; which of them, the weights tell."""

    def __init__(self, weights: Weights, ear: Ear | None, device: str | torch.device) -> None:
        self.clip = self.trilip = None
        self.device = torch.device(device)
        if weights.clip == NONE:
            if weights.trilip != NONE:
                raise InputError("params.yaml: evaluate.trilip needs evaluate.clip, the folder of the CLIP inside it")
            return
        self.clip, self.tokenizer = _model(weights.clip, CLIPConfig, CLIPModel)
        if weights.trilip != NONE:
            assert ear is not None, "TriLip hears with the encoder of a family"
            self.trilip = TriLip(self.clip, ear.module, ear.width)
            state, _ = load_state(weights.trilip)
            try:
                load_published(self.trilip, state, ear.read)
            except InputError as error:
                raise InputError(f"{weights.trilip}: {error}") from None
            self.trilip.to(self.device).eval()
        self.clip.to(self.device).eval()

    def judge(self, clips: Sequence[Judged]) -> dict[str, np.ndarray]:
        """Name of a metric -> (N,) values of the clips, NaN where a clip has no sound; empty without weights.

        `clip_score` in [0, 2.5] and `audio_score` in [0, 1] are means over the frames; `audio_score_legacy` in [0, 100]
        is what the published code gives for the first frame. AudioScore reads the last sentence only.
        """
        if self.clip is None:
            return {}
        names = ["clip_score"] + ["audio_score", "audio_score_legacy"] * (self.trilip is not None)
        with torch.inference_mode():
            rows = [self._judge(clip) for clip in tqdm(clips, desc="captions judged", unit="clip")]
        values = np.array(rows, dtype=np.float64).reshape(-1, len(names))
        return dict(zip(names, values.T, strict=True))

    def _judge(self, clip: Judged) -> list[float]:
        assert self.clip is not None
        pixels = clip_pixels(torch.from_numpy(clip.frames).to(self.device), self.clip.config.vision_config.image_size)
        image = clip_image(self.clip, pixels)  # (T, E)
        text = clip_text(self.clip, *self._tokens(CLIP_PROMPT + clip.caption))  # (1, E)
        found = [float(clip_score(image, text).mean())]
        if self.trilip is None:
            return found
        if clip.wave is None:
            return [*found, np.nan, np.nan]
        image = self.trilip.image_head(image)
        text = self.trilip.embed_text(*self._tokens(audible_sentence(clip.caption)))
        audio = self.trilip.embed_audio(torch.from_numpy(clip.wave)[None].to(self.device))
        legacy = legacy_audio_score(image[0], text[0], audio[0], self.trilip.scales)
        return [*found, float(audio_score(image, text, audio).mean()), float(legacy)]

    def _tokens(self, text: str) -> tuple[Tensor, Tensor]:
        """(1, L) tokens of a text, cut at the length that CLIP reads, and their mask."""
        assert self.clip is not None
        longest = self.clip.config.text_config.max_position_embeddings
        found = self.tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
        return found["input_ids"].to(self.device), found["attention_mask"].to(self.device)


def clip_pixels(frames: Tensor, size: int) -> Tensor:
    """(T, H, W, 3) uint8 -> (T, 3, size, size): shorter side resized (bicubic), middle cut out, CLIP's mean and deviation."""
    x = resize(frames.permute(0, 3, 1, 2), [size], InterpolationMode.BICUBIC, antialias=True)
    return normalize(center_crop(x, [size]).float() / 255, list(MEAN), list(STD))


def entity_scores(
    name: str, candidates: Sequence[str], references: Sequence[Sequence[str]], device: str | torch.device
) -> dict[str, np.ndarray]:
    """`entity_score` and `entity_score_legacy`, each (N,) in [0, 1], with the T5 of the folder `name`; NaN without nouns.

    T5 reads all nouns of a caption at once, and the mean of its states stands for them; legacy, it reads each by itself.
    """
    model, tokenizer = _model(
        name, T5Config, T5EncoderModel, fresh=("encoder.embed_tokens.",)
    )  # that is tied to `shared`
    model.to(device).eval()

    def states(texts: list[str]) -> tuple[Tensor, Tensor]:
        found = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt").to(device)
        return model(**found).last_hidden_state, found["attention_mask"][..., None]

    rows = []
    with torch.inference_mode():
        for candidate, texts in zip(candidates, references, strict=True):
            own, truth = entities(candidate), entities(texts[0])
            if not own or not truth:
                rows.append((np.nan, np.nan))
                continue
            together, there = states([" ".join(own), " ".join(truth)])
            means = (together * there).sum(1) / there.sum(1)
            each, _ = states([*own, *truth])
            rows.append((likeness(means[0], means[1]), legacy_likeness(each[: len(own)], each[len(own) :])))
    alike = np.array(rows, dtype=np.float64).reshape(-1, 2)
    recall = entity_overlap(candidates, references)["entity_recall"]
    return {
        "entity_score": entity_score(recall, alike[:, 0]),
        "entity_score_legacy": entity_score(recall, alike[:, 1], legacy=True),
    }


def _model(name: str, kind: type[Any], build: Callable[[Any], Any], fresh: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """A model of transformers and its tokenizer, with weights as models of tasks/pretrained.py are found."""
    state, _ = load_state(name)
    try:
        config, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        told = " ".join(str(error).split())[:160]
        raise InputError(f"{name}: its config or tokenizer cannot be read ({told}); give the whole folder") from None
    if not isinstance(config, kind):
        raise InputError(f"{name}: the config of a {config.model_type}; a {kind.model_type} was expected")
    model = build(config)
    try:
        load_matching(model, state, fresh)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return model, tokenizer
