"""avlformer's samples: captions in wordpieces, which of them are asked for, and what the loader's workers make of a clip."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor

from models import passt
from models.avlformer.config import AudioConfig, Augment, FinetuneConfig, mel_frames, sound_grid
from models.family import Batch, ClipSpec, Facts, InputError, Sample
from models.parts_of_speech import tags, word_class
from models.samples import sound
from models.transforms import draw_bands, resized_crop

HEAD = "wordpiece"  # name of the label map: the position of a wordpiece is its id
PAD, UNK, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def clip(config: FinetuneConfig) -> ClipSpec:
    """What is read of a clip."""
    video, audio = config.model.video, config.model.audio
    return ClipSpec(video.num_frames, audio.sample_rate, audio.seconds)


# --- words ---------------------------------------------------------------------------------------------------------------


def labels(annotations: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, list[str]]:
    """The dataset's own list of wordpieces (BERT's vocab.txt); without one, the words of the training captions.

    Each of their letters is a wordpiece then, too, at the beginning of a word and within, so that other words can be spelt.
    """
    if classes:
        lacking = [name for name in SPECIAL if name not in classes]
        if lacking or classes[0] != PAD:
            raise InputError(f"vocab.txt: it must begin with {PAD} and have {', '.join(SPECIAL)}; give BERT's")
        return {HEAD: list(classes)}
    captions = [clip["caption"] for clip in annotations if clip.get("caption")]
    if not captions:
        raise InputError("no clip of the train split has a caption")
    counts = Counter(word for caption in captions for word in words_of(caption))
    letters = sorted({letter for word in counts for letter in word})
    words = sorted(counts, key=lambda word: (-counts[word], word))
    return {HEAD: list(dict.fromkeys([*SPECIAL, *words, *letters, *(f"##{letter}" for letter in letters)]))}


def words_of(caption: str) -> list[str]:
    """The words and marks of a caption as BERT parts them before it looks for wordpieces, in lower case."""
    plain = BertNormalizer(lowercase=True).normalize_str(html.unescape(caption))
    return [word for word, _ in BertPreTokenizer().pre_tokenize_str(plain)]


def build_tokenizer(facts: Facts) -> Tokenizer:
    """BERT's uncased one over the label map. A caption's own "[MASK]" is three words to it, and no mask."""
    vocabulary = {name: i for i, name in enumerate(facts.labels[HEAD])}
    reader = Tokenizer(WordPiece(vocabulary, unk_token=UNK))
    reader.normalizer, reader.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()  # pyright: ignore
    return reader


def read_caption(reader: Tokenizer, caption: str, max_length: int) -> tuple[list[int], list[int]]:
    """Ids of [CLS], the caption's wordpieces and [SEP], `max_length` at most; and the number of each one's word, -1 for both."""
    found = reader.encode(html.unescape(caption), add_special_tokens=False)
    ids, words = found.ids[: max_length - 2], cast("list[int]", found.word_ids[: max_length - 2])
    ends = [int(reader.token_to_id(name) or 0) for name in (CLS, SEP)]
    return [ends[0], *ids, ends[1]], [-1, *words, -1]


# --- which words are asked for -------------------------------------------------------------------------------------------


def choose_asked(
    caption_words: Sequence[str], piece_words: Sequence[int], config: FinetuneConfig, rng: np.random.Generator
) -> np.ndarray:
    """Places (M,) ascending of the wordpieces that are asked for: never [CLS], perhaps [SEP] (specs/avlformer.md §3).

    `piece_words` (L,) is the number of each wordpiece's word, -1 for [CLS] and [SEP].
    """
    length = len(piece_words)
    number = min(max(round(config.mask_prob * length), 1), config.max_masked, length - 1)
    order = 1 + rng.permutation(length - 1)
    if config.masking == "parts":
        kinds = [word_class(tag) for tag in tags(caption_words)]
        fits = np.array([piece_words[place] >= 0 and kinds[piece_words[place]] in config.parts for place in order])
        first = order[fits][: int(number * config.parts_share)]
        order = np.concatenate([first, order[~np.isin(order, first)]])
    return np.sort(order[:number])


def hide(ids: np.ndarray, asked: np.ndarray, mask: int, vocab_size: int, rng: np.random.Generator) -> np.ndarray:
    """The caption with its asked wordpieces hidden as in BERT: 80 % [MASK], 10 % any wordpiece, 10 % as they are."""
    hidden, draw = ids.copy(), rng.random(len(asked))
    hidden[asked[draw < 0.8]] = mask
    others = asked[draw >= 0.9]
    hidden[others] = rng.integers(0, vocab_size, len(others))
    return hidden


# --- a clip --------------------------------------------------------------------------------------------------------------


def transform(config: FinetuneConfig, facts: Facts, training: bool) -> Callable[[Sample], Batch]:
    """frames (T, 3, S, S) uint8, wave (N,) with wave_length, has_video and has_audio; which rows and columns of patches of
    sound are read; text (L,) ids with asked (M,) places in it, of clips that have a caption. Texts differ in length.
    """
    model, augment = config.model, config.augment
    num_samples = round(model.audio.sample_rate * model.audio.seconds)
    reader, vocab_size = build_tokenizer(facts), len(facts.labels[HEAD])

    def text(sample: Sample) -> Batch:
        caption, rng = sample.annotation["caption"], sample.rng
        found, words = read_caption(reader, caption, model.text.max_length)
        ids = np.array(found)
        asked = choose_asked(words_of(caption), words, config, rng)
        batch: Batch = {"text": torch.from_numpy(ids), "asked": torch.from_numpy(asked)}
        if model.legacy:
            batch["read"] = torch.from_numpy(hide(ids, asked, reader.token_to_id(MASK) or 0, vocab_size, rng))
        return batch | {"num_words": torch.tensor(len(ids) - 1), "num_asked": torch.tensor(len(asked))}

    def apply(sample: Sample) -> Batch:
        rng = sample.rng if training else None
        wave = sample.wave if rng is None or sample.wave is None else vary(sample.wave, augment, rng)
        batch = {"frames": pictures(sample, model.video.num_frames, model.video.frame_size, augment, rng)}
        batch |= {"has_video": torch.tensor(sample.frames is not None)} | sound(wave, num_samples)
        batch |= patches(model.audio, sample.rng if training or model.legacy else None)
        if rng is not None:
            batch |= bank(model.audio, augment, rng)
        return batch | text(sample) if sample.annotation.get("caption") else batch

    return apply


def pictures(sample: Sample, num: int, size: int, augment: Augment, rng: np.random.Generator | None) -> Tensor:
    """(T, 3, S, S) uint8, zeros where the clip has none. Never flipped: captions tell left from right."""
    if sample.frames is None:
        return torch.zeros(num, 3, size, size, dtype=torch.uint8)
    if rng is None or augment.min_area < 1:
        return resized_crop(sample.frames, size, rng, augment.min_area, flip=False)
    height, width = sample.frames.shape[1:3]
    side = min(height, width)
    top, left = (int(rng.integers(0, length - side + 1)) for length in (height, width))
    return resized_crop(sample.frames[:, top : top + side, left : left + side], size, None, 1.0)


def vary(wave: np.ndarray, augment: Augment, rng: np.random.Generator) -> np.ndarray:
    """The waveform louder or softer, and turned a little."""
    gain = rng.uniform(augment.gain[0], augment.gain[1])
    turned = np.roll(wave, int(rng.integers(-augment.roll, augment.roll + 1)))
    return (turned * 10 ** (gain / 20)).astype(np.float32)


def patches(config: AudioConfig, rng: np.random.Generator | None) -> Batch:
    """Rows and columns of patches that are read."""
    rows, columns = sound_grid(config)
    left_out = {"rows": (rows, config.patchout_freq), "columns": (columns, config.patchout_time)}
    return {name: passt.kept(number, left, rng) for name, (number, left) in left_out.items()}


def bank(config: AudioConfig, augment: Augment, rng: np.random.Generator) -> Batch:
    """Where the mel bank of a training clip ends, in Hz, and what of its spectrum is hidden."""
    low, high = 0.0, passt.top(config.sample_rate)
    low += rng.integers(0, augment.fmin + 1)
    high += augment.fmax / 2 - rng.integers(0, augment.fmax + 1)
    bands = draw_bands(rng, mel_frames(config), config.num_mel_bins, augment.time_mask, augment.freq_mask)
    return {"mel_ends": torch.tensor([low, high], dtype=torch.float32), "bands": bands}
