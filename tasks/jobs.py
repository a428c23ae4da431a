"""A phase to train: what params.yaml says of it, and what its data tells."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
from models.family import Batch, Facts, InputError, Phase, Sample
from tasks import params, storage
from tasks.data import manifest
from tasks.data.batches import Clips
from tasks.data.feature_store import feature_folder
from tasks.data.loader import open_split
from tasks.engine.run import Training


@dataclass(frozen=True)
class Job:
    """A phase to train, with everything that params.yaml and the data say about it."""

    family: str
    name: str
    phase: Phase
    config: Any
    settings: Training
    dataset: str
    facts: Facts

    @property
    def stage(self) -> str:
        """The phase's stage in DVC."""
        return f"{self.name}@{self.family}"

    @property
    def out(self) -> Path:
        """The bundle's folder."""
        return storage.ARTIFACTS / self.family / self.name


def read_job(family: str, name: str) -> Job:
    """The job as params.yaml has it; InputError for anything in it or in the data that cannot work."""
    phase, config, settings = params.phase(family, name, Training)
    dataset = params.value(family, "dataset")
    return Job(family, name, phase, config, settings, dataset, read_facts(family, dataset))


def read_facts(family: str, dataset: str) -> Facts:
    """Label maps and log-mel statistics of the dataset's train split."""
    train = train_annotations(dataset)
    if not train:
        raise InputError(f"{manifest.manifest_path(dataset)}: no clip in the train split")
    path = storage.DATA / dataset / "stores" / "stats.json"
    if not path.is_file():
        raise InputError(f"{path} not found; run `python -m tasks.stores {dataset}`")
    stats = json.loads(path.read_text())
    labels = models.load(family).labels(train, manifest.read_classes(dataset))
    counts = {head: count_classes(train, head, names) for head, names in labels.items()}
    return Facts(labels, stats["mel_mean"], stats["mel_std"], counts, num_clips=len(train))


def count_classes(clips: Sequence[Mapping[str, Any]], head: str, names: Sequence[str]) -> list[int]:
    """How many clips have each class: by its name under `head`, or among the ids under the plural of `head`."""
    named = Counter(clip.get(head) for clip in clips)
    told = Counter(number for clip in clips for number in set(clip.get(f"{head}s", ())))
    return [named[name] + told[number] for number, name in enumerate(names)]


def train_annotations(dataset: str, features: Path | None = None) -> Sequence[Mapping[str, Any]]:
    """The annotations of the train split's clips, in their order; without those that lack features where these matter."""
    return manifest.annotations(manifest.read(dataset, features, ["id", "annotation"], "train"))


def open_clips(job: Job, split: str, training: bool) -> Clips:
    """A split as the phase sees it."""
    transform: Callable[[Sample], Batch] = job.phase.transform(job.config, job.facts, training)
    return open_split(
        job.dataset, split, job.phase.clip(job.config), transform, job.settings.seed, training, features_of(job)
    )


def features_of(job: Job) -> Path | None:
    """Where the features lie that the phase learns from."""
    return feature_folder(job.family) if job.phase.clip(job.config).features else None
