"""The project of toy_evaluation with animals in it: a tiny wildlife model and its student, both untrained."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
from ruamel.yaml import YAML

import models
from models.family import Facts
from tasks import bundle
from tasks.data import index, manifest
from tests.tasks import toy_evaluation

FACTS = Facts({"species": ["fox", "hare", "wolf"], "activity": ["foraging", "resting"]}, -5.0, 4.0)
PHASES = ("finetune", "distill")


def write_project(root: Path, **options: list[str]) -> None:
    """Manifest, stores, bundles and params.yaml below `root`; options as toy_evaluation.write_project has them."""
    toy_evaluation.write_project(root, **options)
    shutil.rmtree(root / "artifacts")
    data = (root / "data/sounds").rename(root / "data/animals")
    path = data / "clean/manifest.parquet"
    table = pd.read_parquet(path)
    heads = [{head: names[i % len(names)] for head, names in FACTS.labels.items()} for i in range(len(table))]
    table["annotation"] = [json.dumps(own) for own in heads]
    manifest.write(table, path)
    stored = index.read(data / "stores").to_pandas().assign(annotation=table["annotation"])  # in the same order
    with contextlib.chdir(root):
        digest = manifest.digest("animals")
    index.write(stored, data / "stores", digest)
    (data / "stores/stats.json").write_text(json.dumps({"mel_mean": FACTS.mel_mean, "mel_std": FACTS.mel_std}))
    for phase in PHASES:
        write_bundle(root / "artifacts/wildlife" / phase, phase)
    with (root / "params.yaml").open("w") as file:
        compact = {"batch_size": 5, "num_workers": 0, "warmup": 1, "repeats": 3}
        stores = toy_evaluation.STORES | {"shards": 1, "workers": 1, "scheduler": "processes"}
        YAML().dump(
            {
                "evaluate": toy_evaluation.EVALUATE,
                "compact": compact,
                "stores": {"animals": stores},
                "wildlife": {"dataset": "animals"},
            },
            file,
        )


def write_bundle(folder: Path, phase: str, seed: int = 0, **changes: object) -> Path:
    """A phase's tiny model, with other values of its config where given."""
    chosen = models.load("wildlife").phases[phase]
    config = replace(chosen.tiny, **changes)
    torch.manual_seed(seed)
    module = chosen.build(config, FACTS)
    with torch.no_grad():  # untrained logits are all but equal: make them differ, so that answers depend on the clip
        for name, parameter in module.named_parameters():
            if "heads." in name and parameter.ndim > 1:
                parameter.mul_(4)
    meta = {
        "family": "wildlife", "phase": phase, "dataset": "animals", "config": asdict(config), "training": {"lr": 1e-3},
        "facts": asdict(FACTS), "stores": toy_evaluation.STORES, "started_from": "none", "pretrained": {},
        "metrics": {}, "epoch": 1, "step": 2,
    }  # fmt: skip
    bundle.save(folder, module.state_dict(), meta, [{"epoch": 0, "train_loss": 1.0, "lr": 0.1}])
    return folder
