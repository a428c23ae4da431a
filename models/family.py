"""The contract between a family and the rest of Duet.

A family is a folder of models/ whose __init__ exports one `FAMILY`. Everything that reads disks, trains, tracks or serves
goes through the fields below and knows no family by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # torch takes seconds to import, and most stages never touch a tensor
    import numpy as np
    import pandas as pd
    from torch import Tensor, nn

    Batch = dict[str, Tensor]
else:
    Batch = dict


class InputError(ValueError):
    """What a person gave is wrong. The message is one line: the file, row or key, what is wrong, and what to do."""


class UnreachableError(InputError):
    """What a person named may be right, but it is not on this machine and the network does not give it."""


@dataclass(frozen=True)
class WindowSpec:
    """How long videos are seen piece by piece: `ClipSpec.num_frames` neighbouring stored frames at once, without sound."""

    stride: int  # stored frames from one window of a video to the next in evaluation, not more than a window has
    # draw(stored frames of a video, its annotation, seconds from one to the next, rng) -> first and number of those that
    # training sees of it this time, at most a window's
    draw: Callable[[int, Mapping[str, Any], float, np.random.Generator], tuple[int, int]]


@dataclass(frozen=True)
class ClipSpec:
    """What the loader must read of one clip."""

    # Picked by `choose`, or uniformly over the stored ones, or a window of neighbours; 0 = the phase sees no pictures.
    num_frames: int
    sample_rate: int  # Hz, of the waveform handed over
    audio_seconds: float  # length of the waveform, cut or zero-padded; 0 = the phase hears nothing
    # Of clips that were prepared elsewhere the phase takes a spectrogram, `Sample.mel`, in place of the waveform.
    takes_mel: bool = False
    # An epoch of training takes one window of each clip; evaluation takes all windows of all clips, a row each.
    window: WindowSpec | None = None
    # choose(stored frames of a clip, rng in training and None in evaluation) -> `num_frames` of them, by their number.
    choose: Callable[[int, np.random.Generator | None], Sequence[int]] | None = None
    # The family's phase whose features of each clip the loader hands over, as the features stage left them; "" = none.
    features: str = ""


@dataclass(frozen=True)
class FeatureSpec:
    """What a phase makes of raw videos for others to learn from: a row of numbers for each of some frames.

    Its module has `extract`, frames (N, 3, S, S) uint8 RGB -> (N, dim) float32, each row from its own frame alone.
    """

    dim: int
    # choose(frames of a video, frames a second) -> numbers of the frames, a row each in this order; they may repeat.
    choose: Callable[[int, float], Sequence[int]]
    prepare: Callable[[np.ndarray], np.ndarray]  # (H, W, 3) uint8 RGB -> (S, S, 3) uint8 RGB
    segments: int  # frames at once through the module


@dataclass(frozen=True)
class Window:
    """Where the frames of a sample stand in their video."""

    first: int  # stored frame; frame i of the sample is shown at (first + i) * step
    step: float  # seconds from one stored frame to the next
    duration: float  # seconds, of the whole video
    clip: int  # row of the video in its split


@dataclass
class Sample:
    """One clip as the loader hands it to a phase's transform. A missing modality is None, never zeros."""

    id: str
    frames: np.ndarray | None  # (T, H, W, 3) uint8 RGB
    wave: np.ndarray | None  # (N,) float32 in [-1, 1], mono, N <= sample_rate * audio_seconds (not padded)
    annotation: Mapping[str, Any]  # as the dataset's format module wrote it into the manifest
    rng: np.random.Generator  # seeded by (seed, epoch, clip): the only source of randomness of a transform
    # (frames, mel) float32 in place of `wave`, whole and in units of its own (Facts has their mean): only with takes_mel
    mel: np.ndarray | None = None
    window: Window | None = None  # of a phase with windows, whose frames are then fewer where the video ends before
    features: np.ndarray | None = None  # (T, D) float32, T >= 1, in the order of their phase's FeatureSpec.choose
    feature_times: np.ndarray | None = None  # (T,) float32, seconds at which these frames are shown


