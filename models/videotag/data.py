"""videotag's samples: which frames of a clip, how they are cut, and what the loader's workers make of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.family import Batch, ClipSpec, Facts, FeatureSpec, InputError, Sample
from models.samples import sound
from models.transforms import resized_crop
from models.videotag.config import TaggerConfig, TsnConfig, check_tagger, check_tsn, feature_dim

HEAD = "tag"  # name of the label map
FRAMES_AT_ONCE = 64  # through the ResNet when features are made: what a GPU is busy with and a CPU can hold

# --- classes -------------------------------------------------------------------------------------------------------------


def labels(annotations: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, list[str]]:
    """Names of all classes by their id; those that occur more than once carry their id, as in `cat #2014`.

    A dataset without a list of names has its ids for names, up to the greatest of the training clips.
    """
    greatest = max((tag for clip in annotations for tag in clip["tags"]), default=-1)
    if greatest < 0:
        raise InputError("no clip of the train split has a tag")
    if not classes:
        return {HEAD: [str(tag) for tag in range(greatest + 1)]}
    if greatest >= len(classes):
        raise InputError(
            f"a clip of the train split has tag {greatest}, but the label file has {len(classes)} names, 0 the first"
        )
    return {HEAD: unique(classes)}


def unique(names: Sequence[str]) -> list[str]:
    """The names with ` #id` after those that occur more than once, or after all where that is one of the others' names."""
    often = Counter(names)
    found = [name if often[name] == 1 else f"{name} #{i}" for i, name in enumerate(names)]
    return found if len(set(found)) == len(found) else [f"{name} #{i}" for i, name in enumerate(names)]


def multi_hot(sample: Sample, facts: Facts) -> Tensor:
    """(C,) float32, 1 where the clip has the tag; InputError for a tag that the label map does not have."""
    found = torch.zeros(len(facts.labels[HEAD]))
    tags = torch.tensor(sample.annotation["tags"], dtype=torch.int64)
    if len(tags) and not 0 <= int(tags.min()) <= int(tags.max()) < len(found):
        raise InputError(
            f"clip {sample.id}: tags {tags.tolist()} are not all among the {len(found)} of training, counted from 0"
        )
    found[tags] = 1.0
    return found


# --- which frames --------------------------------------------------------------------------------------------------------


