"""videotag's values. The presets' values are those of the original's yaml files where it has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from models.family import InputError

Head = Literal[
    "fresh", "id", "name"
]  # classifier of imported weights: left out | row i to row i | row of the same label
Sampling = Literal["uniform", "fps", "legacy"]
Resize = Literal["keep", "legacy"]


@dataclass(frozen=True)
class TsnModel:
    """Section `videotag.tsn.model`."""

    depth: Literal[18, 50, 101, 152]  # layers of the ResNet: 512 features (18) or 2048
    model_name: str  # weights: name, folder or file (torchvision's ResNet, or the original's TSN), or none
    head: Head


@dataclass(frozen=True)
class TsnConfig:
    """Phase `tsn`: a ResNet on some frames of a clip; what it is before its classifier are the frames' features."""

    model: TsnModel
    seg_num: int  # equal parts of a clip, of each of which training sees a random place and evaluation the middle
    seg_len: int  # neighbouring frames from that place on
    loss: Literal["softmax", "bce"]  # one tag a clip, or any number of them
    sampling: Sampling  # frames of which features are made: max_frames of a clip, `fps` a second, or as the original
    fps: float  # of sampling fps
    max_frames: int  # of a clip; legacy repeats those of a shorter one, the others make fewer features
    resize: Resize  # before the middle crop: the shorter side to short_size, or as the original the sides to 4:3
    short_size: int  # pixels
    target_size: int  # pixels, square
    min_area: float  # of the random crop in training; 1 = the middle one, as the original
    flip: bool  # in training, half of the clips


@dataclass(frozen=True)
class TaggerModel:
    """Section `videotag.tagger.model`. Of a pooling's numbers the others take no notice."""

    pooling: Literal["lstm", "peephole", "nextvlad", "transformer", "mean"]  # peephole = the original's, exact
    feature_dim: int  # of the frames' features: 512 of a ResNet-18, 2048 of the deeper ones
    embedding_size: int  # width to which a frame's features are brought; of nextvlad a clip's; of mean none
    lstm_size: int  # of lstm and peephole: a direction's width
    dropout: float
    legacy_dropout: bool  # of lstm and peephole: training masks without scaling, evaluation scales by 1 - dropout
    hidden: list[int]  # widths of the classifier's layers: the first with ReLU, those after it with tanh
    clusters: int  # of nextvlad
    groups: int  # of nextvlad
    expansion: int  # of nextvlad: how many times wider the features are made
    layers: int  # of transformer
    heads: int  # of transformer
    audio: bool  # a second branch hears the sound, a log-mel spectrum a second
    sample_rate: int  # Hz, of that
    audio_seconds: int  # of that
    num_mel_bins: int  # of that
    model_name: str  # weights of the original's tagger: name, folder or file, or none
    head: Head


@dataclass(frozen=True)
class TaggerConfig:
    """Phase `tagger`: features of a clip's frames to its tags."""

    model: TaggerModel
    max_frames: int  # of a clip; of a longer one so many are picked uniformly
    loss: Literal["bce", "focal", "asymmetric"]
    gamma: float  # of focal (Lin et al. 2017): how much what is easy weighs less
    alpha: float  # of focal: weight of a tag that is there; the others have 1 - alpha
    gamma_positive: float  # of asymmetric (Ridnik et al. 2021), for tags that are there
    gamma_negative: float  # of asymmetric, for those that are not
    margin: float  # of asymmetric: what tags that are not there may score at no cost
    sum_loss: bool  # summed over the clips of a step and the classes, as the original; otherwise their mean
    prior_bias: bool  # the classifier's biases start at the log-odds of the tags in the training clips
    mixup: float  # alpha of the Beta distribution by which two clips' features are mixed; 0 = off
    frame_dropout: float  # share of a clip's frames that training leaves out
    topk: int  # classes of which a clip's best are ranked (GAP@k), and that a segment answers with
    segment_frames: int  # frames of a segment that is tagged on its own in evaluation; 0 = none are


