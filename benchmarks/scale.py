"""Time and memory at VGGSound's size: 20,000 against 200,000 clips, each step in a process of its own.

    python benchmarks/scale.py

A few hundred MP4s of one second stand under as many names as there are rows, by hard link, in VGGSound's layout with its
309 classes. What takes its time per file whatever the number of files is set aside and said so: `clean` is given the probes
(with a checksum of its own for each row, as real clips have), and `stores` decodes each MP4 once. Peaks are the largest
resident size of the process or of one of its workers; a loader worker's share is what it has for itself after as many clips
at either size. The peer of the larger size is the smaller one: time in proportion to rows, memory as it was, and so the time
in which a split opens.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.table import Row

ROOT = Path(__file__).resolve().parents[1]

ROWS = (20_000, 200_000)
FILES, CLASSES, LINKS = 192, 309, 60_000  # a file system may allow 65,000 names of a file
READ, BATCH, WORKERS = 20_000, 32, 2  # clips that the loader reads at either size
OPENINGS, OPENED = 20, "opening a split"  # ms of the quickest
SECONDS_MEANT = 20.0  # at the larger size, of
FLAT = ("frames and audio, decoded once", "training loader")  # need no more memory for more clips
MEANT = ("subset, all", "subset, counts", "clean, probes given")
STORED = {"num_frames": 2, "frame_step": 0, "short_side": 32, "sample_rate": 16000, "codec": "pcm16", "shards": 64}
MEGABYTE = 1 << 20

# --- the dataset -----------------------------------------------------------------------------------------------------------


def dataset_name(rows: int) -> str:
    """Of so many rows."""
    return f"rows{rows}"


def write_params(sizes: list[int]) -> None:
    """The repository's params.yaml with a dataset of each size beside the demo's."""
    from ruamel.yaml import YAML

    from tasks import params

    values = params.read(ROOT / "params.yaml")
    for rows in sizes:
        for section, change in {
            "download": {},
            "subset": {},
            "clean": {},
            "stores": STORED | {"workers": WORKERS},
        }.items():
            values[section][dataset_name(rows)] = values[section]["sounds"] | change
    values["t3av"]["dataset"] = dataset_name(sizes[-1])
    with params.PARAMS.open("w") as file:
        YAML(typ="safe").dump(values, file)


def make_files(folder: Path) -> list[Path]:
    """The MP4s themselves, by the demo's encoder."""
    from tasks.datasets import demo, sounds

    settings = demo.Demo("sounds", 7, FILES, 1.0, WORKERS)
    demo.build_demo(settings, folder)
    return [folder / str(clip.row["path"]) for clip in sounds.plan(settings) if not clip.fault]


def make_rows(files: list[Path], rows: int, folder: Path) -> None:
    """`rows` clips in VGGSound's layout; nine in ten are of train, and no file is in both splits."""
    import pandas as pd

    from tasks.datasets import vggsound

    if rows > LINKS * len(files):
        raise SystemExit(f"{rows} rows are more than {len(files)} files can stand for; raise FILES")
    (folder / "video").mkdir(parents=True)
    found = []
    for k in range(rows):
        file, label = k % len(files), f"sound {k // len(files) % CLASSES:03d}"
        row = vggsound.row(f"yt{k:09d}", k % 300, label, "test" if file % 10 == 9 else "train")
        (folder / str(row["path"])).hardlink_to(files[file])
        found.append(row)
    vggsound.write(pd.DataFrame(found), folder)


# --- what is measured --------------------------------------------------------------------------------------------------------


def take_subset(rows: int, mode: str) -> None:
    """`subset` as the stage runs it."""
    from tasks import params, subset

    settings = params.stage(subset.Subset, "subset", dataset_name(rows))
    changed = asdict(settings) | {
        "mode": mode,
        "num_classes": CLASSES,
        "num_train": rows // CLASSES // 2,
        "num_test": 5,
    }
    subset.subset(dataset_name(rows), subset.Subset(**changed))


def make_manifest(rows: int) -> None:
    """`clean` with the probes given."""
    import pandas as pd

    from tasks import clean, params
    from tasks.data import video

    def given(root: Path, table: pd.DataFrame, num_workers: int, work: Path) -> pd.DataFrame:
        facts = asdict(video.probe(root / table["path"].iloc[0])) | {"reason": "", "detail": ""}
        return pd.DataFrame(facts, index=table.index).assign(checksum=[f"{k:064x}" for k in range(len(table))])

    clean.probe_all = given
    clean.clean(dataset_name(rows), params.stage(clean.Clean, "clean", dataset_name(rows)))