def legacy_frames(num: int, segments: int, length: int, rng: np.random.Generator | None) -> list[int]:
    """The original's choice of `segments` runs of `length` frames of `num`, which wraps around and leaves the end unseen."""
    average = num // segments
    if average >= length and rng is not None:
        starts = [i * average + int(rng.integers(0, average - length, endpoint=True)) for i in range(segments)]
    elif average >= length:
        starts = [i * average + (average - 1) // 2 for i in range(segments)]
    else:
        starts = [i * max(average, 1) for i in range(segments)]
    return [(start + step) % num for start in starts for step in range(length)]


def segment_frames(num: int, segments: int, length: int, rng: np.random.Generator | None) -> list[int]:
    """A run of `length` frames of each of `segments` equal parts of `num`: at a random place, or (no `rng`) in the middle.

    Of fewer frames than parts some come more than once, in order (TSN, Wang et al. 2016, samples sparsely like this).
    """
    found = []
    for i in range(segments):
        start = (2 * i + 1) * num // (2 * segments) - (length - 1) // 2
        if rng is not None:
            first, last = i * num // segments, (i + 1) * num // segments
            start = int(rng.integers(first, max(first, last - length), endpoint=True))
        start = min(max(start, 0), max(num - length, 0))
        found += [min(start + step, num - 1) for step in range(length)]
    return found


def uniform_frames(num: int, most: int) -> list[int]:
    """The middles of min(num, most) equal parts: each frame once where there are not more than `most`."""
    parts = min(num, most)
    return [(2 * i + 1) * num // (2 * parts) for i in range(parts)]


def timed_frames(num: int, fps: float, wanted: float, most: int) -> list[int]:
    """`wanted` frames a second of a video of `fps`, the middle of each stretch; uniformly where that were above `most`."""
    stride = max(fps / wanted, 1.0)
    parts = max(1, math.floor(num / stride))
    if parts > most or num < stride:
        return uniform_frames(num, min(parts, most))
    return [min(int((i + 0.5) * stride), num - 1) for i in range(parts)]


def choose(config: TsnConfig, num: int, rng: np.random.Generator | None) -> list[int]:
    """The stored frames that the phase `tsn` sees of a clip of `num`: seg_num x seg_len of them."""
    pick = legacy_frames if config.sampling == "legacy" else segment_frames
    return pick(num, config.seg_num, config.seg_len, rng)


def choose_features(config: TsnConfig, num: int, fps: float) -> list[int]:
    """The frames of a video of `num` frames at `fps` a second of which features are made, in order; legacy repeats some."""
    if config.sampling == "legacy":
        return legacy_frames(num, config.max_frames, 1, None)
    if config.sampling == "fps":
        return timed_frames(num, fps, config.fps, config.max_frames)
    return uniform_frames(num, config.max_frames)


# --- pictures ------------------------------------------------------------------------------------------------------------


def resized_shape(height: int, width: int, short: int, resize: str) -> tuple[int, int]:
    """Height and width before the crop; a picture whose shorter side fits stays as it is.

    legacy squeezes it to 4:3 or 3:4, whatever it was (341 x 256 for 256); keep keeps the ratio.
    """
    if min(height, width) == short:
        return height, width
    ratio = 4 / 3 if resize == "legacy" else max(height, width) / min(height, width)
    long = int(short * ratio) if resize == "legacy" else round(short * ratio)
    return (long, short) if width < height else (short, long)


def prepare(config: TsnConfig, frame: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (S, S, 3) uint8: resized as config.resize says, the middle cut out."""
    size, shape = config.target_size, (frame.shape[0], frame.shape[1])
    height, width = resized_shape(*shape, config.short_size, config.resize)
    if (height, width) != shape:
        frame = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))
    top, left = (round((side - size) / 2) for side in (height, width))  # to even where it is halfway, as the original
    return frame[top : top + size, left : left + size]


def feature_spec(config: TsnConfig) -> FeatureSpec:
    """What the features stage must know of the phase `tsn`."""
    check_tsn(config)
    chosen, prepared = partial(choose_features, config), partial(prepare, config)
    return FeatureSpec(feature_dim(config.model), chosen, prepared, FRAMES_AT_ONCE)


# --- samples -------------------------------------------------------------------------------------------------------------


def tsn_clip(config: TsnConfig) -> ClipSpec:
    """Some frames and no sound."""
    chosen = partial(choose, config)
    return ClipSpec(config.seg_num * config.seg_len, sample_rate=0, audio_seconds=0.0, choose=chosen)


def tagger_clip(config: TaggerConfig) -> ClipSpec:
    """The features of a clip's frames, and its sound where the audio branch is on."""
    model = config.model
    rate, seconds = (model.sample_rate, float(model.audio_seconds)) if model.audio else (0, 0.0)
    return ClipSpec(0, rate, seconds, features="tsn")


def tsn_transform(config: TsnConfig, facts: Facts, training: bool) -> Callable[[Sample], Batch]:
    """frames (T, 3, S, S) uint8 and tags (C,) float32; one crop and one flip for the whole clip."""
    check_tsn(config)

    def apply(sample: Sample) -> Batch:
        if sample.frames is None:
            raise InputError(
                f"clip {sample.id} has no picture; leave it out of the dataset, videotag looks at pictures"
            )
        if training and config.min_area < 1:
            frames = resized_crop(sample.frames, config.target_size, sample.rng, config.min_area, flip=config.flip)
        else:
            cut = np.stack([prepare(config, frame) for frame in sample.frames])
            frames = torch.from_numpy(cut).permute(0, 3, 1, 2)
            frames = frames.flip(-1) if training and config.flip and sample.rng.random() < 0.5 else frames
        batch: Batch = {"frames": frames.contiguous()}
        if sample.annotation:
            batch["tags"] = one_tag(sample, multi_hot(sample, facts), config.loss == "softmax")
        return batch

    return apply


def one_tag(sample: Sample, tags: Tensor, single: bool) -> Tensor:
    """The tags; InputError where there must be one and are none or several."""
    if single and tags.sum() != 1:
        raise InputError(
            f"clip {sample.id} has {int(tags.sum())} tags; loss softmax of videotag.tsn takes clips with one: set it to bce"
        )
    return tags


def tagger_transform(config: TaggerConfig, facts: Facts, training: bool) -> Callable[[Sample], Batch]:
    """features (max_frames, D) float32 of which `length` are there, their `times` (max_frames,) in seconds, tags (C,).

    With the audio branch `wave` (N,), `wave_length` and `has_audio`. Training leaves frames out, draws by how much the
    clip is mixed with another (`mix`), and counts the tags, so that the engine tells how many clips a step has.
    """
    check_tagger(config)

    def apply(sample: Sample) -> Batch:
        batch = frame_features(sample, config, config.frame_dropout if training else 0.0)
        if config.model.audio:
            batch |= sound(sample.wave, config.model.sample_rate * config.model.audio_seconds)
        if sample.annotation:
            batch["tags"] = multi_hot(sample, facts)
        if training:
            batch["num_tags"] = batch["tags"].sum()
            if config.mixup:
                batch["mix"] = torch.tensor(sample.rng.beta(config.mixup, config.mixup), dtype=torch.float32)
        return batch

    return apply


def frame_features(sample: Sample, config: TaggerConfig, dropout: float) -> Batch:
    """features, length and times, filled up with zeros; without a share `dropout` of the frames, one stays at least."""
    features, times, dim = sample.features, sample.feature_times, config.model.feature_dim
    assert features is not None and times is not None, "the loader hands over what ClipSpec.features names"
    if features.shape[1] != dim:
        raise InputError(
            f"clip {sample.id}: its frames have {features.shape[1]} features; set videotag.tagger.model.feature_dim ({dim}) "
            "to that"
        )
    kept = np.array(uniform_frames(len(features), config.max_frames))
    if dropout:
        left = sample.rng.random(len(kept)) >= dropout
        left[sample.rng.integers(len(kept))] = True
        kept = kept[left]
    batch: Batch = {
        "features": torch.zeros(config.max_frames, dim),
        "length": torch.tensor(len(kept)),
        "times": torch.zeros(config.max_frames),
    }
    batch["features"][: len(kept)] = torch.from_numpy(features[kept].astype(np.float32))
    batch["times"][: len(kept)] = torch.from_numpy(times[kept].astype(np.float32))
    return batch
