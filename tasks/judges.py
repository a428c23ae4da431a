"""Models that judge captions, where their weights are given: CLIP, TriLip (with CLIP and PaSST), T5, and SPICE's program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, normalize, resize
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, CLIPConfig, CLIPModel, T5Config, T5EncoderModel

from models.caption_judges import CLIP_PROMPT, audible_sentence, audio_score, clip_score, legacy_audio_score
from models.entity_score import entities, entity_overlap, entity_score, legacy_likeness, likeness
from models.family import InputError
from models.passt import PaSST, Spectrum, kept, read_published
from models.trilip import TriLip, clip_image, clip_text, load_published
from models.weights import load_matching
from tasks import spice, storage
from tasks.data.loader import frame_columns
from tasks.data.prepared_store import PreparedSounds, open_stores
from tasks.pretrained import load_state

NONE = "none"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pixels
FRAMES = 32  # of a clip at most, evenly from first to last: as many as FAVDBench keeps
RATE = 32_000  # Hz that TriLip hears
PASST = {"num_mel_bins": 128, "num_frames": 1000, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "stride": 10}
LEFT_OUT = 4, 40  # rows and columns of PaSST's patches


@dataclass(frozen=True)
class Weights:
    """Section `evaluate.judges`: what judges of captions are made of; "none" leaves one out."""

    clip: str  # folder of openai/clip-vit-base-patch32 as transformers has it, its tokenizer included: CLIPScore
    trilip: str  # TriLip.bin of FAVDBench: AudioScore, with clip
    t5: str  # folder of t5-base as transformers has it, its tokenizer included: EntityScore
    spice: str  # spice-1.0.jar; see tasks/spice.py


class Judges:
    """All judges whose weights are given. They are read at once, so that what is wrong with them is known before."""

    def __init__(self, weights: Weights, device: str | torch.device) -> None:
        self.device = torch.device(device)
        if weights.trilip != NONE and weights.clip == NONE:
            raise InputError("evaluate.judges.trilip needs evaluate.judges.clip, the folder of the CLIP inside it")
        if weights.spice != NONE:
            spice.find(weights.spice)
        self.jar = weights.spice
        self.media = None if weights.clip == NONE else MediaJudge(weights.clip, weights.trilip)
        self.t5 = None if weights.t5 == NONE else read_t5(weights.t5)

    def judge(
        self, dataset: str, captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
    ) -> dict[str, np.ndarray]:
        """Name of a metric -> (N,) values in the captions' order, NaN where there is none; nothing without judges.

        Pictures and sounds are those in the stores of `dataset`, a clip at a time. In [0, 1] but for `clip_score`, in
        [0, 2.5], and `audio_score_legacy`, in [0, 100].
        """
        found: dict[str, np.ndarray] = {}
        texts, truths = list(captions.values()), [references[clip] for clip in captions]
        if self.media is not None:
            clips = watch(dataset, captions, hears=self.media.trilip is not None)
            found |= self.media.judge(tqdm(clips, "captions judged", len(captions), unit="clip"), self.device)
        if self.t5 is not None:
            found |= entity_scores(*self.t5, texts, truths, self.device)
        if self.jar != NONE:
            found["spice"] = np.array(list(spice.spice(self.jar, captions, references).values()), dtype=np.float64)
        return found


# --- pictures and sounds ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A clip and the caption to judge."""

    frames: np.ndarray | None  # (T, H, W, 3) uint8, of which the published AudioScore sees the first; None: no pictures
    wave: np.ndarray | None  # (N,) float32 in [-1, 1] at RATE, None where the clip is silent
    caption: str


def watch(dataset: str, captions: Mapping[str, str], hears: bool) -> Iterator[Judged]:
    """The clips that captions are about, in their order, out of the stores of a dataset; read one at a time.

    InputError where the stores lack a clip, and, where a judge hears, where their sounds are not waveforms at RATE.
    """
    folder = storage.DATA / dataset / "stores"
    pictures, sounds = open_stores(folder)
    for clip, caption in captions.items():
        frames, wave = None, None
        if stored := pictures.num_frames(clip):
            frames = pictures.decode(clip, frame_columns(stored, min(stored, FRAMES)))
        if hears and clip in sounds:
            if isinstance(sounds, PreparedSounds):
                raise InputError(f"{folder} holds spectrograms and TriLip hears waveforms; name a dataset of videos")
            wave, rate = sounds.read(clip)
            if rate != RATE:
                raise InputError(
                    f"clip {clip} is stored at {rate} Hz and TriLip hears {RATE} Hz; set stores.{dataset}.sample_rate "
                    f"to {RATE} and run the stores stage again, or set evaluate.judges.trilip to none"
                )
        yield Judged(frames, wave, caption)