@dataclass(frozen=True)
class Facts:
    """What the training data told once and every checkpoint remembers."""

    labels: Mapping[str, list[str]]  # head -> class names; the position is the class index
    mel_mean: float  # of the train split's log-mel, in the front-end's own units
    mel_std: float
    # head -> training clips of each class, where annotations hold the class's name under the head's, or, where a clip may
    # have several, their ids under its plural
    counts: Mapping[str, list[int]] = field(default_factory=dict)
    num_clips: int = 0  # of the train split
    # class name -> the score from which on an answer is believed, as `Phase.calibrate` tells it of the trained module
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def believes(self, label: str, score: float) -> bool:
        """Whether a person should see the answer: always, where no threshold is known."""
        return score >= self.thresholds.get(label, 0.0)


@dataclass(frozen=True)
class LoadReport:
    """What happened to each key when weights went into a module."""

    loaded: list[str]
    fresh: list[str]  # stayed at their initial values, as the phase declares
    dropped: list[str]  # in the source, not wanted by the phase
    classes: list[str] = field(default_factory=list)  # a line for each class: whose weights its classifier has

    def __str__(self) -> str:
        """One line for logs."""
        return f"{len(self.loaded)} tensors loaded, {len(self.fresh)} fresh, {len(self.dropped)} dropped"

    def lines(self) -> list[str]:
        """What happened to each key; keys that differ in nothing but their first number share a line."""
        alike: dict[tuple[str, str], list[int]] = {}
        for word, keys in (("loaded", self.loaded), ("fresh", self.fresh), ("dropped", self.dropped)):
            for key in keys:
                before, number, after = re.fullmatch(r"(.*?)(?:\b(\d+)\b(.*))?", key).groups("")  # pyright: ignore
                numbers = alike.setdefault((f"{word} {before}", after), [])
                numbers += [int(number)] if number else []
        joined = {ends: ",".join(str(n) for n in sorted(numbers)) for ends, numbers in alike.items()}
        lines = [
            f"{start}{{{text}}}{end}" if "," in text else start + text + end for (start, end), text in joined.items()
        ]
        return lines + self.classes


@dataclass(frozen=True)
class ParameterGroup:
    """How the optimizer treats some of a module's parameters."""

    lr: float  # times the phase's
    decay_all: bool  # weight decay on biases, norms and scales too, not only on weights of two or more dimensions


class Metric(Protocol):
    """Collects predictions of an evaluation pass."""

    def update(self, predictions: Batch, batch: Batch) -> None:
        """Take one batch; both on the CPU."""
        ...

    def compute(self) -> dict[str, float]:
        """Names and values over everything seen so far."""
        ...


