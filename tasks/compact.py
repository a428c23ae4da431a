"""What a smaller model costs: `python -m tasks.compact FAMILY` makes, scores, times and registers smaller versions.

Beside the final phase stand its student (the phase that it teaches, where the family has one) and both with int8 weights.
One table has each one's size, its latency on this machine's CPU, and its macro-F1 on the test split. The versions get the
aliases student, int8 and student-int8 and no other: what is candidate or champion is for registration and promotion.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import models
from models.weights import quantise
from tasks import bundle, command, params, register, storage, tracking
from tasks.command import say
from tasks.data.batches import Clips, InOrder, build_loader, read_batches, stack
from tasks.data.loader import open_split

FULL, SUFFIX = "full", "macro_f1"  # the model that the others are measured against, and by which of the phase's metrics
NOTE = """
Size: weights.safetensors. Latency: one clip at a time from tensors in memory (frames and waveform, before log-mel) to the
answer, on the CPU with {threads} threads of torch {torch}; {repeats} calls of each model in turn, after {warmup} that did
not count. Macro-F1: the {clips} clips of the test split, and how much less than the full model has.

int8: weights of linear layers and convolutions are stored in 8 bits. Linear layers also compute in 8 bits; convolutions
get floats back when the model is loaded: for them int8 saves size only.
"""


@dataclass(frozen=True)
class Compact:
    """Section `compact` of params.yaml."""

    batch_size: int  # of scoring
    num_workers: int
    warmup: int  # calls before those whose latency counts
    repeats: int


@dataclass(frozen=True)
class Variant:
    """One of the models that are compared."""

    name: str  # also its alias in the registry
    folder: Path
    trained: bundle.Bundle
    clips: Clips  # the test split as it takes it


def make(family: str) -> list[Variant]:
    """The final phase, its student, and both in int8, which this writes."""
    known, root = models.load(family), storage.ARTIFACTS / family
    folders = {FULL: root / known.final}
    student = next((name for name, phase in known.phases.items() if phase.teacher == known.final), None)
    folders |= {"student": root / student} if student else {}
    for name in list(folders):
        small = "int8" if name == FULL else f"{name}-int8"
        write_int8(folders[name], root / small)
        folders[small] = root / small
    return [open_variant(name, folder) for name, folder in folders.items()]


def write_int8(source: Path, folder: Path) -> None:
    """The bundle at `source` with int8 weights: one that loads, answers and registers like any other."""
    trained = bundle.load(source)
    meta = {**trained.meta, "quantised_from": storage.file_digest(trained.path)}
    meta.pop("base", None)  # in 8 bits it is another, which the file holds
    history: list[dict[str, Any]] = pd.read_csv(source / bundle.HISTORY).to_dict("records")  # pyright: ignore
    bundle.save(folder, quantise(trained.module()), meta, history)


def open_variant(name: str, folder: Path) -> Variant:
    """A bundle and the clips that it is judged on."""
    trained = bundle.load(folder)
    phase = models.load(trained.family).phases[trained.phase]
    transform = phase.transform(trained.config, trained.facts, False)
    clips = open_split(str(trained.meta["dataset"]), "test", phase.clip(trained.config), transform, 0)
    return Variant(name, folder, trained, clips)


# --- the table -----------------------------------------------------------------------------------------------------------


def scores(variant: Variant, settings: Compact) -> dict[str, float]:
    """Macro-F1 of each head on the test split, as the phase's own metric has it; what has no label is left out."""
    trained = variant.trained
    module, phase = trained.module(), models.load(trained.family).phases[trained.phase]
    metric = phase.metrics(trained.config, trained.facts)
    order = InOrder(len(variant.clips), settings.batch_size)
    loader = build_loader(variant.clips, order, settings.num_workers, torch.device("cpu"))
    with torch.inference_mode():
        for batch in tqdm(read_batches(loader), total=len(loader), desc=variant.name, unit="batch"):
            metric.update(module(batch), batch)
    return {key: value for key, value in metric.compute().items() if key.endswith(SUFFIX) and np.isfinite(value)}


