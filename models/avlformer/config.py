"""avlformer's values. The names of FAVDBench's options stand beside those that have another here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from models.family import InputError


@dataclass(frozen=True)
class VideoConfig:
    """Section `avlformer.model.video`: Video Swin (Liu et al. 2022)."""

    model_name: str  # weights: mmaction's .pth, torchvision's, or none
    freeze: bool  # freeze_backbone
    checkpointing: bool  # a stage's activations are computed again in the backward pass (use_checkpoint)
    num_frames: int  # max_num_frames
    frame_size: int  # pixels, square (img_res)
    embed_dim: int
    depths: list[int]
    num_heads: list[int]
    window: list[int]  # tokens in time, rows, columns
    drop_path: float  # of the last block, linear from 0 at the first


@dataclass(frozen=True)
class AudioConfig:
    """Section `avlformer.model.audio`: PaSST (Koutini et al. 2022)."""

    model_name: str  # weights: PaSST's .pt, or none
    freeze: bool  # freeze_passt
    sample_rate: int  # Hz
    seconds: float
    num_mel_bins: int
    hidden_size: int
    num_layers: int
    num_heads: int
    stride: int  # from one patch of 16 x 16 to the next
    patchout_time: int  # columns of patches left out, by chance in training and evenly spread in evaluation
    patchout_freq: int  # rows of patches left out likewise


@dataclass(frozen=True)
class TextConfig:
    """Section `avlformer.model.text`: BERT (Devlin et al. 2019), which reads all three and writes."""

    model_name: str  # weights: a folder, file or name of BERT, or none (FAVDBench starts from none)
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_length: int  # wordpieces of a caption that training reads, [CLS] and [SEP] among them (max_seq_length)
    dropout: float
    tie_weights: bool  # the answers' matrix is that of the wordpieces


@dataclass(frozen=True)
class ModelConfig:
    """Section `avlformer.model`."""

    model_name: str  # weights of all parts: FAVDBench's model.bin, or none
    video: VideoConfig
    audio: AudioConfig
    text: TextConfig
    feature_dim: int  # of video and audio tokens before BERT (img_feature_dim)
    mask: Literal["none", "learned", "hard"]  # links among them: all | weighed | in evaluation those of 0.5 on, whole
    legacy: bool  # FAVDBench's arithmetic: closed mask, masked words read by both losses, patchout by chance


@dataclass(frozen=True)
class Augment:
    """Section `avlformer.finetune.augment`: what training sees and hears of a clip."""

    min_area: float  # of the random crop; 1 = FAVDBench's, as wide as the short side. Nothing is flipped
    gain: list[float]  # dB, lowest and highest
    roll: int  # samples by which the waveform turns at most, either way
    time_mask: int  # widest band of silence, in mel frames
    freq_mask: int  # widest, in mel bins
    fmin: int  # Hz at most by which the lowest pitch of the mel bank moves up
    fmax: int  # Hz by which the highest one moves at most, up or down to half of it


@dataclass(frozen=True)
class Decoding:
    """Section `avlformer.finetune.decoding`: how captions are written."""

    max_length: int  # wordpieces, [CLS] and [SEP] among them (max_gen_length)
    beams: int  # 1 = the likeliest wordpiece each time
    length_penalty: float  # a beam's log-probability is divided by its length to this power
    repetition_penalty: float  # what was written already is so much less likely (Keskar et al. 2019); 1 = off
    sample: bool  # draw wordpieces instead of taking the likeliest
    temperature: float  # of drawing
    top_k: int  # draw among so many; 0 = all
    top_p: float  # draw among the likeliest that have this probability together; 1 = all
    seed: int  # of drawing; a clip's draw depends on nothing else


@dataclass(frozen=True)
class FinetuneConfig:
    """Phase `finetune`: a clip's description, word by word."""

    model: ModelConfig
    augment: Augment
    mask_prob: float  # share of a caption's wordpieces that are asked for
    max_masked: int  # of a caption at most (max_masked_tokens)
    masking: Literal["random", "parts"]  # which: by chance | words of `parts` first (text_mask_type)
    parts: list[str]  # noun, verb, adjective, adverb, number (tag_to_mask)
    parts_share: float  # of those asked for that are of `parts` (mask_tag_prob)
    lm_weight: float  # of foretelling each next wordpiece; asking for hidden ones has the rest (lambda_)
    sparse_weight: float  # of the mean openness of links (loss_sparse_w)
    label_smoothing: float
    backbone_lr: float  # of Video Swin, times lr (backbone_coef_lr)
    decoding: Decoding


PARTS = ("noun", "verb", "adjective", "adverb", "number")


