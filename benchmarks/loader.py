"""What the stores save: clips from them against decoding MP4s in the training loop; and how long training waits for data.

    python benchmarks/loader.py [clips] [tsv] [waiting]

clips: clips of 10 s become 16 frames of 224 pixels and 16 kHz sound in three ways: from the stores, as a training phase
gets them; by OpenCV seeking each frame and ffmpeg extracting the sound, as T3-AV's authors do; and by our own decode pass.
The floor is to decode the JPEGs of the 16 chosen frames by a call each, and nothing else: against it stand the clips as they
come from the stores, and as the phase gets them, cropped, resized and turned in time.

tsv: rows of 32 JPEGs of 256 pixels at random, not decoded, against a reader that seeks, reads the line and splits it.

waiting: params.yaml's own fine-tuning of t3av starts on its own demo set, and the engine says what share of each epoch it
waited.

Ways are timed in turns on one thread each, by the CPU time of the process and its children, which other programs on the
machine change little; files are in the page cache.
"""

from __future__ import annotations

import base64
import contextlib
import io
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import simplejpeg
import torch
from ruamel.yaml import YAML

from benchmarks import preparation, table
from benchmarks.preparation import Kind, in_turns, write_clip
from benchmarks.table import Row, rates
from models.family import Batch, ClipSpec, Facts, Sample
from models.samples import Augmentation
from models.t3av import FAMILY
from tasks import clean, download, jobs, params, storage, stores, subset, train
from tasks.data import manifest
from tasks.data.audio import FULL_SCALE
from tasks.data.batches import Clips
from tasks.data.frame_store import FrameShard, FrameStore, decode_jpegs, write_frames
from tasks.data.loader import open_split
from tasks.data.video import Preparation, encode_jpeg, read_clip
from tasks.datasets import vggsound
from tasks.engine import distributed

ROOT = Path(__file__).resolve().parents[1]
# Dataset -> what it consists of.
KINDS = {"long": Kind("GOP 250", 340, 256, 250, 400), "short": Kind("GOP 50", 340, 256, 50, 400)}
CLIPS, SECONDS, FRAMES, SIZE, RATE = 3, preparation.SECONDS, preparation.FRAMES, preparation.SIZE, preparation.RATE
ROWS, COLUMNS = 200, 32  # of the TSV
STORED = {"num_frames": FRAMES, "short_side": 256, "quality": 90, "sample_rate": RATE}  # as the preset `vggsound`
QUICK = 20  # as many turns of ways that take milliseconds
EPOCHS = 3  # of fine-tuning; the first warms up
LABEL = "testing"

# --- what is read --------------------------------------------------------------------------------------------------------


def write_params() -> None:
    """The repository's params.yaml, with the MP4s' data sets beside the demo's and fine-tuning from random weights."""
    values = params.read(ROOT / "params.yaml")
    changes = {"download": {}, "subset": {"mode": "all"}, "clean": {"val_share": 0}, "stores": STORED}
    for dataset in KINDS:
        for section, change in changes.items():
            values[section][dataset] = values[section]["sounds"] | change
    values["t3av"]["finetune"] |= {"start_from": "none", "epochs": EPOCHS, "eval_interval": EPOCHS}
    with params.PARAMS.open("w") as file:
        YAML(typ="safe").dump(values, file)


def write_clips(dataset: str, kind: Kind) -> None:
    """MP4s in VGGSound's layout."""
    rows = [vggsound.row(f"{dataset}{k}", 0, LABEL, "train") for k in range(CLIPS)]
    raw = storage.DATA / dataset / "raw"
    vggsound.write(pd.DataFrame(rows), raw)
    (raw / "video").mkdir()
    for k, row in enumerate(rows):
        write_clip(raw / str(row["path"]), kind, k)


