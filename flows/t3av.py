"""Train T3-AV from a form: dataset, recipe, the values people change most, devices."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from pydantic import Field

from flows.forms import Devices, Training, train

Preset = Literal["params.yaml", "vggsound"]
MaskRatio = Annotated[float | None, Field(gt=0, lt=1)]
Temperature = Annotated[float | None, Field(gt=0, lt=10)]
Until = Literal["pretrain", "contrastive", "finetune", "evaluate", "register"]


@flow(name="t3av", persist_result=False)
def t3av(
    dataset: str = "sounds",
    preset: Preset = "params.yaml",
    pretrain: Training = Training(),  # noqa: B008 (Prefect shows it in the form)
    contrastive: Training = Training(),  # noqa: B008
    finetune: Training = Training(),  # noqa: B008
    mask_ratio: MaskRatio = None,
    temperature: Temperature = None,
    devices: Devices = 1,
    until: Until = "register",
    force: bool = False,
) -> State[Any]:
    """Masked auto-encoding, contrastive alignment, sound-event classification; evaluated and registered.

    Args:
        dataset: Which entry of params.yaml's download section to train on
        preset: Where values come from: the project's params.yaml, or the published VGGSound recipe
        pretrain: Masked auto-encoding; what is left empty keeps the recipe's value
        contrastive: Alignment of picture and sound; what is left empty keeps the recipe's value
        finetune: Classification; what is left empty keeps the recipe's value
        mask_ratio: Share of tokens hidden in pretrain, seen and heard
        temperature: Of the contrastive loss, at the start
        devices: GPUs a phase trains on, one process each
        until: The last stage to run, with all it needs
        force: Train again even where the result exists
    """
    phases = {"pretrain": pretrain, "contrastive": contrastive, "finetune": finetune}
    values = {
        "t3av.pretrain.mask_ratio": mask_ratio,
        "t3av.pretrain.audio_mask_ratio": mask_ratio,
        "t3av.contrastive.temperature": temperature,
    }
    return train("t3av", dataset, preset, phases, values, devices, until, force)
