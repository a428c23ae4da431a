"""Score a family on its test split, once: `python -m tasks.evaluate FAMILY`. Numbers, tables, pictures and one report page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

import models
from models.family import ClipInfo, Facts, InputError, Results
from tasks import bundle, command, params, report, storage, tracking
from tasks.command import say
from tasks.data import manifest
from tasks.data.batches import Clips, stack
from tasks.data.feature_store import feature_folder
from tasks.data.loader import open_split
from tasks.engine import distributed
from tasks.engine.predictions import predictions
from tasks.judges import Judges, Weights

EXPLAINED = 8  # clips at once: attention of all heads takes more than a prediction


@dataclass(frozen=True)
class Evaluate:
    """Section `evaluate` of params.yaml."""

    batch_size: int
    num_workers: int
    num_bootstrap: int  # resamples behind an interval
    seed: int
    device: Literal["auto", "cpu", "cuda"]
    judges: Weights  # of captions, for families that write some


class Scored:
    """What a family's evaluation asks for (models.family.Evaluation), made from bundles, manifest and stores."""

    def __init__(self, family: str, settings: Evaluate, device: torch.device) -> None:
        self.family, self.settings = models.load(family), settings
        final, names = self.family.final, list(self.family.phases)
        # What is made from the final phase has no say here, whether it is there already or not.
        before = names[: names.index(final) + 1]
        self.folders = {name: storage.ARTIFACTS / family / name for name in before}
        self.trained: Sequence[str] = [name for name, path in self.folders.items() if (path / bundle.META).is_file()]
        self.final = bundle.load(self.folders[final])
        self.facts: Facts = self.final.facts
        self.config: Any = self.final.config
        self.clip = self.family.phases[final].clip(self.config)
        self.dataset = str(self.final.meta["dataset"])
        self.features = feature_folder(family) if self.clip.features else None
        self.num_bootstrap, self.seed = settings.num_bootstrap, settings.seed
        self.device = device
        self.judges = Judges(settings.judges, device)
        self._kept: dict[tuple[str, str, str, bool], dict[str, np.ndarray]] = {}

    @cached_property
    def table(self) -> pd.DataFrame:
        """The manifest."""
        return manifest.read(self.dataset, self.features)

    def clips(self, split: str) -> list[ClipInfo]:
        """The clips of a split, in the order of predictions; those of windows tell their clip's place by `clip`."""
        clips = manifest.clips(self.table, split)
        if not clips:
            raise InputError(f"{manifest.manifest_path(self.dataset)}: no clip in the {split} split")
        return clips

    def predict(self, phase: str, split: str, drop: str = "", untrained: bool = False) -> dict[str, np.ndarray]:
        """Predictions of a phase's best weights for a split; `drop` hides "audio" or "video"; computed once."""
        key = (phase, split, drop, untrained)
        if key not in self._kept:
            self._kept[key] = self._predict(*key)
        return self._kept[key]

    def _predict(self, phase: str, split: str, drop: str, untrained: bool) -> dict[str, np.ndarray]:
        trained = bundle.load(self.folders[phase])
        module, clips, settings = self._module(trained, untrained), self._open(trained, split), self.settings
        title = f"{phase}{' untrained' if untrained else ''}, {split}{f' without {drop}' if drop else ''}"
        return predictions(module, clips, settings.batch_size, settings.num_workers, self.device, title, drop)

    def explain(self, phase: str, split: str, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """What the phase's `explain` says of these clips of a split, in the order of `rows`."""
        trained = bundle.load(self.folders[phase])
        module, clips = trained.module().to(self.device), self._open(trained, split)
        explain = self.family.phases[phase].explain
        assert explain is not None, f"{phase} explains nothing"
        parts: list[dict[str, np.ndarray]] = []
        for start in tqdm(range(0, len(rows), EXPLAINED), desc=f"{phase}, explained", unit="batch"):
            batch = stack([clips[0, row] for row in rows[start : start + EXPLAINED]])
            found = explain(module, {name: value.to(self.device) for name, value in batch.items()})
            parts.append({name: value.float().cpu().numpy() for name, value in found.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def judge(self, split: str, captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
        """Scores (N,) of a caption of each clip of a split by the models that params name; NaN where one tells nothing."""
        ids = [clip.id for clip in self.clips(split)]
        texts, truths = dict(zip(ids, captions, strict=True)), dict(zip(ids, references, strict=True))
        return self.judges.judge(self.dataset, texts, truths)

    def _open(self, trained: bundle.Bundle, split: str) -> Clips:
        phase = self.family.phases[trained.phase]
        transform = phase.transform(trained.config, trained.facts, False)
        spec = phase.clip(trained.config)
        return open_split(self.dataset, split, spec, transform, self.settings.seed, features=self.features)

    def _module(self, trained: bundle.Bundle, untrained: bool) -> nn.Module:
        if not untrained:
            return trained.module()
        torch.manual_seed(self.settings.seed)
        return self.family.phases[trained.phase].build(trained.config, trained.facts)


def write_tables(results: Results, folder: Path) -> None:
    """metrics.json, predictions.csv, the family's own files, and every other table below plots/."""
    numbers = {name: round(float(value), 6) for name, value in sorted(results.metrics.items())}
    (folder / "metrics.json").write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    (folder / "plots").mkdir()
    for name, table in results.tables.items():
        path = folder / "predictions.csv" if name == "predictions" else folder / "plots" / f"{name}.csv"
        table.frame.to_csv(path, index=False, float_format="%.6g")
    for name, text in results.files.items():
        storage.inside(folder, name, "the results' files").write_text(text, encoding="utf-8")


def main() -> None:
    """Evaluate one family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=models.names())
    family = parser.parse_args().family
    settings = params.stage(Evaluate, "evaluate")
    out = storage.ARTIFACTS / family / "evaluate"
    with distributed.launched(settings.device) as place:
        scored = Scored(family, settings, place.device)
    data = storage.DATA / scored.dataset
    inputs = [data / "clean", data / "stores", *(scored.folders[name] for name in scored.trained)]
    inputs += [scored.features] if scored.features else []
    stage = f"evaluate@{family}"
    with storage.alone(stage), tracking.run(stage, asdict(settings), inputs) as run:
        results = scored.family.evaluate(scored)
        with storage.atomic_folder(out) as folder:
            write_tables(results, folder)
            report.write(scored, results, folder)
        run.log({f"test/{name}": value for name, value in results.metrics.items()})
        for path in sorted(path for path in out.rglob("*") if path.is_file()):
            run.artifact(path, "/".join(path.relative_to(out).parent.parts))
    metric = scored.family.headline[0]
    say(f"{stage}: test {metric} {results.metrics[metric]:.4f}; the report is {out / 'report.html'}")


if __name__ == "__main__":
    command.run(main)
