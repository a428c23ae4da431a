"""What the forms of all families share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from prefect.client.schemas.objects import State
from prefect.states import Failed
from pydantic import BaseModel, ConfigDict, Field

import models
from flows import orchestration
from flows.pipeline import Request, run_graph
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


def train(
    family: str,
    dataset: str,
    preset: str,
    phases: Mapping[str, Training],
    values: Mapping[str, Any],
    devices: int,
    until: str,
    force: bool,
) -> State[Any]:
    """Run the family's stages up to `until` as its form says: `values` of params.yaml by dotted name, None = the recipe's.

    `phases` are those that the form trains; `force` trains again what `until` needs of them.
    """
    changes = {f"{family}.dataset": dataset, **values}
    for phase, form in phases.items():
        changes |= {f"{family}.{phase}.{key}": value for key, value in form.model_dump().items()}
        changes[f"orchestration.stages.{phase}.devices"] = devices
    try:
        overlay = recipe(family, dataset, preset)
    except InputError as error:
        return Failed(message=str(error))
    return run_graph(
        Request(
            targets=[f"{until}@{family}"],
            force=[f"{phase}@{family}" for phase in phases] if force else (),
            changes={key: value for key, value in changes.items() if value is not None},
            overlay=overlay,
        )
    )
