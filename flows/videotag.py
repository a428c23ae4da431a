"""Train videotag from a form: dataset, recipe, both phases, how frames become a video, devices."""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Failed

from flows.forms import Devices, Training, recipe
from flows.pipeline import Request, run_graph
from models.family import InputError

PHASES = ("tsn", "tagger")
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
    values: dict[str, Any] = {
        "videotag.dataset": dataset,
        "videotag.tagger.model.pooling": pooling,
        "videotag.tsn.model.model_name": tsn_weights,
        "videotag.tagger.model.model_name": tagger_weights,
    }
    for phase, form in zip(PHASES, (tsn, tagger), strict=True):
        values |= {f"videotag.{phase}.{key}": value for key, value in form.model_dump().items()}
        values[f"orchestration.stages.{phase}.devices"] = devices
    trained = PHASES[:1] if until in ("tsn", "features") else PHASES
    try:
        overlay = recipe("videotag", dataset, preset)
    except InputError as error:
        return Failed(message=str(error))
    return run_graph(
        Request(
            targets=[f"{until}@videotag"],
            force=[f"{phase}@videotag" for phase in trained] if force else (),
            changes={key: value for key, value in values.items() if value is not None},
            overlay=overlay,
        )
    )