@dataclass(frozen=True)
class Phase:
    """One trainable stage of a family."""

    Config: type  # frozen dataclass without defaults: every value stands in params.yaml
    clip: Callable[[Any], ClipSpec]
    # transform(config, facts, training) -> sample -> tensors, run in a loader worker; of a batch they have the same shapes,
    # but for a first dimension (words of a text), where zeros follow the shorter ones up to the batch's longest
    transform: Callable[[Any, Facts, bool], Callable[[Sample], Batch]]
    # The module's forward(batch) gives {"loss": scalar, "loss_x": scalar} in training mode, and predictions
    # (first dimension = batch) in evaluation mode. Every tensor of the batch is on the module's device. A module whose
    # loss compares all clips of a batch has `joint_loss`, forward(batch, part="embeddings") and
    # forward(embeddings, part="loss") too: then a batch may be larger than what fits into memory at once.
    # FSDP shards each layer of a ModuleList, which is whole only while it is called, as often in all processes; a part with
    # `gathered_whole` has lists that are used otherwise. Parameters have a dimension at least: FSDP shards no numbers.
    # A transform may count: beside `num_x` (B,) a training batch has `total_x` (), its sum over all clips of the step, and
    # `total_clips` (), whatever processes and micro-batches share them. As the step's gradient is the mean over its clips,
    # a loss of sum(own clips) / total_x is that times total_clips / own clips. What a module carries from step to step it
    # moves in `end_step(batch)`, called once after each, with those totals in the batch.
    build: Callable[[Any, Facts], nn.Module]
    metrics: Callable[[Any, Facts], Metric]
    best: tuple[str, Literal["max", "min"]]  # the validation metric that selects the `best` checkpoint
    tiny: Any  # the smallest Config, so that CPU tests cover the phase
    # merge(config, predictions of all windows of some clips) -> what `present` takes, a row a clip in their order. Every phase
    # with windows has it; its predictions name the clip of each window by its row, as `clip` (B,).
    merge: Callable[[Any, Batch], Batch] | None = None
    # present(predictions, facts) -> one JSON-able answer a clip: what a person wants to read
    present: Callable[[Batch, Facts], list[dict[str, Any]]] | None = None
    # calibrate(config, facts, the best weights' predictions for the val split as `Evaluation.predict` gives them, its clips)
    # -> Facts.thresholds, which travel with the weights. Of what `present` lists, {"label", "score", …} below them is not
    # shown to people.
    calibrate: Callable[[Any, Facts, Mapping[str, np.ndarray], Sequence[ClipInfo]], dict[str, float]] | None = None
    # Name of a form -> export(answers of `present` by clip name, facts) -> name of a file -> its text, or a table to draw as
    # PNG: what else a person takes away, whatever was shown, in the first form unless another is asked for. For phases
    # with windows an answer has the clip's `duration` in seconds, too.
    exports: Mapping[str, Callable[[Mapping[str, Mapping[str, Any]], Facts], Mapping[str, str | Table]]] = field(
        default_factory=dict
    )
    # explain(module in evaluation mode, batch) -> where it looked and listened: `video_relevance` (B, T', h, w), which
    # divides the clip's frames evenly, and `audio_relevance` (B, mel, time), low pitches first, over its audio_seconds;
    # both in [0, 1]. One that writes texts has `video_attention` (B, W, T') and `audio_attention` (B, W, time) instead, the
    # shares of each word. Beside them whatever the family's own evaluation wants to know of each clip.
    explain: Callable[[Any, Batch], Batch] | None = None
    # What the phase's finished module makes of raw videos for a phase whose ClipSpec names it in `features`.
    features: Callable[[Any], FeatureSpec] | None = None
    # The phase whose finished module, frozen, teaches this one: a training batch holds what it answers to the same tensors
    # as `teacher_<prediction>`. Not with `cacheable` or `joint_loss`. "" = nobody.
    teacher: str = ""
    # Prefixes of the module's keys that start fresh when the phase begins from another phase's checkpoint.
    fresh: tuple[str, ...] = ()
    # Names of third-party weights by slot, "none" where there are none; and how a slot's state goes into the module.
    pretrained: Callable[[Any], dict[str, str]] = field(default=lambda config: {})
    load_pretrained: Callable[[nn.Module, str, Mapping[str, Tensor]], LoadReport] | None = None
    # Bundles and checkpoints leave out frozen parameters that were never trained: these are made again, from the seed and
    # from `pretrained`, and must be the same to the byte. False = they hold everything.
    slim: bool = False
    # fallback(config, slot) -> the config to train with instead where a slot's weights are not on this machine and the
    # hub cannot be reached; None = that ends the run. The bundle keeps the config that was trained.
    fallback: Callable[[Any, str], Any | None] = field(default=lambda config, slot: None)
    # frequencies(config, train annotations) -> how often each clip is drawn compared with the others, 0 = never; an epoch
    # has as many steps as before and its clips are drawn with replacement. None = each clip once an epoch.
    frequencies: Callable[[Any, Sequence[Mapping[str, Any]]], np.ndarray | None] = field(
        default=lambda config, clips: None
    )
    # Prefix of parameters' names -> how they are trained, where other than the rest; the first prefix that fits counts.
    parameter_groups: Callable[[Any], Mapping[str, ParameterGroup]] = field(default=lambda config: {})
    # True when all that precedes `module.encode(batch) -> Batch` is frozen, so that its result may be computed once per
    # clip; forward then receives the encoded tensors in the batch in place of frames and wave.
    cacheable: Callable[[Any], bool] = field(default=lambda config: False)


