"""What temporal action detection costs besides its network.

    python benchmarks/tad.py [detections] [decoding]

detections: soft-NMS and mean average precision over IoU thresholds 0.3 to 0.7 of random detections of 20 classes, each against a
straightforward loop over detections, to which its results must be equal to 1e-9: the nested loops that compiled versions of
soft-NMS consist of, in Python; for the evaluation a loop over pandas rows, as ActivityNet's toolkit has it. The second peer
of each loops over plain NumPy arrays instead. Peers run once, which takes minutes, ours is the median of five runs.

decoding: the frames of all windows of an epoch, of MP4s of two minutes (320 x 180 pixels, 30 frames/s): from stores, for which
each video is decoded once at the size and stride of the windows, against a reader that for each window opens its MP4, goes to
the keyframe before it, decodes up to its end and scales every fourth frame. What becomes of the frames then costs either the
same and is not timed.

Everything is timed by CPU seconds, which other programs on the machine change little.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from benchmarks import table as speeds
from benchmarks.table import Row, rates
from models import segment_scores, segments
from models.adatad import FAMILY
from models.segments import Segments
from tasks import stores
from tasks.data import video
from tasks.data.frame_store import FrameStore
from tasks.data.windows import WindowDataset
from tasks.datasets.demo import ffmpeg_binary

PREDICTIONS, VIDEOS = 400_000, 200
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
CLASSES, SECONDS, TRUE = 20, 200.0, 3325  # of THUMOS-14's test videos: classes, mean length, true segments
SIGMA, MIN_SCORE = 0.7, 0.001
REPEATS, EQUAL = 5, 1e-9
NUM_VIDEOS, LENGTH, FPS, EVERY, SHORT_SIDE = 4, 120, 30, 4, 182  # of videos that are decoded: number, seconds; windows
STORES = stores.Stores(0, EVERY, SHORT_SIDE, 90, 16000, "pcm16", 1, 1, "processes", 0.0)
ALIKE = 5.5  # levels out of 255 by which JPEGs may differ from their pictures on average; the next raw frame is 8.2 off


def build_detections(num: int, num_videos: int) -> tuple[Segments, Segments]:
    """Detections and truth: half of them lie about a true segment, most of these under its class; scores tell little."""
    rng = np.random.default_rng(0)
    video, start = rng.integers(0, num_videos, TRUE), rng.uniform(0, SECONDS - 10, TRUE)
    label = (video + (rng.random(TRUE) < 0.2)) % CLASSES  # a class or two a video
    truth = Segments(video, label, start, start + rng.gamma(2, 2, TRUE) + 0.5, np.ones(TRUE))
    about, true = rng.random(num) < 0.5, rng.integers(0, TRUE, num)
    length = truth.end[true] - truth.start[true]
    begin = np.where(about, truth.start[true] + 0.3 * length * rng.normal(size=num), rng.uniform(0, SECONDS, num))
    until = begin + np.where(about, length * np.exp(0.3 * rng.normal(size=num)), rng.gamma(2, 3, num))
    begin = begin.clip(0, SECONDS - 0.1)
    until = until.clip(begin + 0.1, SECONDS)
    labels = np.where(about & (rng.random(num) < 0.8), truth.label[true], rng.integers(0, CLASSES, num))
    videos = np.where(about, truth.video[true], rng.integers(0, num_videos, num))
    score = rng.beta(1, 8, num) * 0.9 + 0.1 * about * rng.random(num)
    return Segments(videos, labels, begin, until, score), truth


# --- the peers -----------------------------------------------------------------------------------------------------------


def groups_of(found: Segments) -> list[np.ndarray]:
    """Rows of each class of each video."""
    key = found.video * CLASSES + found.label
    order = np.argsort(key, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(key[order])) + 1)


def nms_nested(found: Segments) -> np.ndarray:
    """(N,) scores after soft-NMS, 0 where dropped: for each detection a loop for the best and a loop for the others."""
    scores = np.zeros(len(found))
    for rows in groups_of(found):
        left = [[row, found.start[row].item(), found.end[row].item(), found.score[row].item()] for row in rows.tolist()]
        while left:
            best = 0
            for i in range(1, len(left)):
                if left[i][3] > left[best][3]:
                    best = i
            row, start, end, score = left.pop(best)
            scores[row] = score if score >= MIN_SCORE else 0
            kept = []
            for other in left:
                shared = max(0.0, min(end, other[2]) - max(start, other[1]))
                iou = shared / ((end - start) + (other[2] - other[1]) - shared)
                other[3] *= math.exp(-iou * iou / SIGMA)
                if other[3] >= MIN_SCORE:
                    kept.append(other)
            left = kept
    return scores


def nms_rowwise(found: Segments) -> np.ndarray:
    """The same with NumPy in place of the inner loops."""
    scores = np.zeros(len(found))
    for rows in groups_of(found):
        start, end, score = found.start[rows], found.end[rows], found.score[rows]
        while len(rows):
            best = score.argmax()
            scores[rows[best]] = score[best] if score[best] >= MIN_SCORE else 0
            shared = np.maximum(np.minimum(end, end[best]) - np.maximum(start, start[best]), 0)
            iou = shared / np.maximum((end - start) + (end[best] - start[best]) - shared, 1e-300)
            score = score * np.exp(-(iou**2) / SIGMA)
            score[best] = 0
            kept = score >= MIN_SCORE
            rows, start, end, score = rows[kept], start[kept], end[kept], score[kept]
    return scores


def map_pandas(found: Segments, truth: Segments) -> float:
    """Mean average precision: every row in order of score looks for its best true segment that is still free."""
    columns = ["video", "label", "start", "end", "score"]
    detections, ground = (pd.DataFrame({name: getattr(part, name) for name in columns}) for part in (found, truth))
    areas = []
    for label, true in ground.groupby("label"):
        true = true.reset_index(drop=True)
        of_video = true.groupby("video")
        own = detections[detections["label"] == label].sort_values("score", ascending=False, kind="stable")
        right = np.zeros((len(THRESHOLDS), len(own)))
        taken = np.zeros((len(THRESHOLDS), len(true)), dtype=bool)
        for k, (_, row) in enumerate(own.iterrows()):
            if row["video"] in of_video.groups:
                near = of_video.get_group(row["video"])
                take(row, near["start"].to_numpy(), near["end"].to_numpy(), near.index.to_numpy(), right[:, k], taken)
        areas.append(area(right, len(true)))
    return float(np.mean(areas))


def map_rowwise(found: Segments, truth: Segments) -> float:
    """The same on NumPy arrays, the true segments of each video looked up beforehand."""
    areas = []
    for label in np.unique(truth.label):
        rows_of = np.flatnonzero(truth.label == label)
        of_video = {video: rows_of[truth.video[rows_of] == video] for video in np.unique(truth.video[rows_of])}
        own = found[found.label == label]
        own = own[np.argsort(-own.score, kind="stable")]
        right = np.zeros((len(THRESHOLDS), len(own)))
        taken = np.zeros((len(THRESHOLDS), len(truth)), dtype=bool)
        for k in range(len(own)):
            rows = of_video.get(own.video[k])
            if rows is not None:
                row = {"start": own.start[k], "end": own.end[k]}
                take(row, truth.start[rows], truth.end[rows], rows, right[:, k], taken)
        areas.append(area(right, int((truth.label == label).sum())))
    return float(np.mean(areas))


def take(
    row: Any, start: np.ndarray, end: np.ndarray, places: np.ndarray, right: np.ndarray, taken: np.ndarray
) -> None:
    """Give a detection, at each threshold, the best of the true segments at `places` that is free and near enough."""
    shared = np.maximum(np.minimum(row["end"], end) - np.maximum(row["start"], start), 0)
    iou = shared / ((row["end"] - row["start"]) + (end - start) - shared)
    order = np.argsort(-iou, kind="stable")
    for t, threshold in enumerate(THRESHOLDS):
        for place in order:
            if iou[place] < threshold:
                break
            if not taken[t, places[place]]:
                taken[t, places[place]] = right[t] = True
                break


def area(right: np.ndarray, num_truth: int) -> np.ndarray:
    """(T,) below precision, made falling, over recall; right (T, N) 1 or 0."""
    hits = right.cumsum(1)
    precision = np.maximum.accumulate((hits / np.arange(1, right.shape[1] + 1))[:, ::-1], axis=1)[:, ::-1]
    return (np.diff(hits / num_truth, prepend=0, axis=1) * precision).sum(1)


# --- ours ----------------------------------------------------------------------------------------------------------------


def nms_ours(found: Segments) -> np.ndarray:
    """(N,) scores after soft-NMS, in the order of the detections that are left."""
    return segments.soft_nms(found, SIGMA, MIN_SCORE).score


def map_ours(found: Segments, truth: Segments, num_videos: int) -> float:
    """Mean average precision."""
    matched = segment_scores.match(found, truth, THRESHOLDS, num_videos, CLASSES)
    return float(segment_scores.mean_average_precision(matched)(np.ones((1, num_videos)))[0])


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median CPU seconds, and the result."""
    times, result = [], None
    for _ in range(repeats):
        began = time.process_time()
        result = call()
        times.append(time.process_time() - began)
    return statistics.median(times), result


