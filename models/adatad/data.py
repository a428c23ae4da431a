"""adatad's samples: windows of long videos, the segments that lie in them, and what is drawn to change their pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.adatad import targets
from models.adatad.config import FinetuneConfig
from models.family import Batch, ClipSpec, Facts, InputError, Sample, WindowSpec
from models.transforms import change, draw_changes, resized_crop

TRIES = 200  # to place a training window where it shows an action


def clip(config: FinetuneConfig) -> ClipSpec:
    """Windows of neighbouring stored frames; in evaluation they overlap, and the last one ends with the video."""
    check(config)
    model = config.model
    stride = max(1, round(model.window * (1 - config.overlap))) * model.scale_factor
    window = WindowSpec(stride, partial(draw_window, config))
    return ClipSpec(model.window * model.scale_factor, sample_rate=0, audio_seconds=0.0, window=window)


def check(config: FinetuneConfig) -> None:
    """InputError naming the key of `adatad.finetune` that no windows can be made by."""
    if not 0 <= config.overlap < 1:
        raise InputError(f"params.yaml: adatad.finetune.overlap is {config.overlap}; it goes from 0 to below 1")
    if not 0 < config.keep_threshold <= 1:
        raise InputError(
            f"params.yaml: adatad.finetune.keep_threshold is {config.keep_threshold}; it goes from above 0 to 1"
        )
    if config.classifier_top < 0:
        raise InputError(f"params.yaml: adatad.finetune.classifier_top is {config.classifier_top}; it is 0 or more")
    if len(config.crop_ratio) != 2 or not 0 < config.crop_ratio[0] <= config.crop_ratio[1] <= 1:
        raise InputError(
            f"params.yaml: adatad.finetune.crop_ratio is {config.crop_ratio}; it holds two numbers, from above 0 to 1, "
            "the larger one last"
        )


def labels(annotations: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The sorted names of the actions in the training videos."""
    names = sorted({label for video in annotations for _, _, label in video["segments"]})
    if not names:
        raise InputError("no video of the train split has a segment; nothing can be learned")
    return {"label": names}


# --- windows in training -------------------------------------------------------------------------------------------------


