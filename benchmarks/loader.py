"""What the stores save: clips from them against decoding MP4s in the training loop; and how long training waits for data.

    python benchmarks/loader.py [--repeats 3]

First, clips of 10 s become 16 frames of 224 pixels and 16 kHz sound in three ways: from the stores, as a training phase
gets them; by OpenCV seeking each frame and ffmpeg extracting the sound, as T3-AV's authors do; and by our own decode pass.
They are timed in turns on one thread each, by the CPU time of the process and its children, which other programs on the
machine change little; files are in the page cache. Then params.yaml's own fine-tuning of t3av starts on its own demo set,
and the engine says what share of each epoch it waited.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from ruamel.yaml import YAML

from models.family import Batch, ClipSpec, Facts, Sample
from models.samples import Augmentation
from models.t3av import FAMILY
from tasks import clean, download, jobs, params, storage, stores, subset, train
from tasks.data import manifest
from tasks.data.audio import FULL_SCALE
from tasks.data.frame_store import decode_jpegs
from tasks.data.loader import open_split
from tasks.data.video import Preparation, read_clip
from tasks.datasets import vggsound
from tasks.datasets.demo import ffmpeg_binary
from tasks.engine import distributed

ROOT = Path(__file__).resolve().parents[1]
GOPS = {"long": 250, "short": 50}  # dataset -> frames from one keyframe to the next
CLIPS, SECONDS, FRAMES, SIZE, RATE = 3, 10, 16, 224, 16000
STORED = {"num_frames": FRAMES, "short_side": 256, "quality": 90, "sample_rate": RATE}  # as the preset `vggsound`
EPOCHS = 3  # of fine-tuning; the first warms up
LABEL = "testing"

# --- what is read --------------------------------------------------------------------------------------------------------


def write_params() -> None:
    """The repository's params.yaml, with the MP4s' data sets beside the demo's and fine-tuning from random weights."""
    values = params.read(ROOT / "params.yaml")
    changes = {"download": {}, "subset": {"mode": "all"}, "clean": {"val_share": 0}, "stores": STORED}
    for dataset in GOPS:
        for section, change in changes.items():
            values[section][dataset] = values[section]["sounds"] | change
    values["t3av"]["finetune"] |= {"start_from": "none", "epochs": EPOCHS, "eval_interval": EPOCHS}
    with params.PARAMS.open("w") as file:
        YAML(typ="safe").dump(values, file)


def write_clips(dataset: str, gop: int) -> None:
    """H.264 and AAC of 340 x 256 pixels at 25 frames/s in VGGSound's layout: a moving pattern, a tone, noise in both."""
    rows = [vggsound.row(f"{dataset}{k}", 0, LABEL, "train") for k in range(CLIPS)]
    raw = storage.DATA / dataset / "raw"
    vggsound.write(pd.DataFrame(rows), raw)
    (raw / "video").mkdir()
    for k, row in enumerate(rows):
        picture = f"testsrc2=s=340x256:r=25:d={SECONDS},scroll=h=0.004,noise=alls=6:allf=t:all_seed={k}"
        sound = f"aevalsrc=0.3*sin({440 + k}*2*PI*t)+0.05*random({k}):s=44100:d={SECONDS}"
        inputs = ["-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", sound]
        codecs = ["-c:v", "libx264", "-g", str(gop), "-pix_fmt", "yuv420p", "-c:a", "aac"]
        subprocess.run([ffmpeg_binary(), "-v", "error", *inputs, *codecs, str(raw / str(row["path"]))], check=True)


def prepare() -> None:
    """A project in the working directory, its data brought to the stores by the stages themselves."""
    write_params()
    for dataset, gop in GOPS.items():
        write_clips(dataset, gop)
    download.download("sounds", params.stage(download.Download, "download", "sounds"))
    for dataset in (*GOPS, "sounds"):
        subset.subset(dataset, params.stage(subset.Subset, "subset", dataset))
        clean.clean(dataset, params.stage(clean.Clean, "clean", dataset))
        stores.stores(dataset, params.stage(stores.Stores, "stores", dataset))


# --- clips by the second ---------------------------------------------------------------------------------------------------


def build_transform() -> Callable[[Sample], Batch]:
    """t3av's for fine-tuning at its published size: a random crop, the sound louder or softer and turned."""
    tiny = FAMILY.phases["finetune"].tiny
    model = replace(tiny.model, num_frames=FRAMES, frame_size=SIZE, sample_rate=RATE, audio_duration=float(SECONDS))
    augment = Augmentation(min_area=0.35, time_mask=24, freq_mask=8, gain=6.0, roll=True, modality_dropout=0.0)
    config = replace(tiny, model=model, augment=augment)
    return FAMILY.phases["finetune"].transform(config, Facts({"label": [LABEL]}, -5.0, 4.5), True)