def probe_some(rows: int) -> dict[str, float]:
    """What `clean` set aside: a clip's probe."""
    from tasks import clean, storage
    from tasks.data import manifest

    paths = [
        storage.DATA / dataset_name(rows) / path for path in manifest.read_clean(dataset_name(rows))["path"][:FILES]
    ]
    began = time.perf_counter()
    for path in paths:
        clean.probe_clip(path)
    return {"milliseconds a clip": (time.perf_counter() - began) / len(paths) * 1000}


def make_stores(rows: int) -> None:
    """`stores` with each MP4 decoded, and the statistics of its sound taken, once a worker."""
    import numpy as np

    from models.transforms import LogMel
    from tasks import params, stores
    from tasks.data import video

    read_clip, mel_sums = video.read_clip, stores.mel_sums
    clips: dict[int, Any] = {}
    sums: dict[int, tuple[float, float, int]] = {}

    def decoded(path: Path, preparation: video.Preparation) -> Any:
        inode = path.stat().st_ino
        if inode not in clips:
            clips[inode] = read_clip(path, preparation)
        return clips[inode]

    def summed(wave: np.ndarray, mel: LogMel) -> tuple[float, float, int]:
        if id(wave) not in sums:
            sums[id(wave)] = mel_sums(wave, mel)
        return sums[id(wave)]

    video.read_clip, stores.mel_sums = decoded, summed
    stores.stores(dataset_name(rows), params.stage(stores.Stores, "stores", dataset_name(rows)))


