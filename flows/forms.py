"""What the forms of all families share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

import models
from flows import orchestration
from models.family import InputError
from tasks import params

Devices = Annotated[int, Field(ge=1, le=64)]


class Training(BaseModel):
    """How long and how fast a phase learns; what is left empty keeps the recipe's value."""

    model_config = ConfigDict(extra="forbid")
    epochs: int | None = Field(default=None, ge=1, le=10_000, description="Passes over the training clips")
    batch_size: int | None = Field(default=None, ge=1, description="Clips a step, over all devices together")
    lr: float | None = Field(default=None, gt=0, lt=10, title="Learning rate", description="At its peak, after warm-up")


def recipe(family: str, dataset: str, preset: str) -> dict[str, Any]:
    """The preset's sections, those of data under the dataset's name."""
    known = params.section("download", path=orchestration.project() / "params.yaml")
    if dataset not in known:
        raise InputError(f"no dataset {dataset!r} in params.yaml's download section; there is {', '.join(known)}")
    if preset == "params.yaml":
        return {}
    sections = params.read(Path(models.__file__).parent / family / f"{preset}.yaml")
    return {key: value if key == family else {dataset: value} for key, value in sections.items()}