def compare(
    title: str, num: int, ours: Callable[[], Any], peer: Callable[[], Any], against: str, asked: str = ""
) -> Row:
    """Detections a CPU second of both, whose results must agree."""
    (mine, result), (theirs, expected) = timed(ours, REPEATS), timed(peer, 1)
    apart = float(np.max(np.abs(result - expected)))
    assert apart <= EQUAL, f"{title}: {apart:.1e} apart"
    return rates(title, "a CPU s", num / mine, num / theirs, against, asked, f"{apart:.0e} apart")


def dropped(scores: np.ndarray) -> np.ndarray:
    """Without those that a peer left at 0."""
    return scores[scores > 0]


# --- decoding ------------------------------------------------------------------------------------------------------------


def make_videos(folder: Path) -> pd.DataFrame:
    """An MP4 of a moving pattern with some grain, copies of it, and their manifest."""
    rows = []
    picture = f"testsrc2=size=320x180:rate={FPS}:duration={LENGTH},noise=alls=8:allf=t"
    command = [ffmpeg_binary(), "-v", "error", "-f", "lavfi", "-i", picture]
    subprocess.run([*command, "-c:v", "libx264", "-pix_fmt", "yuv420p", str(folder / "0.mp4")], check=True)
    annotation = json.dumps({"segments": [(start, start + 5.0, "action") for start in range(5, LENGTH - 5, 10)]})
    for number in range(NUM_VIDEOS):
        path = folder / f"{number}.mp4"
        path.write_bytes((folder / "0.mp4").read_bytes())
        rows.append({"id": path.stem, "path": path.name, "split": "train", "annotation": annotation})
        rows[-1] |= vars(video.probe(path))
    return pd.DataFrame(rows)


