"""Features of a family's clips, straight from the raw files: `python -m tasks.features FAMILY [--shard I/N]`.

A finished clip survives a kill in `.duet/work` and is not made again. Where several machines share that folder, each makes
one `--shard` of N; the command without it makes what is missing and puts all in place. Of clips that are features already,
the files themselves are linked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import models
from models.family import InputError
from tasks import bundle, command, params, quarantine, storage, tracking
from tasks.data import audio, clip_files, extraction, feature_files, index, manifest, picture_folder, raw_clip, video
from tasks.data.clip_files import ClipError
from tasks.data.feature_store import SOURCE, feature_folder
from tasks.engine import distributed

COLUMNS = ["id", "split", "num_frames", "dim", "times", "checksum", "sha256"]


@dataclass(frozen=True)
class Features:
    """Section `features.<family>` of params.yaml."""

    dtype: Literal["float32", "float16"]
    workers: int  # processes that decode; 0 = the one that feeds the device does
    device: Literal["auto", "cpu", "cuda"]
    max_quarantine: float  # share of clips that may fail before the stage does


@dataclass(frozen=True)
class Job:
    """The clips of a family, and what makes their features."""

    family: str
    dataset: str
    settings: Features
    phase: str  # of the family, that makes features
    clips: pd.DataFrame  # rows of the manifest
    digest: str  # of the manifest

    @property
    def is_made(self) -> bool:
        """Whether the clips are features already."""
        return clip_files.is_features(self.clips["path"].iloc[0])

    @property
    def source(self) -> dict[str, str]:
        """What their users must know of features: who made them, and as which numbers they are kept."""
        weights = storage.ARTIFACTS / self.family / self.phase / bundle.WEIGHTS
        if self.is_made:
            return {"phase": "", "sha256": "", "dtype": ""}
        if not weights.is_file():
            raise InputError(f"{weights} not found; run `python -m tasks.train {self.family} {self.phase}` first")
        return {"phase": self.phase, "sha256": storage.file_digest(weights), "dtype": self.settings.dtype}

    def path(self, clip: dict[str, Any]) -> Path:
        """A clip's media."""
        return storage.DATA / self.dataset / clip["path"]


def read_job(family: str) -> Job:
    """The job as params.yaml and the manifest have it."""
    phase = next((name for name, phase in models.load(family).phases.items() if phase.features), None)
    if phase is None:
        raise InputError(f"{family} has no phase that makes features")
    settings, dataset = params.stage(Features, "features", family), params.value(family, "dataset")
    if settings.workers < 0:
        raise InputError(f"params.yaml: features.{family}.workers is {settings.workers}; it must be 0 or more")
    return Job(family, dataset, settings, phase, manifest.read(dataset), manifest.digest(dataset))


def work_folder(job: Job, device: torch.device) -> Path:
    """Where finished clips are kept: keyed by all that decides their bytes, but for the clips themselves."""
    modules = (video, audio, clip_files, picture_folder, raw_clip, extraction)
    code = [storage.file_digest(Path(str(module.__file__))) for module in modules]
    meta = storage.ARTIFACTS / job.family / job.phase / bundle.META
    config = json.loads(meta.read_text())["config"] if meta.is_file() else {}
    identity = json.dumps([job.dataset, job.source, config, device.type, code], sort_keys=True)
    return storage.WORK / f"features-{job.family}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


# --- one clip after another ----------------------------------------------------------------------------------------------


def finished(clip: dict[str, Any], work: Path) -> dict[str, Any] | None:
    """The index row of a clip that an earlier run has finished, None where none has."""
    note = work / "notes" / f"{clip['id']}.json"
    if not note.is_file():
        return None
    row = json.loads(note.read_text())
    return row if row["checksum"] == clip["checksum"] else None


def keep(clip: dict[str, Any], found: extraction.Features, dtype: str, work: Path) -> dict[str, Any]:
    """Write a clip's features, then the note that they are whole; its index row."""
    path = work / "clips" / f"{clip['id']}.npy"
    with storage.atomic_file(path) as temporary, temporary.open("wb") as handle:
        np.save(handle, found.rows.astype(dtype), allow_pickle=False)
    row = {
        "id": clip["id"], "num_frames": found.num_frames, "dim": found.rows.shape[1], "times": found.times.tolist(),
        "checksum": clip["checksum"], "sha256": storage.file_digest(path),
    }  # fmt: skip
    with storage.atomic_file(work / "notes" / f"{clip['id']}.json") as temporary:
        temporary.write_text(json.dumps(row))
    return row


def make(job: Job, clips: list[dict[str, Any]], work: Path, device: torch.device) -> list[dict[str, Any]]:
    """Index rows of these clips, in any order; of those that fail, rows of the quarantine."""
    done = [finished(clip, work) for clip in clips]
    rows = [row for row in done if row]
    todo = [clip for clip, row in zip(clips, done, strict=True) if row is None]
    if not todo:
        return rows
    trained = bundle.load(storage.ARTIFACTS / job.family / job.phase)
    extractor = extraction.load_extractor(trained, device)
    results = extractor.extract([job.path(clip) for clip in todo], min(job.settings.workers, len(todo)))
    with tqdm(total=len(clips), initial=len(rows), desc="features", unit="clip") as bar:
        for place, found in results:
            clip = todo[place]
            if isinstance(found, extraction.Features) and found.num_frames != clip["frames"]:
                found = ClipError("changed", "the file is not the one that was cleaned; run the clean stage again")
            if isinstance(found, ClipError):
                rows.append(failure(clip, found))
            else:
                rows.append(keep(clip, found, job.settings.dtype, work))
            bar.update()
    return rows


