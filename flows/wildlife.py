"""Train wildlife from a form: dataset, recipe, fusion, the values people change most, devices."""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State

from flows.forms import Devices, Training, train

Preset = Literal["params.yaml", "seed", "mammalps"]
Fusion = Literal["mbt", "concat", "twotoken"]
Until = Literal["finetune", "evaluate", "register", "compact"]


@flow(name="wildlife", persist_result=False)
def wildlife(
    dataset: str = "animals",
    preset: Preset = "params.yaml",
    finetune: Training = Training(),  # noqa: B008 (Prefect shows it in the form)
    fusion: Fusion | None = None,
    balanced_sampler: bool | None = None,
    devices: Devices = 1,
    until: Until = "register",
    force: bool = False,
) -> State[Any]:
    """Species and behaviour from video and sound; evaluated and registered.

    Args:
        dataset: Which entry of params.yaml's download section to train on
        preset: Where values come from: the project's params.yaml, the original's config.yaml, or MammAlps
        finetune: What is left empty keeps the recipe's value
        fusion: How picture and sound meet: bottleneck tokens, both features side by side, or the original's two tokens
        balanced_sampler: Draw every pair of species and activity equally often
        devices: GPUs it trains on, one process each
        until: The last stage to run, with all it needs; compact makes a student and int8 versions too
        force: Train again even where the result exists
    """
    values = {"wildlife.model.fusion": fusion, "wildlife.finetune.balanced_sampler": balanced_sampler}
    return train("wildlife", dataset, preset, {"finetune": finetune}, values, devices, until, force)
