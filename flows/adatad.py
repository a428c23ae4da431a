"""Train adatad from a form: dataset, recipe, what trains of the backbone, the values people change most, devices."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from pydantic import Field

from flows.forms import Devices, Training, train
from models.adatad.config import Mode

Preset = Literal[
    "params.yaml",
    "thumos_videomae_s",
    "thumos_videomae_b",
    "thumos_videomae_l",
    "thumos_videomae_h",
    "thumos_videomae_g",
]
Window = Annotated[int | None, Field(ge=16, multiple_of=16)]
Until = Literal["finetune", "evaluate", "register"]


@flow(name="adatad", persist_result=False)
def adatad(
    dataset: str = "actions",
    preset: Preset = "params.yaml",
    finetune: Training = Training(),  # noqa: B008 (Prefect shows it in the form)
    mode: Mode | None = None,
    window: Window = None,
    weights: str | None = None,
    devices: Devices = 1,
    until: Until = "register",
    force: bool = False,
) -> State[Any]:
    """Action segments in untrimmed videos; evaluated and registered.

    Args:
        dataset: Which entry of params.yaml's download section to train on
        preset: Where values come from: the project's params.yaml, or THUMOS-14's recipe for a size of VideoMAE
        finetune: What is left empty keeps the recipe's value
        mode: What trains of the backbone: adapters in its blocks, nothing, everything, or adapters beside its blocks
        window: Grid steps that the detector sees at once
        weights: VideoMAE checkpoint to start from, or OpenTAD's of the whole model: a name, a folder, a file, or none
        devices: GPUs it trains on, one process each
        until: The last stage to run, with all it needs
        force: Train again even where the result exists
    """
    values = {
        "adatad.model.backbone.mode": mode,
        "adatad.model.backbone.model_name": weights,
        "adatad.model.window": window,
    }
    return train("adatad", dataset, preset, {"finetune": finetune}, values, devices, until, force)