def draw_window(
    config: FinetuneConfig, stored: int, annotation: Mapping[str, Any], step: float, rng: np.random.Generator
) -> tuple[int, int]:
    """First frame and frames of a window to train on, among `stored` frames `step` seconds apart.

    A longer video is cut to a window, a shorter one to a share of it within `crop_ratio`, at random places until one shows
    enough of a segment (ActionFormer, Zhang et al. 2022: its code).
    """
    scale, length = config.model.scale_factor, config.model.window
    total = -(-stored // scale)  # grid steps
    if total <= length:
        low, high = (round(ratio * total) for ratio in config.crop_ratio)
        length = int(rng.integers(max(low, 1), high, endpoint=True))
        if length == total:
            return 0, stored
    segments = grid_segments(annotation, step * scale)
    first = 0
    for _ in range(TRIES):
        first = int(rng.integers(0, total - length, endpoint=True))
        if is_kept(segments - first, length, config.keep_threshold).any():
            break
    return first * scale, min(length * scale, stored - first * scale)


def grid_segments(annotation: Mapping[str, Any], step: float) -> np.ndarray:
    """(N, 2) float64 segments of a video in grid steps of `step` seconds."""
    times = [(start, end) for start, end, _ in annotation["segments"]]
    return np.array(times, np.float64).reshape(-1, 2) / step


def is_kept(segments: np.ndarray, length: int, threshold: float) -> np.ndarray:
    """(N,) whether so large a share of a segment lies within the first `length` grid steps."""
    inside = np.clip(segments, 0, length)
    return (inside[:, 1] - inside[:, 0]) >= threshold * (segments[:, 1] - segments[:, 0])


# --- samples -------------------------------------------------------------------------------------------------------------


def transform(config: FinetuneConfig, facts: Facts, training: bool) -> Callable[[Sample], Batch]:
    """A window as the model takes it: frames, their valid grid steps, times, segments in grid steps from its start.

    In training segments are cut to the window, those of which too little is left go, and `num_positive` counts the points
    that answer for one; what `pictures` shall change is drawn. In evaluation the video's own segments come too, in seconds.
    """
    check(config)
    model, augment = config.model, config.augment
    points = targets.points(model.window, model.detector.num_levels)
    num_frames, size = model.window * model.scale_factor, model.backbone.frame_size

    def apply(sample: Sample) -> Batch:
        place, frames = sample.window, sample.frames
        assert place is not None and frames is not None, "adatad takes windows of pictures"
        rng = sample.rng if training and augment.min_area < 1 else None
        shown = resized_crop(frames, size, rng, augment.min_area)
        steps = -(-len(frames) // model.scale_factor)
        batch: Batch = {
            "frames": torch.cat([shown, shown[-1:].expand(num_frames - len(shown), -1, -1, -1)]),
            "mask": torch.arange(model.window) < steps,
            "start": torch.tensor(place.first * place.step, dtype=torch.float32),
            "step": torch.tensor(place.step * model.scale_factor, dtype=torch.float32),
            "duration": torch.tensor(place.duration, dtype=torch.float32),
            "clip": torch.tensor(place.clip),
        }
        if sample.annotation:
            threshold = config.keep_threshold if training else None
            batch |= truth(sample, facts, model.scale_factor, model.max_segments, steps, threshold)
        if training:
            found = batch["segments"], batch["classes"], batch["mask"]
            batch["num_positive"] = targets.count_positive(points, *found, config.center_radius)
            batch |= draw_changes(sample.rng, augment.color, augment.hue, augment.rand_ops)
        return batch

    return apply


def truth(sample: Sample, facts: Facts, scale: int, number: int, steps: int, threshold: float | None) -> Batch:
    """segments (`number`, 2) in grid steps from the window's start and classes (`number`,), -1 where there are fewer.

    With a `threshold` they are cut to the window's `steps` and kept by it. Without: all, and truth_starts and truth_ends
    (`number`,) in seconds of the video with truth_classes (`number`,). InputError for more segments, or for an action that
    training never saw.
    """
    place, annotation = sample.window, sample.annotation
    assert place is not None
    if len(annotation["segments"]) > number:
        raise InputError(
            f"video {sample.id} has {len(annotation['segments'])} segments; set adatad.model.max_segments to that or more"
        )
    names = [class_index(label, facts, sample.id) for _, _, label in annotation["segments"]]
    classes = np.array(names, np.int64)
    segments = grid_segments(annotation, place.step * scale) - place.first / scale
    if threshold is None:
        seconds = grid_segments(annotation, 1.0)
        return {
            "segments": padded(segments, number), "classes": padded(classes, number, -1),
            "truth_starts": padded(seconds[:, 0], number), "truth_ends": padded(seconds[:, 1], number),
            "truth_classes": padded(classes, number, -1),
        }  # fmt: skip
    kept = is_kept(segments, steps, threshold)
    cut = np.clip(segments[kept], 0, steps)
    return {"segments": padded(cut, number), "classes": padded(classes[kept], number, -1)}


def class_index(label: str, facts: Facts, where: str) -> int:
    """Position of an action's class; InputError for one that training never saw."""
    known = facts.labels["label"]
    if label not in known:
        raise InputError(f"video {where}: label {label!r} is not among the {len(known)} of training: {known}")
    return known.index(label)


def padded(values: np.ndarray, number: int, fill: int = 0) -> Tensor:
    """(n, …) -> (number, …), filled up; float64 becomes float32."""
    out = np.full((number, *values.shape[1:]), fill, np.int64 if values.dtype == np.int64 else np.float32)
    out[: len(values)] = values
    return torch.from_numpy(out)


def pictures(batch: Batch) -> Tensor:
    """(B, T, 3, S, S) uint8 frames, changed as was drawn for them in training; on the device."""
    return change(batch["frames"], batch)