def latencies(variants: list[Variant], settings: Compact) -> dict[str, np.ndarray]:
    """Seconds of each call, model by model in turn, so that what else the machine does meets all alike."""
    modules = {variant.name: variant.trained.module() for variant in variants}
    batches = {variant.name: stack([variant.clips[0, 0]]) for variant in variants}
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    with torch.inference_mode():
        for _ in tqdm(range(settings.warmup + settings.repeats), desc="latency", unit="round"):
            for name, module in modules.items():
                begin = time.perf_counter()
                module(batches[name])
                seconds[name].append(time.perf_counter() - begin)
    return {name: np.array(values[settings.warmup :]) for name, values in seconds.items()}


def compare(variants: list[Variant], settings: Compact) -> tuple[pd.DataFrame, dict[str, dict[str, float]]]:
    """The table, a row a model; and each model's scores with their drops, which are the same on every run."""
    judged = {variant.name: scores(variant, settings) for variant in variants}
    for name, own in judged.items():
        if name != FULL:
            own |= {f"{key}_drop": judged[FULL][key] - value for key, value in list(own.items())}
    timed, rows = latencies(variants, settings), []
    for variant in variants:
        p50, p95 = np.percentile(1000 * timed[variant.name], [50, 95])
        size = (variant.folder / bundle.WEIGHTS).stat().st_size / 1e6
        row = {"model": variant.name, "size_mb": size, "latency_p50_ms": p50, "latency_p95_ms": p95}
        rows.append(row | {key: judged[variant.name].get(key, 0.0) for key in judged[variants[-1].name]})
    return pd.DataFrame(rows), judged


def markdown(table: pd.DataFrame, note: str) -> str:
    """The table for people."""
    lines = [list(table.columns), ["---", *["---:"] * (len(table.columns) - 1)]]
    for row in table.itertuples(index=False):
        lines.append([str(row[0]), *(f"{value:.3f}" if value < 1 else f"{value:.1f}" for value in row[1:])])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n" + note


# --- the command ---------------------------------------------------------------------------------------------------------


def register_all(variants: list[Variant], judged: Mapping[str, Mapping[str, float]], folder: Path) -> dict[str, int]:
    """A version and an alias for each model but the full one, which has its own registration; alias -> version."""
    versions = {}
    for variant in variants:
        if variant.name == FULL:
            continue
        scored = folder / variant.name
        scored.mkdir()
        values = {key: round(value, 6) for key, value in judged[variant.name].items()}
        (scored / "metrics.json").write_text(json.dumps(values, indent=1) + "\n")
        entry = register.submit(variant.trained.family, variant.folder, scored, f"compact@{variant.trained.family}")
        tracking.set_alias(entry.name, variant.name, entry.number)
        versions[variant.name] = entry.number
    return versions


def compact(family: str, settings: Compact, out: Path) -> tuple[pd.DataFrame, dict[str, int]]:
    """All of it; `out` gets table.csv, table.md, versions.json and each model's metrics.json."""
    variants = make(family)
    table, judged = compare(variants, settings)
    words = {"threads": torch.get_num_threads(), "torch": torch.__version__, "clips": len(variants[0].clips)}
    with storage.atomic_folder(out) as folder:
        table.to_csv(folder / "table.csv", index=False, float_format="%.6g")
        (folder / "table.md").write_text(markdown(table, NOTE.format(**words, **asdict(settings))))
        versions = register_all(variants, judged, folder)
        (folder / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
    return table, versions


def main() -> None:
    """Make, compare and register the smaller versions of a family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=models.names())
    family = parser.parse_args().family
    settings = params.stage(Compact, "compact")
    stage, out = f"compact@{family}", storage.ARTIFACTS / family / "compact"
    inputs = [storage.ARTIFACTS / family / name for name in models.load(family).phases]
    with storage.alone(stage), tracking.run(stage, asdict(settings), inputs) as run:
        table, versions = compact(family, settings, out)
        for row in table.to_dict("records"):
            run.log({f"{row['model']}/{key}": float(value) for key, value in row.items() if key != "model"})
        for name in ("table.csv", "table.md"):
            run.artifact(out / name)
    say((out / "table.md").read_text())
    say(f"{stage}: {', '.join(f'{alias} is version {number}' for alias, number in versions.items())}; table in {out}")


if __name__ == "__main__":
    command.run(main)