@contextlib.contextmanager
def project(datasets: tuple[str, ...]) -> Iterator[None]:
    """A project as working directory, the data sets brought to the stores by the stages themselves."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(io.StringIO()):
            write_params()
            for dataset in datasets:
                if dataset in KINDS:
                    write_clips(dataset, KINDS[dataset])
                else:
                    download.download(dataset, params.stage(download.Download, "download", dataset))
                subset.subset(dataset, params.stage(subset.Subset, "subset", dataset))
                clean.clean(dataset, params.stage(clean.Clean, "clean", dataset))
                stores.stores(dataset, params.stage(stores.Stores, "stores", dataset))
        yield


# --- clips by the second ---------------------------------------------------------------------------------------------------


def build_transform() -> Callable[[Sample], Batch]:
    """t3av's for fine-tuning at its published size: a random crop, the sound louder or softer and turned."""
    tiny = FAMILY.phases["finetune"].tiny
    model = replace(tiny.model, num_frames=FRAMES, frame_size=SIZE, sample_rate=RATE, audio_duration=float(SECONDS))
    augment = Augmentation(min_area=0.35, time_mask=24, freq_mask=8, gain=6.0, roll=True, modality_dropout=0.0)
    config = replace(tiny, model=model, augment=augment)
    return FAMILY.phases["finetune"].transform(config, Facts({"label": [LABEL]}, -5.0, 4.5), True)


def as_it_is(sample: Sample) -> Batch:
    """Frames (T, H, W, 3) and waveform as they were stored."""
    assert sample.frames is not None and sample.wave is not None
    return {"frames": torch.from_numpy(sample.frames), "wave": torch.from_numpy(sample.wave)}


def seek(path: Path) -> Batch:
    """The peer: OpenCV and ffmpeg."""
    frames, sound = preparation.decode_opencv(path)
    wave = torch.zeros(SECONDS * RATE)
    wave[: len(sound)] = torch.from_numpy(sound[: len(wave)] / np.float32(FULL_SCALE))
    return {"frames": torch.from_numpy(frames).permute(0, 3, 1, 2), "wave": wave}


def decode(path: Path, transform: Callable[[Sample], Batch]) -> Batch:
    """The stores' own decode pass, in the loop: JPEG and back included, as prediction does it."""
    stored = read_clip(path, Preparation(**STORED))
    assert stored.wave is not None
    wave = stored.wave[: SECONDS * RATE] / np.float32(FULL_SCALE)
    rng = np.random.default_rng(0)
    return transform(Sample(path.stem, decode_jpegs(stored.jpegs), wave, {"label": LABEL}, rng))


def compare(dataset: str, repeats: int) -> Iterator[Row]:
    """The clips of a data set from the stores, by both ways of decoding, and their JPEGs alone."""
    transform = build_transform()
    spec = ClipSpec(FRAMES, RATE, float(SECONDS))
    clips = open_split(dataset, "train", spec, transform, 0)
    stored = open_split(dataset, "train", spec, as_it_is, 0)
    cleaned = manifest.read(dataset)
    paths = [storage.DATA / dataset / path for path in cleaned["path"]]
    store = FrameStore(storage.DATA / dataset / "stores")
    jpegs = [store.read(clip, range(FRAMES)) for clip in cleaned["id"]]
    epochs = iter(range(1_000_000))

    def load(clips: Clips) -> None:
        epoch = next(epochs)
        for row in range(len(clips)):
            _ = clips[epoch, row]

    def decode_all() -> None:
        for clip in jpegs:
            _ = [simplejpeg.decode_jpeg(jpeg, "RGB") for jpeg in clip]

    batch, bare = clips[0, 0], stored[0, 0]
    assert batch["frames"].shape == (FRAMES, 3, SIZE, SIZE) and batch["wave"].shape == (SECONDS * RATE,)
    assert bare["frames"].shape == (FRAMES, 256, 340, 3)
    ours = {"ours": lambda: load(clips)}
    decoding = {
        "OpenCV": lambda: [seek(path) for path in paths],
        "decode": lambda: [decode(path, transform) for path in paths],
    }
    floor = {"JPEG": decode_all, "stored": lambda: load(stored)}
    found = in_turns(ours | decoding, repeats) | in_turns(ours | floor, QUICK * repeats)
    speed = {name: len(paths) / seconds for name, seconds in found.items()}
    title = f"10 s clips from the stores, {KINDS[dataset].name}"
    unit = "clips a CPU s"
    yield rates(title, unit, speed["ours"], speed["OpenCV"], "OpenCV seeks + ffmpeg in the loop", ">= 10")
    yield rates(title, unit, speed["ours"], speed["decode"], "our decode pass in the loop")
    yield rates(
        title, unit, speed["stored"], speed["JPEG"], "JPEG decoding alone", ">= 0.8", "before the phase's transform"
    )
    yield rates(title, unit, speed["ours"], speed["JPEG"], "JPEG decoding alone")