def load(rows: int) -> dict[str, float]:
    """A training phase's loader: opened, then read by its workers."""
    import torch

    from models.family import Batch, ClipSpec, Sample
    from tasks.data.batches import Clips, GlobalBatches, build_loader
    from tasks.data.loader import open_split

    def transform(sample: Sample) -> Batch:
        assert sample.frames is not None and sample.wave is not None
        return {"frames": torch.from_numpy(sample.frames), "wave": torch.from_numpy(sample.wave)}

    def opened() -> tuple[Clips, float]:
        began = time.process_time()
        clips = open_split(dataset_name(rows), "train", ClipSpec(2, 16000, 1.0), transform, 0, training=True)
        return clips, (time.process_time() - began) * 1000

    spent = min(opened()[1] for _ in range(OPENINGS))
    clips, _ = opened()
    steps = READ // BATCH
    epoch = len(clips) // BATCH
    # From within the first epoch on: a resumed run's place.
    batches = GlobalBatches(len(clips), BATCH, 0, epoch // 2, epoch // 2 + steps)
    loader = build_loader(clips, batches, WORKERS, torch.device("cpu"))
    began, workers = time.perf_counter(), []
    reader = iter(loader)
    for step in range(steps):
        next(reader)
        if step == steps - 2 * WORKERS:  # they end after their last batch
            workers = [private(worker.pid) for worker in reader._workers]  # pyright: ignore
    read = time.perf_counter() - began
    return {OPENED: spent, "clips/s": READ / read, "worker's own MB": max(workers)}


def sample_keys(rows: int) -> dict[str, float]:
    """A sampler's first step, and the same in the middle of its tenth epoch, as after a resume."""
    from tasks.data.batches import GlobalBatches

    epoch = rows // BATCH
    spent = {}
    for name, first in (("first step ms", 0), ("resumed ms", 9 * epoch + epoch // 2)):
        began = time.perf_counter()
        next(iter(GlobalBatches(rows, BATCH, 0, first, 20 * epoch)))
        spent[name] = (time.perf_counter() - began) * 1000
    return spent


def read_facts(rows: int) -> None:
    """What a phase asks of the train split before it starts."""
    from tasks import jobs

    jobs.read_facts("t3av", dataset_name(rows))


def evaluate(rows: int) -> None:
    """Scores, intervals and the table of predictions of as many test clips, over VGGSound's classes."""
    import numpy as np

    from models import metrics, scoring
    from models.family import ClipInfo
    from models.t3av import evaluation

    rng = np.random.default_rng(0)
    labels = [f"sound {k:03d}" for k in range(CLASSES)]
    truth = rng.integers(0, CLASSES, rows)
    probabilities = rng.random((rows, CLASSES), np.float32)
    clips = [ClipInfo(f"yt{k:09d}", f"yt{k:09d}", {"label": labels[right]}) for k, right in enumerate(truth)]
    scoring.scores(probabilities, truth)
    statistics = {
        "top1": metrics.weighted_mean(metrics.top_k(probabilities, truth, 1)),
        "macro_f1": metrics.weighted_macro_f1(truth, probabilities.argmax(1), CLASSES),
    }
    metrics.intervals(statistics, [clip.group for clip in clips], 200, 0)
    evaluation._predictions(probabilities, truth, labels, clips).frame.to_csv("predictions.csv", index=False)


STEPS: dict[str, Callable[[int], Mapping[str, float] | None]] = {
    "subset, all": functools.partial(take_subset, mode="all"),
    "subset, counts": functools.partial(take_subset, mode="counts"),
    "subset, all again": functools.partial(take_subset, mode="all"),  # for what follows
    "clean, probes given": make_manifest,
    "one probe": probe_some,
    "frames and audio, decoded once": make_stores,
    "facts of a phase": read_facts,
    "training loader": load,
    "sampler": sample_keys,
    "evaluation": evaluate,
}

# --- measuring ---------------------------------------------------------------------------------------------------------------


def peak() -> float:
    """Largest MB that this process has had, or one of its children that ended; ru_maxrss begins with the parent's."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return max(_megabytes(Path("/proc/self/status").read_text(), "VmHWM"), children)


def private(pid: int) -> float:
    """MB of a process that it shares with no other."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return _megabytes(text, "Private_Dirty") + _megabytes(text, "Private_Clean")


def cpu_seconds() -> float:
    """Used so far by this process and the children that have ended; other programs on the machine change it little."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _megabytes(text: str, name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    assert found, f"this system does not tell {name}"
    return int(found[1]) / 1024


def run_step(name: str, rows: int) -> None:
    """One step in this process; its figures as JSON."""
    import torch  # noqa: F401  # every stage's process has it, so that peaks compare

    began, used = time.perf_counter(), cpu_seconds()
    with contextlib.redirect_stdout(io.StringIO()):
        found = STEPS[name](rows) or {}
    seconds = {"seconds": time.perf_counter() - began, "CPU s": cpu_seconds() - used}
    print(json.dumps({**seconds, "peak MB": peak(), **found}))


def in_a_process(code: str) -> str:
    """What Python code that begins with this module's import prints, in a process of its own."""
    command = [sys.executable, "-c", f"from benchmarks import scale; {code}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{code} failed:\n{ended.stderr[-2000:]}")
    return ended.stdout


def prepare(sizes: list[int]) -> None:
    """Params, files and rows in the working directory, what is there already left alone."""
    write_params(sizes)
    files = make_files(Path("files"))
    for rows in sizes:
        folder = Path("data") / dataset_name(rows) / "raw"
        if not (folder / "vggsound.csv").is_file():
            make_rows(files, rows, folder)


def grow(quick: bool) -> Iterator[Row]:
    """Each step at both sizes: CPU time in proportion to the rows, and peak memory."""
    small, large = (10_000, 30_000) if quick else ROWS
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        in_a_process(f"scale.prepare([{small}, {large}])")
        for name in STEPS:
            few, many = (
                json.loads(in_a_process(f"scale.run_step({name!r}, {rows})").splitlines()[-1])
                for rows in (small, large)
            )
            title, against = f"{name}, {large:,} clips", f"{small:,} of them"
            growth = many["CPU s"] / few["CPU s"] / (large / small)
            yield Row(f"{title}: time over proportion", "CPU s", many["CPU s"], few["CPU s"], against, growth, "<= 1.1")
            memory = many["peak MB"] / few["peak MB"]
            asked = "<= 1.2" if name in FLAT else ""
            yield Row(f"{title}: peak memory", "MB", many["peak MB"], few["peak MB"], against, memory, asked)
            if OPENED in many:
                ours, theirs = many[OPENED], few[OPENED]
                yield Row(f"{OPENED}, {large:,} clips", "CPU ms", ours, theirs, against, ours / theirs, "<= 1.5")
            if name in MEANT:
                yield Row(title, "s", many["seconds"], asked=f"<= {SECONDS_MEANT:g}")


PARTS = {"grow": grow}

if __name__ == "__main__":
    table.main(__doc__, PARTS)
