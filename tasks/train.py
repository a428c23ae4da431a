"""Train one phase of a family: `python -m tasks.train FAMILY PHASE`, or the same under torchrun for several processes.

A killed run goes on where it was when the same command is given again, and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

import models
from models.family import Batch, InputError, Phase, UnreachableError
from models.weights import frozen_digest, frozen_state
from tasks import bundle, command, params, pretrained, storage, tracking
from tasks.command import say
from tasks.data import manifest, prepared_store
from tasks.data.batches import Clips, InOrder, TensorClips, build_loader, read_batches
from tasks.data.feature_store import read_source
from tasks.data.index import INDEX
from tasks.engine import distributed, loop, profiling
from tasks.engine.distributed import Place
from tasks.engine.predictions import predictions
from tasks.engine.run import NOT_IN_RESULT, Fitted, Task, Training, seed
from tasks.jobs import Job, features_of, open_clips, read_job, train_annotations

# --- where the weights start ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Weights:
    """Third-party weights of one slot."""

    slot: str
    name: str
    kind: str  # for bundle.json: the name and what its bytes were, none, or what was built instead
    state: Mapping[str, Tensor] | None


def find_weights(job: Job) -> tuple[Job, list[Weights]]:
    """The weights that the phase names, before anything is built; and the job, changed where the phase has a fallback.

    A wrong name or file is an InputError. Only where the network is to blame does a fallback help, and it says so.
    """
    found: list[Weights] = []
    for slot, name in job.phase.pretrained(job.config).items() if job.settings.start_from == "none" else ():
        if name == "none":
            found.append(Weights(slot, name, "none", None))
            continue
        try:
            state, kind = pretrained.load_state(name)
            found.append(Weights(slot, name, kind, state))
        except UnreachableError as error:
            config = job.phase.fallback(job.config, slot)
            if config is None:
                raise
            say(
                f"WARNING: {error}. Training goes on with the fallback that params.yaml names for {slot}, from random weights"
            )
            job = dataclasses.replace(job, config=config)
            found.append(Weights(slot, name, f"none: fallback, as {name} could not be had", None))
    return job, found


def start(job: Job) -> tuple[Job, nn.Module, dict[str, Any], list[str]]:
    """The job as it can be done, its module at the start, how that came about for bundle.json, and lines that say so."""
    job, found = find_weights(job)
    torch.manual_seed(job.settings.seed)
    module = job.phase.build(job.config, job.facts)
    source = job.settings.start_from
    if source != "none":
        folder = storage.ARTIFACTS / job.family / source if source in models.load(job.family).phases else Path(source)
        earlier = bundle.load(folder)
        report = earlier.load_into(module, job.phase.fresh)
        digest = storage.file_digest(earlier.path)
        origin = {"started_from": {"phase": earlier.phase, "sha256": digest}, "pretrained": earlier.meta["pretrained"]}
        return job, module, origin | frozen_base(job, module, earlier), [f"starting from {folder}: {report}"]
    kinds = {weights.slot: weights.kind for weights in found}
    lines = [
        line for weights in found if weights.state is not None for line in _load_pretrained(job.phase, module, weights)
    ]
    origin = {"started_from": "none", "pretrained": kinds} | frozen_base(job, module, None)
    return job, module, origin, lines or ["starting from random weights"]


def _load_pretrained(phase: Phase, module: nn.Module, weights: Weights) -> list[str]:
    """Weights of one slot into the module; what happened to every key, in lines to say."""
    assert weights.state is not None
    report = pretrained.fill(phase, module, weights.slot, weights.name, weights.state)
    return [f"{weights.slot} from {weights.name} ({weights.kind}): {report}", *report.lines()]


def frozen_base(job: Job, module: nn.Module, earlier: bundle.Bundle | None) -> dict[str, Any]:
    """`base` of a slim phase's bundle.json: the frozen weights' digest, and what makes them where an earlier bundle did.

    Nothing where the bundle shall hold all weights, as it must where an earlier run trained what is frozen now.
    """
    if not (job.phase.slim and frozen_state(module)):
        return {}
    digest = frozen_digest(module)
    if earlier is None:
        return {"base": {"sha256": digest, "seed": job.settings.seed}}
    if earlier.base is None or earlier.base.sha256 != digest:
        return {}
    return {"base": {key: earlier.meta[key] for key in ("phase", "config", "facts")} | earlier.meta["base"]}


# --- who teaches -----------------------------------------------------------------------------------------------------------


def find_teacher(job: Job) -> bundle.Bundle | None:
    """The finished phase that this one learns from; InputError where it knows other classes or takes another batch."""
    if not job.phase.teacher:
        return None
    teacher = bundle.load(storage.ARTIFACTS / job.family / job.phase.teacher)
    if teacher.facts.labels != job.facts.labels:
        raise InputError(f"{teacher.path}: the teacher knows other classes than {job.dataset} has; train it again")
    phase = models.load(teacher.family).phases[teacher.phase]
    theirs = dataclasses.replace(job, phase=phase, config=teacher.config, facts=teacher.facts)
    ours, wanted = (open_clips(each, "train", training=False)[0, 0] for each in (job, theirs))
    for key, value in wanted.items():
        if key not in ours or ours[key].shape != value.shape:
            given = tuple(ours[key].shape) if key in ours else "none"
            raise InputError(
                f"params.yaml: {job.family}.{job.name} makes {key} {given} of a clip and its teacher takes "
                f"{tuple(value.shape)}; give {job.family}.{job.name}.model the sizes of frames and sound of {teacher.phase}"
            )
    return teacher


@torch.no_grad()
def taught(teacher: nn.Module, batch: Batch) -> Batch:
    """The batch with what the teacher answers to it, as `teacher_<prediction>`."""
    return batch | {f"teacher_{key}": value for key, value in teacher(batch).items()}


# --- features that another phase made --------------------------------------------------------------------------------------


def feature_origin(job: Job) -> dict[str, Any]:
    """For bundle.json, who made these features; InputError where that phase was trained again since."""
    folder = features_of(job)
    if folder is None:
        return {}
    source, maker = read_source(folder), feature_maker(job)
    if maker and (not maker.is_dir() or storage.file_digest(maker / bundle.WEIGHTS) != source["sha256"]):
        raise InputError(f"{folder} is not of {maker} as it is now; run `python -m tasks.features {job.family}` again")
    return {"features": source}


def feature_maker(job: Job) -> Path | None:
    """The bundle of the phase that made the features; None where none of ours did."""
    folder = features_of(job)
    phase = read_source(folder)["phase"] if folder else ""
    return storage.ARTIFACTS / job.family / phase if phase else None


# --- frozen parts, computed once -----------------------------------------------------------------------------------------


def encoded(job: Job, module: nn.Module, split: str, place: Place, work: Path) -> Clips:
    """The split with everything before the trained part already computed; kept in the work folder."""
    path = work / f"encoded-{split}.safetensors"
    if place.leader and not path.is_file():
        tensors = encode_all(
            module.to(place.device).eval(), open_clips(job, split, training=False), job.settings, place
        )
        with storage.atomic_file(path) as temporary:
            bundle.write_tensors(temporary, tensors)
    distributed.from_leader(None, place)  # the others wait for the file
    return TensorClips(load_file(path))


@torch.no_grad()
def encode_all(module: nn.Module, clips: Clips, settings: Training, place: Place) -> dict[str, Tensor]:
    """module.encode over all clips in order, beside the batch's small tensors; pictures and waveforms are left out."""
    loader = build_loader(clips, InOrder(len(clips), settings.batch_size), settings.num_workers, place.device)
    parts: list[Batch] = []
    for batch in tqdm(read_batches(loader), total=len(loader), desc="frozen features", unit="batch"):
        found: Batch = module.encode({key: value.to(place.device) for key, value in batch.items()})  # pyright: ignore
        small = {key: value for key, value in batch.items() if value.ndim == 1 and key != "row"}
        parts.append(small | {key: value.cpu() for key, value in found.items()})
    return {key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]}