def check(config: FinetuneConfig) -> None:
    """InputError naming the key of `avlformer.finetune` whose value is out of range or does not fit the others."""
    c, v, a, t, d = config, config.model.video, config.model.audio, config.model.text, config.decoding
    grid = sound_grid(a)
    rules: list[tuple[str, Any, bool, str]] = [
        ("model.video.num_frames", v.num_frames, v.num_frames >= 2 and v.num_frames % 2 == 0, "even, 2 or more"),
        ("model.video.frame_size", v.frame_size, v.frame_size >= 32, "32 or more"),
        ("model.video.depths", v.depths, 1 <= len(v.depths) == len(v.num_heads), "as many numbers as num_heads"),
        ("model.video.depths", v.depths, sum(v.depths) >= 2, "two blocks or more in all"),
        ("model.video.window", v.window, len(v.window) == 3 and min(v.window) >= 1, "three numbers of 1 or more"),
        ("model.video.drop_path", v.drop_path, 0 <= v.drop_path < 1, "from 0 to below 1"),
        ("model.audio.num_heads", a.num_heads, divides(a.num_heads, a.hidden_size), f"a divisor of {a.hidden_size}"),
        ("model.audio.stride", a.stride, 1 <= a.stride <= 16, "from 1 to 16"),
        ("model.audio.seconds", a.seconds, grid[1] >= 1, "long enough for a patch of 16 frames of 10 ms"),
        ("model.audio.seconds", a.seconds, abs(a.seconds * 100 - mel_frames(a)) < 1e-6, "of whole frames of 10 ms"),
        ("model.audio.num_mel_bins", a.num_mel_bins, grid[0] >= 1, "16 or more"),
        ("model.audio.patchout_time", a.patchout_time, 0 <= a.patchout_time < grid[1], f"from 0 to below {grid[1]}"),
        ("model.audio.patchout_freq", a.patchout_freq, 0 <= a.patchout_freq < grid[0], f"from 0 to below {grid[0]}"),
        ("model.text.num_heads", t.num_heads, divides(t.num_heads, t.hidden_size), f"a divisor of {t.hidden_size}"),
        ("model.text.max_length", t.max_length, 3 <= t.max_length <= POSITIONS, f"from 3 to {POSITIONS}"),
        ("model.text.dropout", t.dropout, 0 <= t.dropout < 1, "from 0 to below 1"),
        ("augment.min_area", c.augment.min_area, 0 < c.augment.min_area <= 1, "above 0 and at most 1"),
        ("augment.gain", c.augment.gain, len(c.augment.gain) == 2 and c.augment.gain[0] <= c.augment.gain[1], "two, ascending"),
        ("mask_prob", c.mask_prob, 0 < c.mask_prob <= 1, "above 0 and at most 1"),
        ("max_masked", c.max_masked, c.max_masked >= 1, "1 or more"),
        ("parts", c.parts, set(c.parts) <= set(PARTS), f"some of {', '.join(PARTS)}"),
        ("parts_share", c.parts_share, 0 <= c.parts_share <= 1, "from 0 to 1"),
        ("lm_weight", c.lm_weight, 0 <= c.lm_weight <= 1, "from 0 to 1"),
        ("label_smoothing", c.label_smoothing, 0 <= c.label_smoothing < 1, "from 0 to below 1"),
        ("decoding.max_length", d.max_length, 3 <= d.max_length <= POSITIONS, f"from 3 to {POSITIONS}"),
        ("decoding.beams", d.beams, d.beams >= 1, "1 or more"),
        ("decoding.sample", d.sample, not (d.sample and d.beams > 1), "false with more than one beam"),
        ("decoding.temperature", d.temperature, d.temperature > 0, "above 0"),
        ("decoding.top_p", d.top_p, 0 < d.top_p <= 1, "above 0 and at most 1"),
        ("decoding.repetition_penalty", d.repetition_penalty, d.repetition_penalty >= 1, "1 or more"),
    ]  # fmt: skip
    for key, value, fits, wanted in rules:
        if not fits:
            section = "avlformer" if key.startswith("model.") else "avlformer.finetune"
            raise InputError(f"params.yaml: {section}.{key} is {value}; it must be {wanted}")


POSITIONS = 512  # wordpieces that BERT has positions for
PATCH = 16  # mel bins and frames of a patch of sound


def divides(divisor: int, number: int) -> bool:
    """Whether a width can be parted evenly."""
    return divisor >= 1 and number % divisor == 0


def video_grid(config: VideoConfig) -> tuple[int, int, int]:
    """Video tokens in time, rows, columns: 2 frames and 4 pixels a side, and the sides halved after each stage but one."""
    side = -(-config.frame_size // 4)
    for _ in config.depths[1:]:
        side = -(-side // 2)
    return config.num_frames // 2, side, side


def mel_frames(config: AudioConfig) -> int:
    """Frames of 10 ms."""
    return round(config.seconds * 100)


def sound_grid(config: AudioConfig) -> tuple[int, int]:
    """Patches of sound in pitch and in time, before any is left out."""
    return (config.num_mel_bins - PATCH) // config.stride + 1, (mel_frames(config) - PATCH) // config.stride + 1


def num_video_tokens(config: VideoConfig) -> int:
    """784 of 32 frames of 224 pixels."""
    time, rows, columns = video_grid(config)
    return time * rows * columns


def num_audio_tokens(config: AudioConfig) -> int:
    """The patches that are left, and PaSST's distillation token: 473 of FAVDBench's."""
    rows, columns = sound_grid(config)
    return (rows - config.patchout_freq) * (columns - config.patchout_time) + 1