class Ear(nn.Module):
    """PaSST behind its spectrum, at its published sizes; the patches it reads are evenly spread, 8 rows by 59 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = Spectrum(RATE, PASST["num_mel_bins"])
        self.net = PaSST(**PASST)
        self.patches = [kept(number, left, None) for number, left in zip(self.net.grid, LEFT_OUT, strict=True)]

    def forward(self, wave: Tensor) -> Tensor:
        """(B, N) in [-1, 1] at RATE, cut or filled with silence to PaSST's length -> tokens (B, T, D)."""
        length = PASST["num_frames"] * self.spectrum.shift
        wave = functional.pad(wave[:, :length], (0, max(0, length - wave.shape[1])))
        rows, columns = (place.to(wave.device) for place in self.patches)
        return self.net(self.spectrum(wave), rows, columns)

    def read(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state of this module from PaSST's tensors as published."""
        found, _ = read_published(self.net, state)
        return {f"net.{key}": value for key, (_, value) in found.items()}


class MediaJudge:
    """CLIPScore, and AudioScore with TriLip: captions beside what is seen and heard."""

    def __init__(self, clip: str, trilip: str) -> None:
        self.clip, self.tokenizer = _model(clip, CLIPConfig, CLIPModel)
        self.trilip = None if trilip == NONE else read_trilip(trilip, self.clip)
        self.names = ["clip_score"] + ["audio_score", "audio_score_legacy"] * (self.trilip is not None)

    def judge(self, clips: Iterable[Judged], device: torch.device) -> dict[str, np.ndarray]:
        """Name of a metric -> (N,) values of the clips, NaN where a clip has no picture, or no sound for AudioScore.

        `clip_score` and `audio_score` are means over the frames; `audio_score_legacy` is what the published code gives
        for the first frame, but for its gain and patches by chance. AudioScore reads the last sentence only.
        """
        (self.clip if self.trilip is None else self.trilip).to(device).eval()
        with torch.inference_mode():
            rows = [self._judge(clip, device) for clip in clips]
        values = np.array(rows, dtype=np.float64).reshape(-1, len(self.names))
        return dict(zip(self.names, values.T, strict=True))

    def _judge(self, clip: Judged, device: torch.device) -> list[float]:
        if clip.frames is None:
            return [np.nan] * len(self.names)
        pixels = clip_pixels(torch.from_numpy(clip.frames).to(device), self.clip.config.vision_config.image_size)
        image = clip_image(self.clip, pixels)  # (T, E)
        text = clip_text(self.clip, *self._tokens(CLIP_PROMPT + clip.caption, device))  # (1, E)
        found = [float(clip_score(image, text).mean())]
        if self.trilip is None:
            return found
        if clip.wave is None:
            return [*found, np.nan, np.nan]
        image = self.trilip.image_head(image)
        text = self.trilip.embed_text(*self._tokens(audible_sentence(clip.caption), device))
        audio = self.trilip.embed_audio(torch.from_numpy(clip.wave)[None].to(device))
        legacy = legacy_audio_score(image[0], text[0], audio[0], self.trilip.scales)
        return [*found, float(audio_score(image, text, audio).mean()), float(legacy)]

    def _tokens(self, text: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """(1, L) tokens of a text, cut at the length that CLIP reads, and their mask."""
        longest = self.clip.config.text_config.max_position_embeddings
        found = self.tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
        return found["input_ids"].to(device), found["attention_mask"].to(device)


def read_trilip(name: str, clip: CLIPModel) -> TriLip:
    """TriLip out of the published file `name`; InputError where it is none, or was made with another CLIP."""
    ear = Ear()
    trilip = TriLip(clip, ear, PASST["hidden_size"])
    state, _ = load_state(name)
    try:
        load_published(trilip, state, ear.read)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return trilip


def clip_pixels(frames: Tensor, size: int) -> Tensor:
    """(T, H, W, 3) uint8 -> (T, 3, size, size): shorter side resized (bicubic), middle cut out, CLIP's mean and deviation."""
    x = resize(frames.permute(0, 3, 1, 2), [size], InterpolationMode.BICUBIC, antialias=True)
    return normalize(center_crop(x, [size]).float() / 255, list(MEAN), list(STD))


# --- entities --------------------------------------------------------------------------------------------------------------


def read_t5(name: str) -> tuple[Any, Any]:
    """The encoder of a T5 in a folder, and its tokenizer."""
    return _model(name, T5Config, T5EncoderModel, fresh=("encoder.embed_tokens.",))  # that is tied to `shared`


def entity_scores(
    model: Any, tokenizer: Any, candidates: Sequence[str], references: Sequence[Sequence[str]], device: torch.device
) -> dict[str, np.ndarray]:
    """`entity_score` and `entity_score_legacy`, each (N,) in [0, 1], with a T5 and its tokenizer; NaN without nouns.

    T5 reads all nouns of a caption at once, and the mean of its states stands for them; legacy, it reads each by itself.
    """
    model.to(device).eval()

    def states(texts: list[str]) -> tuple[Tensor, Tensor]:
        found = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt").to(device)
        return model(**found).last_hidden_state, found["attention_mask"][..., None]

    rows = []
    with torch.inference_mode():
        for candidate, texts in zip(tqdm(candidates, "entities compared", unit="clip"), references, strict=True):
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
