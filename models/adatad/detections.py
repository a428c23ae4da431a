"""What becomes of adatad's windows: the detections of whole videos, and how good they are while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from models import segments
from models.adatad.config import FinetuneConfig
from models.family import Batch, ClipInfo, Facts, InputError
from models.segment_scores import match, mean_average_precision
from models.segments import Segments

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)  # IoU in time from which on a detection meets a segment; the headline's mean
FOUND = ("starts", "ends", "scores", "classes", "clip", "window_start")  # of a module's predictions for windows
TRUE = ("truth_starts", "truth_ends", "truth_classes", "clip")  # of a batch


def detect(
    predictions: Mapping[str, np.ndarray], config: FinetuneConfig, clip_scores: np.ndarray | None = None
) -> Segments:
    """The detections of each video, by video and then the best first, out of a module's predictions for windows.

    starts, ends, scores, classes (W, K), class -1 = none; clip, window_start (W,). A window given twice counts once.
    `clip_scores` (V, C) in [0, 1], of a classifier of whole videos, are multiplied in; at 0 nothing is detected.
    """
    rows = segments.once(predictions["clip"], predictions["window_start"])
    one = {name: predictions[name][rows] for name in FOUND}
    kept = one["classes"] >= 0
    video = np.broadcast_to(one["clip"][:, None], kept.shape)[kept].astype(np.int64)
    bounds = [one[name][kept].astype(np.float64) for name in ("starts", "ends", "scores")]
    windows = Segments(video, one["classes"][kept].astype(np.int64), *bounds)
    found = segments.soft_nms(windows, config.nms_sigma, config.min_score)
    if clip_scores is not None:
        found = segments.weighted(found, clip_scores)
        found = found[found.score > 0]
    return segments.best_of_each(found, config.max_per_video)


def merge(config: FinetuneConfig, predictions: Batch) -> Batch:
    """Predictions for all windows of some videos -> `padded` of their detections."""
    found = {name: predictions[name].numpy() for name in FOUND}
    return padded(detect(found, config), int(found["clip"].max()) + 1)


def padded(found: Segments, num_videos: int) -> Batch:
    """starts, ends, scores, classes (V, K) of detections by video: as `detect` gives them, as `answers.present` takes them.

    K is that of the video that has the most; a class is -1 where a video has fewer.
    """
    place = segments.rank_in(found.video)
    shape = (num_videos, int(place.max(initial=-1)) + 1)
    columns = {"starts": found.start, "ends": found.end, "scores": found.score, "classes": found.label}
    batch = {}
    for name, values in columns.items():
        wide = np.full(shape, -1 if name == "classes" else 0, dtype=values.dtype)
        wide[found.video, place] = values
        batch[name] = torch.from_numpy(wide)
    return batch


def true_segments(clips: Sequence[ClipInfo], labels: Sequence[str]) -> Segments:
    """The annotated segments; InputError for a label that training never saw."""
    index = {name: i for i, name in enumerate(labels)}
    rows = []
    for video, clip in enumerate(clips):
        for start, end, label in clip.annotation["segments"]:
            if label not in index:
                raise InputError(f"clip {clip.id}: label {label!r} was not in training; known: {', '.join(labels)}")
            rows.append((video, index[label], start, end, 1.0))
    return segments.from_rows(rows)


def clip_scores(clips: Sequence[ClipInfo], labels: Sequence[str], top: int) -> np.ndarray:
    """(V, C) what a classifier said of whole videos, `class_scores` of their annotations; 0 but for the `top` classes of each.

    InputError for a video of which it said nothing.
    """
    scores = np.zeros((len(clips), len(labels)))
    for row, clip in zip(scores, clips, strict=True):
        if "class_scores" not in clip.annotation:
            raise InputError(
                f"clip {clip.id} has no class_scores; put classifier.json beside the annotations and run the data stages "
                "again, or set adatad.finetune.classifier_top to 0"
            )
        every = np.array([clip.annotation["class_scores"].get(label, 0.0) for label in labels])
        likeliest = np.argsort(-every, kind="stable")[:top]
        row[likeliest] = every[likeliest]
    return scores


class AverageMap:
    """Mean average precision of videos whose windows come in batches, after the post-processing of an evaluation."""

    def __init__(self, config: FinetuneConfig, facts: Facts) -> None:
        self.config, self.num_classes = config, len(facts.labels["label"])
        self.found: list[Batch] = []
        self.true: list[Batch] = []

    def update(self, predictions: Batch, batch: Batch) -> None:
        """Take predictions of windows (see `detect`), and truth_starts, truth_ends, truth_classes (B, G) of their videos."""
        self.found.append({name: predictions[name] for name in FOUND})
        self.true.append({name: batch[name] for name in TRUE})

    def compute(self) -> dict[str, float]:
        """map_average, map_50 in [0, 1]; NaN without a true segment."""
        found, true = (
            {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
            for parts in (self.found, self.true)
        )
        rows = np.unique(true["clip"], return_index=True)[1]
        classes = true["truth_classes"][rows]
        video, place = np.nonzero(classes >= 0)
        start, end = (true[name][rows][video, place] for name in ("truth_starts", "truth_ends"))
        columns = [true["clip"][rows][video], classes[video, place], start, end, np.ones(len(video))]
        truth = segments.from_rows(np.stack(columns, 1))
        num_videos, detected = int(true["clip"].max()) + 1, detect(found, self.config)
        return {
            name: float(
                mean_average_precision(match(detected, truth, thresholds, num_videos, self.num_classes))(
                    np.ones((1, num_videos))
                )[0]
            )
            for name, thresholds in (("map_average", THRESHOLDS), ("map_50", (0.5,)))
        }