def seek(path: Path) -> Batch:
    """The peer: every frame sought and resized by OpenCV, then the sound out of an ffmpeg process."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames = []
    for number in np.linspace(0, capture.get(cv2.CAP_PROP_FRAME_COUNT) - 1, FRAMES).round():
        capture.set(cv2.CAP_PROP_POS_FRAMES, number)
        picture = cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB)
        frames.append(cv2.resize(picture, (SIZE, SIZE)))
    command = [ffmpeg_binary(), "-v", "error", "-threads", "1", "-i", str(path), "-vn"]
    command += ["-ac", "1", "-ar", str(RATE), "-f", "s16le", "-"]
    sound = np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.int16)
    wave = torch.zeros(SECONDS * RATE)
    wave[: len(sound)] = torch.from_numpy(sound[: len(wave)] / np.float32(FULL_SCALE))
    return {"frames": torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), "wave": wave}


def decode(path: Path, transform: Callable[[Sample], Batch]) -> Batch:
    """The stores' own decode pass, in the loop: JPEG and back included, as prediction does it."""
    stored = read_clip(path, Preparation(**STORED))
    assert stored.wave is not None
    wave = stored.wave[: SECONDS * RATE] / np.float32(FULL_SCALE)
    rng = np.random.default_rng(0)
    return transform(Sample(path.stem, decode_jpegs(stored.jpegs), wave, {"label": LABEL}, rng))


def timed(make: Callable[..., Batch], *arguments: object) -> float:
    """CPU seconds of make(*arguments), one clip; those of child processes included."""
    began = cpu_seconds()
    batch = make(*arguments)
    used = cpu_seconds() - began
    assert batch["frames"].shape == (FRAMES, 3, SIZE, SIZE) and batch["wave"].shape == (SECONDS * RATE,)
    return used


def cpu_seconds() -> float:
    """Used so far by this process and the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def compare(dataset: str, repeats: int) -> None:
    """Print clips a CPU second from the stores and by both ways of decoding, which meet the same clips in turns."""
    transform = build_transform()
    clips = open_split(dataset, "train", ClipSpec(FRAMES, RATE, float(SECONDS)), transform, 0)
    paths = [storage.DATA / dataset / path for path in manifest.read(dataset)["path"]]
    times = [
        (timed(clips.__getitem__, (epoch, row)), timed(seek, path), timed(decode, path, transform))
        for epoch in range(repeats + 1)
        for row, path in enumerate(paths)
    ][len(paths) :]  # the first round loads libraries
    ours, peer, own = (statistics.median(column) for column in zip(*times, strict=True))
    kbits = statistics.mean(path.stat().st_size for path in paths) * 8 / 1000 / SECONDS
    title = f"{dataset} GOP ({GOPS[dataset]} frames, {kbits:.0f} kbit/s)"
    verdict = "" if peer >= 10 * ours else "  MISSED"
    print(f"{title}, OpenCV seeks + ffmpeg{1 / ours:>9.1f}{1 / peer:>9.2f}{peer / ours:>8.1f}   >= 10{verdict}")
    print(f"{title}, our decode pass      {1 / ours:>9.1f}{1 / own:>9.2f}{own / ours:>8.1f}", flush=True)


# --- waiting ---------------------------------------------------------------------------------------------------------------


def wait() -> None:
    """Fine-tune on the demo and print what the engine says of each epoch after the first."""
    job = jobs.read_job("t3av", "finetune")
    steps = int((manifest.read("sounds")["split"] == "train").sum()) // job.settings.batch_size
    job = replace(job, settings=replace(job.settings, log_interval=steps))
    shares: list[float] = []

    def log(figures: dict[str, float], step: int) -> None:
        if "train/data_wait_share" in figures:
            shares.append(figures["train/data_wait_share"])

    with distributed.launched(job.settings.device) as place, contextlib.redirect_stdout(io.StringIO()):
        train.train(job, place, log)
    share = statistics.mean(shares[1:])
    each = ", ".join(f"{value:.1%}" for value in shares[1:])
    workers, verdict = job.settings.num_workers, "" if share < 0.05 else "  MISSED"
    print(f"waiting for data: {share:.1%} of fine-tuning   < 5%{verdict}")
    print(
        f"  ({each} of epochs 2 to {EPOCHS}, {steps} steps of {job.settings.batch_size} clips each, {workers} worker)"
    )


def main() -> None:
    """Make the data, then time both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(io.StringIO()):
            prepare()
        print(
            f"16 frames + 10 s of sound, {os.cpu_count()} CPU cores, torch {torch.__version__}, OpenCV {cv2.__version__}"
        )
        print(f"{'clips per CPU second':<60}{'ours':>9}{'peer':>9}{'ratio':>8}   goal")
        torch.set_num_threads(1)
        for dataset in GOPS:
            compare(dataset, repeats)
        torch.set_num_threads(threads)
        wait()


if __name__ == "__main__":
    main()
