"""Train videotag from a form: dataset, recipe, both phases, how frames become a video, devices."""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State

from flows.forms import Devices, Training, train

Preset = Literal["params.yaml", "videotag_3396"]
Pooling = Literal["lstm", "peephole", "nextvlad", "transformer", "mean"]
Until = Literal["tsn", "features", "tagger", "evaluate", "register"]


@flow(name="videotag", persist_result=False)
def videotag(
    dataset: str = "tags",
    preset: Preset = "params.yaml",
    tsn: Training = Training(),  # noqa: B008 (Prefect shows it in the form)
    tagger: Training = Training(),  # noqa: B008
    pooling: Pooling | None = None,
    tsn_weights: str | None = None,
    tagger_weights: str | None = None,
    devices: Devices = 1,
    until: Until = "register",
    force: bool = False,
) -> State[Any]:
    """Features of frames, then tags of videos; evaluated and registered.

    Args:
        dataset: Which entry of params.yaml's download section to train on
        preset: Where values come from: the project's params.yaml, or the original's yaml files for 3396 tags
        tsn: The picture network; what is left empty keeps the recipe's value
        tagger: What tags from features; what is left empty keeps the recipe's value
        pooling: How the frames' features become a video's; peephole is the original's LSTM, exact
        tsn_weights: What tsn starts from: torchvision's ResNet or the original's .pdparams, a name or a file, or none
        tagger_weights: What tagger starts from: the original's .pdparams, or none
        devices: GPUs a phase trains on, one process each
        until: The last stage to run, with all it needs
        force: Train again even where the result exists
    """
    values = {
        "videotag.tagger.model.pooling": pooling,
        "videotag.tsn.model.model_name": tsn_weights,
        "videotag.tagger.model.model_name": tagger_weights,
    }
    return train("videotag", dataset, preset, {"tsn": tsn, "tagger": tagger}, values, devices, until, force)
