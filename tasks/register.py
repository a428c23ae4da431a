"""Make the evaluated checkpoint of a family a registered version: `python -m tasks.register FAMILY`.

A version is known by what is in it: the SHA-256 of the weights and of their evaluation. Registering the same again
finds the version there is. It works as well when DVC restored checkpoint and evaluation and the MLflow store is new.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path

import pandas as pd

import models
from models.family import InputError
from tasks import bundle, command, graph, journal, params, storage, tracking
from tasks.command import say
from tasks.data import manifest
from tasks.predict import Predictor, table

# What a server needs to run a version's code; the rest of the project's dependencies serve training.
RUNTIME = (
    "mlflow", "torch", "torchvision", "transformers", "numpy", "pandas", "pyarrow", "scipy", "scikit-learn",
    "av", "pillow", "simplejpeg", "h5py", "safetensors", "ruamel.yaml", "tqdm", "matplotlib",
)  # fmt: skip


def main() -> None:
    """Register the family's final phase as it was evaluated."""
    parser = argparse.ArgumentParser(prog="python -m tasks.register", description="Register an evaluated checkpoint.")
    parser.add_argument("family", choices=models.names())
    family = parser.parse_args().family
    phase = models.load(family).final
    root = storage.ARTIFACTS / family
    with storage.alone(f"register@{family}"):
        line = register(family, root / phase, root / "evaluate", root / "register")
    say(line)


def register(family: str, checkpoint: Path, evaluation: Path, out: Path) -> str:
    """Find or make the version, set its aliases, write `out`/version.json; returns a line that says what happened."""
    entry = submit(family, checkpoint, evaluation, f"register@{family}")
    name, number = entry.name, entry.number
    tracking.set_alias(name, "candidate", number)
    # Until versions are compared on the same evaluation data, the first one is the champion and stays it.
    aliases = tracking.set_alias(name, "champion", number, only_if_free=True)
    written = {
        "name": name,
        "version": number,
        "aliases": aliases,
        **entry.identity,
        "predict": f"python -m tasks.predict {family} CLIP.mp4 --model models:/{name}/{number}",
    }
    with storage.atomic_folder(out) as folder:
        (folder / "version.json").write_text(json.dumps(written, indent=2) + "\n")
    champion = "it is the champion" if "champion" in aliases else "the champion stays, promotion is a step of its own"
    return (
        f"register: {name} version {number} {'was there already' if entry.known else 'made'}, now candidate; {champion}"
    )


@dataclass(frozen=True)
class Entry:
    """A version in the registry, known by its content."""

    name: str
    number: int
    known: bool  # it was there before
    identity: dict[str, str]  # the tags it is found by


def submit(family: str, checkpoint: Path, evaluation: Path, stage: str) -> Entry:
    """Find or make the version of a bundle and of its evaluation (metrics.json at least); `stage` names the new run."""
    trained = bundle.load(checkpoint)
    read_metrics(evaluation)
    name = f"duet-{family}"
    identity = {
        "duet.sha256": storage.file_digest(checkpoint / "weights.safetensors"),
        "duet.bundle": storage.file_digest(checkpoint / "bundle.json"),
        "duet.evaluation": storage.file_digest(evaluation / "metrics.json"),
    }
    number = tracking.find_version(name, identity)
    if number is not None:
        return Entry(name, number, True, identity)
    number = tracking.add_version(_submission(name, stage, checkpoint, trained, evaluation, identity))
    return Entry(name, number, False, identity)


def _submission(
    name: str,
    run: str,
    checkpoint: Path,
    trained: bundle.Bundle,
    evaluation: Path,
    identity: dict[str, str],
) -> tracking.Submission:
    metrics, family = read_metrics(evaluation), trained.family
    dataset = str(trained.meta["dataset"])
    data_sha, example = test_split(dataset)
    answers = table(Predictor(trained).predict([Path(example)]))
    if answers["error"].any():
        raise InputError(f"{example}: the example of the version: {answers['error'][0]}")
    stage = f"{trained.phase}@{family}"
    clean = storage.DATA / dataset / "clean"
    tags = {
        **identity,
        "duet.family": family,
        "duet.phase": trained.phase,
        "duet.dataset": dataset,
        "duet.evaluation_data": data_sha,
        "duet.train_run": tracking.find_run(trained.meta.get("quantised_from", identity["duet.sha256"]))
        or "unknown: trained elsewhere",
        "git.commit": graph.commit(),
        "git.dirty": str(graph.dirty()).lower(),
        **journal.flow_tags(),
        **{f"dvc.dep.{path}": md5 for path, md5 in graph.out_hashes([clean]).items()},
        **{
            f"dvc.{side[:-1]}.{path}": md5 for side, items in graph.hashes(stage).items() for path, md5 in items.items()
        },
        **{f"test.{key}": f"{value:.6g}" for key, value in metrics.items()},
    }
    return tracking.Submission(
        name=name,
        experiment=family,
        stage=run,
        params=json.loads((checkpoint / "bundle.json").read_text()),
        metrics={f"test/{key}": value for key, value in metrics.items()},
        evaluation=evaluation,
        sources=[path for path in (params.PARAMS, graph.LOCK) if path.is_file()],
        tags=journal.redact(tags),
        bundle=checkpoint,
        code=Path(__file__).with_name("serving.py"),
        code_paths=[Path(models.__file__).parent, Path(__file__).parent],
        requirements=[f"{package}=={installed(package).partition('+')[0]}" for package in RUNTIME],
        example=pd.DataFrame({"path": [example]}),
        answer=answers,
    )


def read_metrics(evaluation: Path) -> dict[str, float]:
    """The numbers of metrics.json under dotted names."""
    path = evaluation / "metrics.json"
    if not path.is_file():
        raise InputError(f"{path} not found; run `python -m tasks.evaluate` (or dvc repro) first")
    values = journal.flatten(json.loads(path.read_text()))
    return {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}


def test_split(dataset: str) -> tuple[str, str]:
    """A digest of the test split's clips and annotations, and the path of its first clip."""
    rows = manifest.read(dataset)
    rows = rows[rows["split"] == "test"].sort_values("id")
    if rows.empty:
        raise InputError(f"{manifest.manifest_path(dataset)}: no clip in the test split")
    total = hashlib.sha256()
    for row in rows[["id", "checksum", "annotation"]].itertuples(index=False):
        total.update("\0".join(map(str, row)).encode() + b"\n")
    return total.hexdigest(), str(storage.DATA / dataset / rows["path"].iloc[0])


if __name__ == "__main__":
    command.run(main)
