"""Evaluate a family's trained weights again, and nothing else."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State
from pydantic import Field

from flows.pipeline import Request, run_graph

NumBootstrap = Annotated[int | None, Field(ge=1, le=100_000)]


@flow(name="evaluate", persist_result=False)
def score(family: str = "t3av", num_bootstrap: NumBootstrap = None, force: bool = False) -> State[Any]:
    """Score the weights that dvc.lock knows on the test split they were kept from.

    Args:
        family: A folder of models/, such as t3av
        num_bootstrap: Resamples behind an interval
        force: Evaluate even where nothing changed
    """
    changes = {} if num_bootstrap is None else {"evaluate.num_bootstrap": num_bootstrap}
    target = f"evaluate@{family}"
    return run_graph(Request(targets=[target], extent="alone", force=[target] if force else (), changes=changes))
