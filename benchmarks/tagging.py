"""What tagging costs besides training.

    python benchmarks/tagging.py [gap] [features]

gap: GAP@20 of a million predictions, the 20 best of 3,396 classes of each of 50,000 videos, against a straightforward loop:
every prediction is an item of a list, the list is sorted, and precision is added up from its top; its result must be equal
to 1e-9. Once for the ranked predictions alone, once from all scores of each video: there the loop sorts every video's, and
what is kept of them is told too. Scores are made up beforehand and not part of the time.

features: frames of a video of 640 x 360 that become features, as the features stage makes them, against a loop that loads
every frame with OpenCV, samples them, and puts all through the network at once, as VideoTag's own does. Once with a network
that is but a mean, which leaves the reading, once with a ResNet-18. Features should agree but for rounding of colours. What
the memory grew to is told too.

One thread, CPU seconds, which other programs on the machine change little; of GAP the loop runs once, ours is the median of
five runs; of features both run once.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import table
from benchmarks.table import Row, costs, rates
from models.family import Facts, FeatureSpec
from models.tag_scores import GlobalPrecision
from models.videotag.config import TsnConfig, TsnModel
from models.videotag.data import feature_spec
from models.videotag.tsn import Tsn
from tasks.data.extraction import Extractor, Features
from tasks.datasets.demo import ffmpeg_binary

CLASSES, K, TAGS = 3396, 20, 3.4  # of VideoTag: classes, listed tags; of YouTube-8M: tags a video, on the average
VIDEOS, BATCH = 50_000, 1000  # videos; scored together
SECONDS = 20  # of the video
REPEATS, EQUAL = 5, 1e-9
TSN = TsnConfig(
    model=TsnModel(depth=18, model_name="none", head="fresh"), seg_num=3, seg_len=1, loss="bce", sampling="uniform",
    fps=1.0, max_frames=300, resize="keep", short_size=256, target_size=224, min_area=1.0, flip=False,
)  # fmt: skip

# --- GAP -------------------------------------------------------------------------------------------------------------------


def build_scores(num: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of scores (BATCH, CLASSES) float32 and truth, the same each time; true tags score higher than others."""
    for start in range(0, num, BATCH):
        rng = np.random.default_rng(start)
        shape = min(BATCH, num - start), CLASSES
        truth = rng.random(shape, dtype=np.float32) < TAGS / CLASSES
        logits = rng.standard_normal(shape, dtype=np.float32) - 6 + 4 * truth
        yield 1 / (1 + np.exp(-logits)), truth


def gap_looped(found: list[tuple[float, bool]], num_right: int) -> float:
    """Sort everything, then down the list; predictions of equal score come in together."""
    found = sorted(found, key=lambda pair: -pair[0])
    area, hits, place = 0.0, 0, 0
    while place < len(found):
        score, own = found[place][0], 0
        while place < len(found) and found[place][0] == score:
            own += found[place][1]
            place += 1
        hits += own
        area += own * hits / place
    return area / num_right