def write_stores(table: pd.DataFrame, folder: Path) -> FrameStore:
    """What the stage `stores` makes of them."""
    rows = stores.shard_table(stores.build_shard, folder, table, 0, STORES, folder)  # pyright: ignore[reportArgumentType]
    stores.finish(table.assign(has_video=True), rows, folder / "stores", "")
    return FrameStore(folder / "stores")


class Files:
    """The peer: gives frames as the store does, straight from the MP4s."""

    def __init__(self, table: pd.DataFrame, folder: Path) -> None:
        self.folder, self.frames = folder, dict(zip(table["id"], table["frames"], strict=True))

    def num_frames(self, name: str) -> int:
        """Every fourth counts."""
        return -(-self.frames[name] // EVERY)

    def step(self, name: str) -> float:
        """Seconds from one to the next."""
        return EVERY / FPS

    def decode(self, name: str, columns: Sequence[int]) -> np.ndarray:
        """(T, H, W, 3) uint8 RGB."""
        images = []
        with av.open(self.folder / f"{name}.mp4") as container:
            stream = container.streams.video[0]
            assert stream.time_base is not None
            container.seek(round(columns[0] * EVERY / FPS / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                number = round(float((frame.pts or 0) * stream.time_base) * FPS)
                if number >= columns[0] * EVERY and number % EVERY == 0:
                    images.append(video.scale(frame, SHORT_SIDE))
                if number >= columns[-1] * EVERY:
                    break
        return np.stack(images)


def open_windows(table: pd.DataFrame, frames: Any, training: bool) -> WindowDataset:
    """Windows of 768 frames, as the presets have them, up to where a frame is cropped."""
    phase = FAMILY.phases["finetune"]
    spec = phase.clip(replace(phase.tiny, model=replace(phase.tiny.model, window=768)))
    rows = pa.RecordBatch.from_pandas(table)
    return WindowDataset(rows, frames, spec, lambda sample: {"frames": torch.as_tensor(sample.frames)}, 0, training)


def decoding(quick: bool) -> Iterator[Row]:
    """An epoch of each kind, the first of which waits for the stores to be written, and a later one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = make_videos(folder)
        (writing, store), files = timed(partial(write_stores, table, folder), 1), Files(table, folder)
        for title, training in (("evaluation", False), ("training", True)):
            ours, theirs = (open_windows(table, frames, training) for frames in (store, files))
            (later, mine), (peer, expected) = (
                timed(partial(deliver, ours), 1 if quick else 3),
                timed(partial(deliver, theirs), 1),
            )
            apart = np.abs(mine.astype(np.float32) - expected).mean()
            assert apart < ALIKE, f"{title}: not the same frames, {apart:.1f} levels apart"
            title = f"{len(ours)} windows of {NUM_VIDEOS} long videos, {title}"
            for epoch, seconds in (("the first epoch, stores written", writing + later), ("later epochs", later)):
                against = "seeks into the MP4s"
                yield rates(f"{title}, {epoch}", "windows a CPU s", len(ours) / seconds, len(ours) / peer, against)


def deliver(windows: WindowDataset) -> np.ndarray:
    """An epoch's windows one after another; some pixels of all their frames."""
    return np.stack([windows[0, row]["frames"][:, ::8, ::8].numpy().copy() for row in range(len(windows))])


def detections(quick: bool) -> Iterator[Row]:
    """Soft-NMS and evaluation."""
    num, videos = (PREDICTIONS // 100, VIDEOS // 100) if quick else (PREDICTIONS, VIDEOS)
    found, truth = build_detections(num, videos)
    title = f"soft-NMS of {num:,} detections of {videos} videos"
    ours = partial(nms_ours, found)
    yield compare(title, num, ours, lambda: dropped(nms_nested(found)), "nested loops", ">= 50")
    yield compare(title, num, ours, lambda: dropped(nms_rowwise(found)), "a loop over NumPy rows")
    title, ours = (
        f"mean average precision of {num:,} detections of {videos} videos",
        partial(map_ours, found, truth, videos),
    )
    yield compare(title, num, ours, lambda: map_pandas(found, truth), "a loop over pandas rows", ">= 50")
    yield compare(title, num, ours, lambda: map_rowwise(found, truth), "a loop over NumPy rows")


PARTS = {"detections": detections, "decoding": decoding}

if __name__ == "__main__":
    speeds.main(__doc__, PARTS)
