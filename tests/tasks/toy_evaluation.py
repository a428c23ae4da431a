"""A project whose data and checkpoints stand ready to be evaluated: small pictures and sounds, tiny untrained models."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import simplejpeg
import torch
from ruamel.yaml import YAML

import models
from models.family import Facts
from tasks import bundle, stores
from tasks.data import audio_store, frame_store, index, manifest

LABELS = ["bee, wasp, etc. buzzing", "dog <b>barking</b>", 'a "bell" & co', "rain"]
FACTS = Facts({"label": sorted(LABELS)}, -5.0, 4.0)
PHASES = ("pretrain", "contrastive", "finetune")
RATE, FRAMES = 16000, 3
TRAIN, TEST = 16, 12
STORES = {"num_frames": FRAMES, "short_side": 0, "quality": 95, "sample_rate": RATE, "codec": "pcm16"}
NO_JUDGES = {"clip": "none", "trilip": "none", "t5": "none", "spice": "none"}
EVALUATE = {
    "batch_size": 5, "num_workers": 0, "num_bootstrap": 300, "seed": 3, "device": "cpu", "judges": NO_JUDGES,
}  # fmt: skip


def clip_ids(split: str) -> list[str]:
    """The clips of a split, in the manifest's order."""
    return [f"{split}_{i:02d}" for i in range({"train": TRAIN, "val": 2, "test": TEST}[split])]


def write_project(
    root: Path,
    silent: Collection[str] = (),
    blind: Collection[str] = (),
    twins: Mapping[str, str] | None = None,
    groups: Mapping[str, str] | None = None,
) -> None:
    """Manifest, stores, bundles and params.yaml below `root`, as the stages before evaluation leave them.

    `silent` and `blind` clips have no sound and no pictures; a clip among `twins` is the copy of another one.
    """
    ids = [clip for split in manifest.SPLITS for clip in clip_ids(split)]
    seeds = {clip: ids.index((twins or {}).get(clip, clip)) for clip in ids}
    pictures = {clip: [] if clip in blind else draw(seeds[clip]) for clip in ids}
    waves = {clip: sound(seeds[clip]) for clip in ids if clip not in silent}
    folder = root / "data/sounds/stores"
    frame_store.write_frames(folder / "frames-00000-of-00001.tsv", [(c, 24, 16, p) for c, p in pictures.items()])
    audio_store.write_audio(folder / "audio-00000-of-00001.h5", list(waves.items()), RATE, "pcm16")
    stored = pd.DataFrame({"id": ids, "shard": 0, "row": range(len(ids)), "width": 24, "height": 16})
    stored["num_frames"] = [len(pictures[clip]) for clip in ids]
    stored["has_audio"] = [clip in waves for clip in ids]
    stored["audio_row"] = [list(waves).index(clip) if clip in waves else -1 for clip in ids]
    rows = []
    for number, clip in enumerate(ids):
        row = dict.fromkeys(manifest.COLUMNS, 0) | {"id": clip, "path": f"raw/{clip}.mp4", "checksum": "ab"}
        row |= {"split": clip.split("_")[0], "group": (groups or {}).get(clip, clip)}
        row |= {"has_video": clip not in blind, "has_audio": clip in waves}
        rows.append(row | {"annotation": json.dumps({"label": LABELS[number % len(LABELS)]})})
    table = pd.DataFrame(rows)
    manifest.write(table, root / "data/sounds/clean/manifest.parquet")
    with contextlib.chdir(root):
        listed, digest = manifest.read("sounds", columns=stores.LISTED), manifest.digest("sounds")
    index.write(listed.merge(stored, on="id"), folder, digest)
    for stage, lost in (("clean", 2), ("stores", 0)):
        dropped = pd.DataFrame({"id": [f"lost_{i}" for i in range(lost)], "reason": "empty"})
        dropped.to_csv(root / "data/sounds" / stage / "quarantine.csv", index=False)
    for number, phase in enumerate(PHASES):
        write_bundle(root / "artifacts/t3av" / phase, phase, number)
    with (root / "params.yaml").open("w") as file:
        YAML().dump({"evaluate": EVALUATE, "t3av": {"dataset": "sounds"}}, file)


def draw(seed: int) -> list[bytes]:
    """JPEGs of noise in few large blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (FRAMES, 2, 3, 3), dtype=np.uint8)
    return [simplejpeg.encode_jpeg(np.ascontiguousarray(b.repeat(8, 0).repeat(8, 1)), 95, "RGB") for b in blocks]


def sound(seed: int) -> np.ndarray:
    """(N,) int16: half a second of a tone and noise."""
    rng = np.random.default_rng([seed, 1])
    tone = np.sin(2 * np.pi * rng.uniform(200, 4000) / RATE * np.arange(RATE // 2))
    return (8000 * tone + 1000 * rng.standard_normal(RATE // 2)).astype(np.int16)


def write_bundle(folder: Path, phase: str, seed: int) -> None:
    """A phase's tiny model with random weights, of three epochs' history."""
    chosen = models.load("t3av").phases[phase]
    torch.manual_seed(seed)
    module = chosen.build(chosen.tiny, FACTS)
    with torch.no_grad():  # untrained logits are all but equal: make them differ, so that answers depend on the clip
        for name, parameter in module.named_parameters():
            if name.startswith("classifier.") and parameter.ndim > 1:
                parameter.mul_(4)
    meta = {
        "family": "t3av", "phase": phase, "dataset": "sounds", "config": asdict(chosen.tiny),
        "training": {"lr": 1e-3, "start_from": "none"}, "facts": asdict(FACTS), "stores": STORES,
        "started_from": "none" if phase == "pretrain" else {"phase": "pretrain", "sha256": "c" * 64},
        "pretrained": {}, "metrics": {}, "epoch": 1, "step": 2,
    }  # fmt: skip
    losses = [{"epoch": e, "train_loss": 1 / (e + 1), "val_loss": 1.5 / (e + 1), "lr": 0.1} for e in range(3)]
    scores = {"finetune": ("val_top1", "val_macro_f1"), "contrastive": ("val_r1_v2a",)}.get(phase, ())
    history = [{**row, **dict.fromkeys(scores, 0.2 * row["epoch"])} for row in losses]
    bundle.save(folder, module.state_dict(), meta, history)