# --- the run -------------------------------------------------------------------------------------------------------------


def work_folder(job: Job, origin: dict[str, Any]) -> Path:
    """Where the resume state lies: keyed by all that decides the result."""
    settings = {k: v for k, v in dataclasses.asdict(job.settings).items() if k not in NOT_IN_RESULT}
    data = storage.DATA / job.dataset
    inputs = [
        storage.file_digest(data / name) for name in ("clean/manifest.parquet", f"stores/{INDEX}", "stores/stats.json")
    ]
    if folder := features_of(job):
        inputs.append(storage.file_digest(folder / INDEX))
    identity = [bundle.plain(job.config), settings, dataclasses.asdict(job.facts), origin, inputs]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=dict).encode()).hexdigest()[:16]
    return storage.WORK / f"{job.stage}-{digest}"


def train(job: Job, place: Place, log: loop.Log) -> Fitted:
    """Train to the end and write the bundle; the resume state goes when the bundle is there."""
    seed(job.settings, place)
    job, module, origin, lines = start(job)
    teacher = find_teacher(job)
    if teacher:
        origin["teacher"] = {"phase": teacher.phase, "sha256": storage.file_digest(teacher.path)}
        lines.append(f"taught by {teacher.path.parent}")
    origin |= feature_origin(job)
    work = work_folder(job, origin)
    for line in lines if place.leader else []:
        say(line)
    with storage.locked(work) if place.leader else nullcontext():  # other checkouts may share it
        fitted = fit(job, module, origin, teacher, place, work, log)
        if place.leader:
            save(job, origin, fitted, place)
            keep_profile(job, work)
            shutil.rmtree(work)
    distributed.from_leader(None, place)  # it may have predicted for long, and processes should part together
    return fitted