def best_looped(scores: np.ndarray, truth: np.ndarray) -> list[tuple[float, bool]]:
    """The K best classes of each video, all of whose classes are sorted."""
    found = []
    for row, right in zip(scores.tolist(), truth.tolist(), strict=True):
        order = sorted(range(len(row)), key=row.__getitem__, reverse=True)
        found += [(row[label], right[label]) for label in order[:K]]
    return found


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and the result."""
    began = time.process_time()
    result = call()
    return time.process_time() - began, result


def compare(title: str, num: int, ours: tuple[float, float], peer: tuple[float, float]) -> Row:
    """Predictions a CPU second of both, (seconds, GAP) each."""
    apart = abs(ours[1] - peer[1])
    assert apart <= EQUAL, f"{title}: {apart:.1e} apart"
    return rates(title, "a CPU s", num / ours[0], num / peer[0], "sorting them in a loop", note=f"{apart:.0e} apart")


def gap(quick: bool) -> Iterator[Row]:
    """From the ranked predictions, and from all scores."""
    torch.set_num_threads(1)
    num = 1000 if quick else VIDEOS
    metric, found = GlobalPrecision(K), list[tuple[float, bool]]()
    ours = theirs = 0.0
    for scores, truth in build_scores(num):
        seconds, _ = timed(lambda scores=scores, truth=truth: metric.update(scores, truth))
        ours += seconds
        seconds, best = timed(lambda scores=scores, truth=truth: best_looped(scores, truth))
        theirs += seconds
        found += best
    total = num * min(K, CLASSES)
    runs = [timed(metric.compute) for _ in range(REPEATS)]
    mine = statistics.median(seconds for seconds, _ in runs), runs[0][1]
    peer = timed(lambda: gap_looped(found, metric.num_right))
    kept = sum(part.nbytes for part in (*metric.score, *metric.hit))
    yield compare(f"GAP@{K} of {total:,} ranked predictions", total, mine, peer)
    whole, all_sorted = (mine[0] + ours, mine[1]), (peer[0] + theirs, peer[1])
    yield compare(f"GAP@{K} from {CLASSES} scores a video", total, whole, all_sorted)
    yield costs(f"memory of GAP@{K} of {num:,} videos", "MB", kept / 1e6, num * CLASSES * 4 / 1e6, "all scores")


# --- features ----------------------------------------------------------------------------------------------------------


class MeanColor(nn.Module):
    """What costs next to nothing."""

    def extract(self, frames: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, 3) float32 in [0, 1]."""
        return frames.float().mean((2, 3)) / 255


def build_video(path: Path, seconds: int) -> None:
    """A moving test picture, 30 frames a second."""
    source = f"testsrc2=size=640x360:rate=30:duration={seconds}"
    command = [ffmpeg_binary(), "-loglevel", "error", "-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", str(path)]
    subprocess.run(command, check=True)


def features_looped(path: Path, module: Any, spec: FeatureSpec) -> np.ndarray:
    """(T, D): every frame of the video in a list, then those chosen, then the network on all of them."""
    video, frames = cv2.VideoCapture(str(path)), []
    rate = video.get(cv2.CAP_PROP_FPS)
    while (read := video.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    chosen = [spec.prepare(frames[number]) for number in spec.choose(len(frames), rate)]
    with torch.inference_mode():
        return module.extract(torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2).contiguous()).numpy()


def features_ours(path: Path, module: Any, spec: FeatureSpec) -> np.ndarray:
    """(T, D)."""
    ((_, found),) = Extractor(module, spec, torch.device("cpu")).extract([path])
    assert isinstance(found, Features), found
    return found.rows


def memory() -> float:
    """MB, the most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def features(quick: bool) -> Iterator[Row]:
    """Reading alone, and with a network. Ours is run first: the memory's peak never falls."""
    torch.set_num_threads(1)
    seconds = 4 if quick else SECONDS
    spec = feature_spec(TSN)
    network = Tsn(TSN, Facts({"tag": ["one"]}, 0.0, 1.0)).eval()
    cases = (("reading", MeanColor(), replace(spec, dim=3)), ("reading and ResNet-18", network, spec))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        build_video(path, seconds)
        for title, module, own in cases:
            before = memory()
            mine = timed(lambda module=module, own=own: features_ours(path, module, own))
            between = memory()
            peer = timed(lambda module=module, own=own: features_looped(path, module, own))
            num, apart = len(mine[1]), np.abs(mine[1] - peer[1]).mean() / np.abs(peer[1]).mean()
            title = f"features of a {seconds} s video's frames, {title}"
            against = "a loop that loads the video first"
            yield rates(title, "frames a CPU s", num / mine[0], num / peer[0], against, note=f"{apart:.1%} apart")
            if module is not network:  # later the peak is the peer's already
                yield costs(
                    f"memory to read a {seconds} s video's frames", "MB", between - before, memory() - before, against
                )


PARTS = {"gap": gap, "features": features}

if __name__ == "__main__":
    table.main(__doc__, PARTS)