def feature_dim(model: TsnModel) -> int:
    """Features of a frame."""
    return 512 if model.depth == 18 else 2048


def _refuse(where: str, rules: list[tuple[str, Any, bool, str]]) -> None:
    for key, value, fits, wanted in rules:
        if not fits:
            raise InputError(f"params.yaml: {where}.{key} is {value}; it must be {wanted}")


def check_tsn(config: TsnConfig) -> None:
    """InputError naming the key of `videotag.tsn` whose value is out of range or does not fit the others."""
    c = config
    _refuse(
        "videotag.tsn",
        [
            ("model.depth", c.model.depth, c.model.depth in (18, 50, 101, 152), "18, 50, 101 or 152"),
            ("seg_num", c.seg_num, c.seg_num >= 1, "1 or more"),
            ("seg_len", c.seg_len, c.seg_len >= 1, "1 or more"),
            ("fps", c.fps, c.fps > 0, "above 0"),
            ("max_frames", c.max_frames, c.max_frames >= 1, "1 or more"),
            ("target_size", c.target_size, c.target_size >= 1, "1 or more"),
            ("short_size", c.short_size, c.short_size >= c.target_size, f"target_size ({c.target_size}) or more"),
            ("min_area", c.min_area, 0 < c.min_area <= 1, "above 0 and at most 1"),
        ],
    )


def check_tagger(config: TaggerConfig) -> None:
    """InputError naming the key of `videotag.tagger` whose value is out of range or does not fit the others."""
    c, m = config, config.model
    wide = m.feature_dim * m.expansion
    rules: list[tuple[str, Any, bool, str]] = [
        (f"model.{key}", getattr(m, key), getattr(m, key) >= 1, "1 or more")
        for key in ("feature_dim", "embedding_size", "lstm_size", "clusters", "groups", "expansion", "layers", "heads")
    ]
    rules += [
        ("model.dropout", m.dropout, 0 <= m.dropout < 1, "from 0 to below 1"),
        ("model.hidden", m.hidden, all(width >= 1 for width in m.hidden), "a list of widths of 1 or more"),
        ("model.sample_rate", m.sample_rate, not m.audio or m.sample_rate >= 8000, "8000 or more"),
        ("model.audio_seconds", m.audio_seconds, not m.audio or m.audio_seconds >= 1, "1 or more"),
        ("model.num_mel_bins", m.num_mel_bins, not m.audio or m.num_mel_bins >= 1, "1 or more"),
        ("max_frames", c.max_frames, c.max_frames >= 1, "1 or more"),
        ("gamma", c.gamma, c.gamma >= 0, "0 or more"),
        ("alpha", c.alpha, 0 <= c.alpha <= 1, "from 0 to 1"),
        ("gamma_positive", c.gamma_positive, c.gamma_positive >= 0, "0 or more"),
        ("gamma_negative", c.gamma_negative, c.gamma_negative >= 0, "0 or more"),
        ("margin", c.margin, 0 <= c.margin < 1, "from 0 to below 1"),
        ("mixup", c.mixup, c.mixup >= 0, "0 or more"),
        ("frame_dropout", c.frame_dropout, 0 <= c.frame_dropout < 1, "from 0 to below 1"),
        ("topk", c.topk, c.topk >= 1, "1 or more"),
        ("segment_frames", c.segment_frames, 0 <= c.segment_frames <= c.max_frames, "from 0 to max_frames"),
    ]
    if m.pooling == "nextvlad":
        fits = wide % m.groups == 0
        rules.append(("model.groups", m.groups, fits, f"a divisor of feature_dim x expansion ({wide})"))
    if m.pooling == "transformer":
        fits = m.embedding_size % m.heads == 0 and m.embedding_size % 2 == 0
        rules.append(("model.embedding_size", m.embedding_size, fits, f"even and a multiple of heads ({m.heads})"))
    _refuse("videotag.tagger", rules)
