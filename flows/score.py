"""Evaluate a family's trained weights again, and nothing else."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State
from pydantic import Field

from flows.pipeline import Request, run_graph

Family = Annotated[str, Field(description="A folder of models/, such as t3av")]
NumBootstrap = Annotated[int | None, Field(ge=1, le=100_000, description="Resamples of an interval")]
Force = Annotated[bool, Field(description="Evaluate even where nothing changed")]


@flow(name="evaluate", persist_result=False)
def score(family: Family = "t3av", num_bootstrap: NumBootstrap = None, force: Force = False) -> State[Any]:
    """Score the weights that dvc.lock knows on the test split they were kept from."""
    changes = {} if num_bootstrap is None else {"evaluate.num_bootstrap": num_bootstrap}
    target = f"evaluate@{family}"
    return run_graph(Request(targets=[target], extent="alone", force=[target] if force else (), changes=changes))
