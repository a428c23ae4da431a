"""The promotion gate from a form: compare a version with the champion and move the alias if it passes."""

from __future__ import annotations

from contextlib import chdir
from dataclasses import replace
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field

from flows import orchestration
from models.family import InputError
from tasks import params

Number = Annotated[int | None, Field(ge=1)]
MinGain = Annotated[float | None, Field(ge=-1, le=1)]


@flow(name="promote", persist_result=False)
def promote(family: str = "t3av", version: Number = None, min_gain: MinGain = None) -> State[Any]:
    """The state is Promoted or Held; versions that cannot be compared make the run fail with one line.

    Args:
        family: A folder of models/, such as t3av
        version: Empty is the one with the alias candidate
        min_gain: The whole 95 % interval of the difference must reach it; empty is as params.yaml says
    """
    from tasks import promote as gate  # loads torch: not for whoever only reads the form

    project = orchestration.project()
    try:
        with chdir(project):
            settings = params.stage(gate.Promote, "promote")
            if min_gain is not None:
                settings = replace(settings, min_gain=min_gain)
            decision = gate.promote(family, version, settings, f"flow run {flow_run.get_id()}")
    except InputError as error:
        get_run_logger().error("%s", error)
        return Failed(message=str(error))
    get_run_logger().info("%s", decision)
    difference = decision.difference
    create_markdown_artifact(
        f"**{decision.candidate} {'is the champion now' if decision.promoted else 'is not promoted'}**\n\n"
        f"| {difference.metric} | |\n|---|---|\n"
        f"| version {decision.candidate.number} | {difference.candidate:.4f} |\n"
        f"| champion {decision.champion.number} | {difference.champion:.4f} |\n"
        f"| 95 % interval of the difference | {difference.low:+.4f} to {difference.high:+.4f} |\n"
        f"| asked: no less than | {decision.min_gain:+g} |\n"
        f"| clips, the same for both | {difference.num_clips} |\n",
        key=f"promote-{family}",
        description=str(decision),
    )
    return Completed(name="Promoted" if decision.promoted else "Held", message=str(decision))