def link(job: Job, clips: list[dict[str, Any]], work: Path) -> list[dict[str, Any]]:
    """The same of clips that are features already. Nobody knows their times: a row counts as a second."""
    rows: list[dict[str, Any]] = []
    for clip in tqdm(clips, desc="features", unit="clip"):
        source, target = job.path(clip), work / "clips" / f"{clip['id']}.npy"
        try:
            count, dim = feature_files.open_features(source).shape
        except ClipError as error:
            rows.append(failure(clip, error))
            continue
        storage.link_or_copy(source, target)
        row = {"id": clip["id"], "num_frames": count, "dim": dim, "times": [float(k) for k in range(count)]}
        rows.append(row | {"checksum": clip["checksum"], "sha256": clip["checksum"]})
    if len(dims := {row["dim"] for row in rows if "dim" in row}) > 1:
        raise InputError(f"{job.dataset}: features of {sorted(dims)} numbers a frame; they must all have as many")
    return rows


def failure(clip: dict[str, Any], error: ClipError) -> dict[str, Any]:
    """A clip's row in the quarantine."""
    return {name: clip[name] for name in ("id", "path", "split")} | {"reason": error.reason, "detail": error.detail}


# --- the stage -------------------------------------------------------------------------------------------------------------


def features(job: Job, device: torch.device) -> tuple[int, int]:
    """Write artifacts/<family>/features; returns how many clips have features, and how many failed."""
    work = work_folder(job, device)
    with storage.locked(work):
        clips: list[dict[str, Any]] = job.clips.to_dict("records")  # pyright: ignore[reportAssignmentType]
        rows = link(job, clips, work) if job.is_made else make(job, clips, work, device)
        failed = pd.DataFrame([row for row in rows if "reason" in row], columns=quarantine.COLUMNS)
        quarantine.check_share(failed, len(clips), job.settings.max_quarantine, f"features.{job.family}")
        good = {row["id"]: row for row in rows if "reason" not in row}
        made = work / "features"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        for name in good:
            storage.link_or_copy(work / "clips" / f"{name}.npy", made / f"{name}.npy")
        listed = [{"split": clip["split"]} | good[clip["id"]] for clip in clips if clip["id"] in good]
        index.write(pd.DataFrame(listed, columns=COLUMNS), made, job.digest)
        quarantine.write_list(failed, made / "quarantine.csv")
        (made / SOURCE).write_text(json.dumps(job.source, indent=1) + "\n")
        storage.install_folder(made, feature_folder(job.family))
        shutil.rmtree(work)
    return len(good), len(failed)


def share(job: Job, device: torch.device, number: int, count: int) -> tuple[int, int]:
    """Make the features of one in `count` clips, for a later run to put in place."""
    work = work_folder(job, device)
    clips: list[dict[str, Any]] = job.clips.to_dict("records")  # pyright: ignore[reportAssignmentType]
    with storage.locked(work / "shards" / f"{number}-of-{count}"):
        rows = make(job, clips[number - 1 :: count], work, device)
    failed = sum("reason" in row for row in rows)
    return len(rows) - failed, failed


def parse_shard(text: str) -> tuple[int, int]:
    """Such as 2/8; InputError for what is none."""
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise InputError(f"--shard {text}: write I/N with I from 1 to N, such as 2/8")
    return number, count


def main() -> None:
    """Make the features of one family's clips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=models.names())
    parser.add_argument("--shard", help="I/N: only the I-th of N shares of the clips")
    given = parser.parse_args()
    job = read_job(given.family)
    shard = parse_shard(given.shard) if given.shard else None
    if shard and job.is_made:
        raise InputError("--shard: these clips are features already; leave it out")
    name, root = f"features@{job.family}", storage.DATA / job.dataset
    inputs = [root / "raw", root / "clean", storage.ARTIFACTS / job.family / job.phase]
    with distributed.launched(job.settings.device) as place:
        device = place.device
    if shard:
        with storage.alone(f"{name}-{shard[0]}-of-{shard[1]}"):
            good, failed = share(job, device, *shard)
        command.say(
            f"{name}: {good} clips of shard {given.shard} done, {failed} failed; run it without --shard at last"
        )
        return
    with storage.alone(name), tracking.run(name, asdict(job.settings), inputs) as run:
        good, failed = features(job, device)
        run.log({"clips": good, "failed": failed})
    more = f", {failed} failed; see {feature_folder(job.family) / 'quarantine.csv'}" if failed else ""
    command.say(f"{name}: features of {good} clips{more}")


if __name__ == "__main__":
    command.run(main)