def fit(
    job: Job,
    module: nn.Module,
    origin: Mapping[str, Any],
    teacher: bundle.Bundle | None,
    place: Place,
    work: Path,
    log: loop.Log,
) -> Fitted:
    """Train on what the phase sees of the clips."""
    if job.phase.cacheable(job.config):
        clips = {split: encoded(job, module, split, place, work) for split in ("train", "val")}
    else:
        clips = {split: open_clips(job, split, training=split == "train") for split in ("train", "val")}
    metric = partial(job.phase.metrics, job.config, job.facts)
    frequencies = job.phase.frequencies(job.config, train_annotations(job.dataset, features_of(job)))
    groups = job.phase.parameter_groups(job.config)
    task = Task(
        module, clips["train"], clips["val"], metric, job.phase.best, frequencies=frequencies, parameter_groups=groups
    )
    if "base" in origin:
        task = dataclasses.replace(task, base=origin["base"]["sha256"])
    if teacher:
        task = dataclasses.replace(task, teach=partial(taught, teacher.module().to(place.device)))
    return loop.fit(task, job.settings, place, work, log)


def profile_folder(job: Job) -> Path:
    """Where the phase's last profile stays: beside the work folders, in no out of DVC, whose bytes must come again."""
    return storage.WORK / f"{job.stage}-profile"


def keep_profile(job: Job, work: Path) -> None:
    """Bring the profile out of the work folder; nothing happens where none was asked for."""
    if not job.settings.profile:
        return
    shutil.rmtree(profile_folder(job), ignore_errors=True)
    if (work / profiling.FOLDER).is_dir():
        (work / profiling.FOLDER).rename(profile_folder(job))
    else:
        say(f"warning: the run ended within its first {profiling.WARM_UP} steps, nothing was recorded")


def track_profile(run: tracking.Run, job: Job) -> None:
    """Keep the profile with the run, where one was asked for."""
    for path in sorted(profile_folder(job).glob("*")) if job.settings.profile else ():
        run.artifact(path, profiling.FOLDER)


def save(job: Job, origin: dict[str, Any], fitted: Fitted, place: Place) -> None:
    """Write the bundle."""
    meta: dict[str, Any] = {
        "family": job.family,
        "phase": job.name,
        "dataset": job.dataset,
        "config": bundle.plain(job.config),
        "training": {k: v for k, v in dataclasses.asdict(job.settings).items() if k not in NOT_IN_RESULT},
        "facts": dataclasses.asdict(job.facts),
        "prepared": prepared_store.is_store(storage.DATA / job.dataset / "stores"),
        "stores": {k: v for k, v in params.section("stores", job.dataset).items() if k not in ("workers", "scheduler")},
        **origin,
        "epoch": fitted.epoch,
        "step": fitted.step,
        "metrics": fitted.metrics,
    }
    if job.phase.calibrate:
        meta["facts"]["thresholds"] = thresholds(job, meta, fitted, place)
    bundle.save(job.out, fitted.weights, meta, fitted.history, feature_maker(job))


def thresholds(job: Job, meta: dict[str, Any], fitted: Fitted, place: Place) -> dict[str, float]:
    """What the phase's `calibrate` makes of the val split, predicted as evaluation and people will have it."""
    assert job.phase.calibrate is not None
    state, settings = fitted.weights, job.settings
    base = bundle.read_base(job.out, models.load(job.family).phases, meta)
    trained = bundle.Bundle(job.family, job.name, job.config, job.facts, meta, state, job.out / bundle.WEIGHTS, base)
    clips = open_clips(job, "val", training=False)
    size = settings.micro_batch or max(1, settings.batch_size // place.world)
    found = predictions(trained.module(), clips, size, settings.num_workers, place.device, "calibration, val")
    return job.phase.calibrate(
        job.config, job.facts, found, manifest.clips(manifest.read(job.dataset, features_of(job)), "val")
    )


def main() -> None:
    """Train one phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=models.names())
    parser.add_argument("phase")
    given = parser.parse_args()
    distributed.spread("tasks.train")
    job = read_job(given.family, given.phase)
    data = storage.DATA / job.dataset
    inputs = [data / "clean", data / "stores", storage.ARTIFACTS / job.family / job.settings.start_from]
    inputs += [storage.ARTIFACTS / job.family / job.phase.teacher] if job.phase.teacher else []
    inputs += filter(None, [features_of(job)])
    values = {**bundle.plain(job.config), **dataclasses.asdict(job.settings)}
    with (
        distributed.launched(job.settings.device) as place,
        storage.alone(job.stage) if place.leader else nullcontext(),
        tracking.run(job.stage, values, inputs) as run,
    ):
        try:
            fitted = train(job, place, run.log)
        except loop.Stopped:
            if place.leader:
                print("stopped; everything is saved, the same command goes on from here", file=sys.stderr)
            sys.exit(143)
        if place.leader:
            run.tag({"duet.sha256": storage.file_digest(job.out / bundle.WEIGHTS)})
            run.artifact(job.out / bundle.HISTORY)
            track_profile(run, job)
            name = job.phase.best[0]
            say(f"{job.stage}: best {name} {fitted.metrics[name]:.4f} after epoch {fitted.epoch}; weights in {job.out}")


if __name__ == "__main__":
    command.run(main)