@dataclass(frozen=True)
class ClipInfo:
    """What evaluation may know of a clip beside its predictions."""

    id: str
    group: str  # clips of one group (source video, event) are resampled together in bootstrap intervals
    annotation: Mapping[str, Any]


class Evaluation(Protocol):
    """What tasks/evaluate.py offers a family: predictions, without a word about disks."""

    facts: Facts
    config: Any  # of the final phase
    trained: Sequence[str]  # phases that have a checkpoint
    num_bootstrap: int
    seed: int

    def clips(self, split: str) -> list[ClipInfo]:
        """The clips of a split, in the order of predictions; those of windows tell their clip's place by `clip`."""
        ...

    def predict(self, phase: str, split: str, drop: str = "", untrained: bool = False) -> dict[str, np.ndarray]:
        """Predictions of a phase's best weights for a split; `drop` hides "audio" or "video"; `untrained` = random weights."""
        ...

    def explain(self, phase: str, split: str, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """What a phase's `explain` says of these clips of a split, in the order of `rows`."""
        ...

    def judge(self, split: str, captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
        """Scores (N,) of a caption of each clip of a split by the models that params name, none where they name none.

        Each clip has a reference or more. NaN where a judge has nothing to say of a clip.
        """
        ...


@dataclass(frozen=True)
class Table:
    """A table of the report, written as CSV too, and drawn where `plot` says how."""

    title: str
    frame: pd.DataFrame
    note: str = ""
    # timeline: a row is a segment, in columns clip, duration (of the clip), kind (truth | found), label, start, end, score;
    # seconds. The clips are drawn in the order in which they come. One without a segment has a row of kind "nothing"
    # with no label.
    plot: Literal["", "confusion", "bars", "lines", "timeline"] = ""


@dataclass(frozen=True)
class Attention:
    """What each word of an answer was taken from: shares of its attention, W words."""

    words: list[str]
    video: np.ndarray  # (W, T'), over the clip's frames from first to last
    audio: np.ndarray  # (W, N), over its audio_seconds


@dataclass(frozen=True)
class Example:
    """One clip shown in the report with what was expected and what came out."""

    clip: str
    truth: str
    predictions: list[tuple[str, float]]
    video_relevance: np.ndarray | None = None  # (T', h, w) and (mel, time) in [0, 1], as a phase's `explain` gives them
    audio_relevance: np.ndarray | None = None
    attention: Attention | None = None  # of the first prediction


@dataclass(frozen=True)
class Results:
    """What a family says of itself on the test split."""

    metrics: dict[str, float]  # finite: what these clips do not tell is left out, and the note of a table says so
    tables: dict[str, Table]  # `predictions` with a row a clip is one: it begins with `clip` and `group`
    examples: list[Example]
    files: Mapping[str, str] = field(
        default_factory=dict
    )  # name -> text: what else people take away, as `exports` has it


@dataclass(frozen=True)
class Imported:
    """What a config file of the original system means here."""

    preset: str  # of the family: what the original's code fixes
    sections: Mapping[str, Any]  # to be laid over it, in the shape of a preset
    notes: Sequence[str]  # one line each: what was left out and why, what to check


@dataclass(frozen=True)
class Family:
    """A published system: its phases in training order, its labels, its evaluation."""

    title: str
    phases: dict[str, Phase]
    final: str  # the phase that is evaluated, registered and asked; those after it are made from it
    # labels(train annotations, names of all classes by their id where the dataset's format lists them) -> label maps
    labels: Callable[[Sequence[Mapping[str, Any]], Sequence[str]], dict[str, list[str]]]
    evaluate: Callable[[Evaluation], Results]
    # The metric that ranks versions, higher is better, and how the table `predictions` of Results tells it: that table
    # -> the statistic that models.metrics.bootstrap resamples.
    headline: tuple[str, Callable[[pd.DataFrame], Callable[[np.ndarray], np.ndarray]]]
    # The original system's config file, parsed, -> what it means; InputError names the key that is wrong. None: it has none.
    read_config: Callable[[Mapping[str, Any]], Imported] | None = None
