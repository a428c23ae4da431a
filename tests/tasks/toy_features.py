"""A family of two phases: one makes features of pictures, the other learns tags from them."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import models
from models.family import Batch, ClipSpec, Facts, Family, FeatureSpec, Phase, Sample
from models.metrics import MeanMetric
from tasks import bundle

NAME, SIDE, DIM = "toytags", 8, 12


@dataclasses.dataclass(frozen=True)
class Pictures:
    most: int  # frames of a clip
    wrap: int  # of these, the first ones once more


@dataclasses.dataclass(frozen=True)
class Tags:
    width: int


class PictureNet(nn.Module):
    """Mean colours of quarters of the picture."""

    def __init__(self, config: Pictures, facts: Facts) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, DIM))

    def extract(self, frames: Tensor) -> Tensor:
        assert frames.dtype == torch.uint8 and frames.shape[1:] == (3, SIDE, SIDE)
        return nn.functional.adaptive_avg_pool2d(frames.float() / 255, 2).flatten(1) * self.scale


class TagNet(nn.Module):
    def __init__(self, config: Tags, facts: Facts) -> None:
        super().__init__()
        self.output = nn.Linear(DIM, len(facts.labels["tag"]))

    def forward(self, batch: Batch) -> Batch:
        logits = self.output(batch["features"])
        loss = (
            nn.functional.binary_cross_entropy_with_logits(logits, batch["tags"]) if "tags" in batch else logits.sum()
        )
        return {"loss": loss} if self.training else {"logits": logits}


def spec(config: Pictures) -> FeatureSpec:
    def choose(num: int, fps: float) -> list[int]:
        step = max(num // config.most, 1)
        return [*range(0, num, step)][: config.most] + list(range(config.wrap))

    return FeatureSpec(DIM, choose, lambda image: np.ascontiguousarray(image[:SIDE, :SIDE]), segments=4)


def transform(config: Tags, facts: Facts, training: bool) -> Any:
    def apply(sample: Sample) -> Batch:
        assert sample.features is not None and sample.feature_times is not None and sample.frames is None
        assert len(sample.features) == len(sample.feature_times)
        batch = {"features": torch.from_numpy(sample.features.mean(0))}
        if sample.annotation:
            batch["tags"] = torch.zeros(len(facts.labels["tag"]))
            batch["tags"][sample.annotation["tags"]] = 1
        return batch

    return apply


def labels(annotations: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, list[str]]:
    return {"tag": [f"{name} #{k}" for k, name in enumerate(classes)]}


FAMILY = Family(
    title="toy",
    phases={
        "pictures": Phase(
            Pictures, lambda config: ClipSpec(2, 0, 0.0), lambda config, facts, training: lambda sample: {}, PictureNet,
            lambda config, facts: MeanMetric(["loss"]), ("loss", "min"), Pictures(6, 0), features=spec,
        ),
        "tags": Phase(
            Tags, lambda config: ClipSpec(0, 0, 0.0, features="pictures"), transform, TagNet,
            lambda config, facts: MeanMetric(["loss"]), ("loss", "min"), Tags(4),
            present=lambda found, facts: [{"scores": row.tolist()} for row in found["logits"]],
        ),
    },
    final="tags", labels=labels, evaluate=lambda run: None,  # pyright: ignore
    headline=("loss", lambda table: lambda weights: weights),
)  # fmt: skip


def install(kill_at: int = 0) -> None:
    """Make the family known in this process, and kill this process at the given renaming of a file."""
    module = ModuleType(f"models.{NAME}")
    module.FAMILY = FAMILY  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules[module.__name__] = module
    models.names = lambda: [NAME]
    if kill_at:
        calls = iter(range(1, kill_at + 1))

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event == "os.rename" and next(calls, kill_at) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


def write_pictures(folder: Path, most: int = 6, wrap: int = 0, scale: float = 1.0) -> Path:
    """A bundle of the phase that makes features."""
    config, facts = Pictures(most, wrap), Facts({"tag": ["a", "b"]}, 0.0, 1.0)
    state = {"scale": torch.linspace(0.5, 1.5, DIM) * scale}
    meta = {
        "family": NAME, "phase": "pictures", "config": bundle.plain(config), "facts": dataclasses.asdict(facts),
        "stores": {}, "dataset": "clips", "pretrained": {}, "started_from": "none",
    }  # fmt: skip
    bundle.save(folder, state, meta, [{"epoch": 0}])
    return folder
