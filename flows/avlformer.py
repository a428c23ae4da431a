"""Train avlformer from a form: dataset, recipe, weights to start from, how captions are written, devices."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from pydantic import Field

from flows.forms import Devices, Training, train

Preset = Literal["params.yaml", "favd_32frm", "favd_small"]
Beams = Annotated[int | None, Field(ge=1, le=64)]
Until = Literal["finetune", "evaluate", "register"]


@flow(name="avlformer", persist_result=False)
def avlformer(
    dataset: str = "descriptions",
    preset: Preset = "params.yaml",
    finetune: Training = Training(),  # noqa: B008 (Prefect shows it in the form)
    weights: str | None = None,
    video_weights: str | None = None,
    audio_weights: str | None = None,
    text_weights: str | None = None,
    beams: Beams = None,
    devices: Devices = 1,
    until: Until = "register",
    force: bool = False,
) -> State[Any]:
    """Descriptions of what is seen and heard; evaluated and registered.

    Args:
        dataset: Which entry of params.yaml's download section to train on
        preset: Where values come from: the project's params.yaml, FAVDBench's published run, or a smaller one
        finetune: What is left empty keeps the recipe's value
        weights: FAVDBench's model.bin, of all parts: a file, or none
        video_weights: Video Swin to start from: a file, or none
        audio_weights: PaSST to start from: a file, or none
        text_weights: BERT to start from: a name, a folder, a file, or none
        beams: Captions kept at a time while one is written; 1 takes the likeliest word each time
        devices: GPUs it trains on, one process each
        until: The last stage to run, with all it needs
        force: Train again even where the result exists
    """
    values = {
        "avlformer.model.model_name": weights,
        "avlformer.model.video.model_name": video_weights,
        "avlformer.model.audio.model_name": audio_weights,
        "avlformer.model.text.model_name": text_weights,
        "avlformer.finetune.decoding.beams": beams,
    }
    return train("avlformer", dataset, preset, {"finetune": finetune}, values, devices, until, force)