def clips(quick: bool) -> Iterator[Row]:
    """From the stores and in the loop."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    distributed.keep_freed_memory()  # as in training; for all ways
    with project(tuple(KINDS)[: 1 if quick else None]):
        for dataset in tuple(KINDS)[: 1 if quick else None]:
            yield from compare(dataset, 1 if quick else 3)


# --- rows of the TSV -------------------------------------------------------------------------------------------------------


def read_line(path: Path, offset: int) -> list[bytes]:
    """The JPEGs of a row, as SwinBERT's reader takes them."""
    with path.open() as file:
        file.seek(offset)
        columns = [column.strip() for column in file.readline().split("\t")]
    return [base64.b64decode(column) for column in columns[2:]]


def tsv(quick: bool) -> Iterator[Row]:
    """All and half of the columns."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames.tsv"
        small = rng.integers(0, 256, (COLUMNS, 20, 15, 3), dtype=np.uint8)
        jpegs = [encode_jpeg(cv2.resize(image, (340, 256)), 90) for image in small]
        write_frames(path, ((f"clip{row}", 340, 256, jpegs) for row in range(ROWS)))
        shard = FrameShard(path)
        order = rng.permutation(ROWS)[: 10 if quick else ROWS].tolist()
        offsets = shard.offsets.tolist()
        assert read_line(path, offsets[1]) == shard.jpegs(1, range(COLUMNS)) == jpegs
        ways: dict[str, Callable[[], object]] = {
            "all": lambda: [shard.jpegs(row, range(COLUMNS)) for row in order],
            "half": lambda: [shard.jpegs(row, range(0, COLUMNS, 2)) for row in order],
            "peer": lambda: [read_line(path, offsets[row]) for row in order],
        }
        speed = {name: len(order) / seconds for name, seconds in in_turns(ways, 1 if quick else 5).items()}
    peer = "reading and splitting the line"
    yield rates("rows of 32 JPEGs from the TSV at random", "rows a CPU s", speed["all"], speed["peer"], peer, ">= 3")
    yield rates("16 of 32 JPEGs a row from the TSV at random", "rows a CPU s", speed["half"], speed["all"], "all 32")


# --- waiting ---------------------------------------------------------------------------------------------------------------


def waiting(quick: bool) -> Iterator[Row]:
    """Fine-tune on the demo; what the engine says of each epoch after the first."""
    with project(("sounds",)):
        job = jobs.read_job("t3av", "finetune")
        steps = int((manifest.read("sounds")["split"] == "train").sum()) // job.settings.batch_size
        job = replace(job, settings=replace(job.settings, log_interval=steps))
        shares: list[float] = []

        def log(figures: dict[str, float], step: int) -> None:
            if "train/data_wait_share" in figures:
                shares.append(figures["train/data_wait_share"])

        with distributed.launched(job.settings.device) as place, contextlib.redirect_stdout(io.StringIO()):
            train.train(job, place, log)
    note = (
        f"epochs 2 to {EPOCHS}, {steps} steps of {job.settings.batch_size} clips, workers: {job.settings.num_workers}"
    )
    share = 100 * statistics.mean(shares[1:])
    yield Row("fine-tuning of the demo: waiting for data", "% of the time", share, asked="< 5", note=note)


PARTS = {"clips": clips, "tsv": tsv, "waiting": waiting}

if __name__ == "__main__":
    table.main(__doc__, PARTS)
