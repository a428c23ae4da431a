"""Fetch data again and bring what is made of it up to date; training is left alone."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.pipeline import Request, run_graph


@flow(name="refresh-data", persist_result=False)
def refresh_data(datasets: list[str] = [], download: bool = True) -> State[Any]:  # noqa: B006
    """Download, subset, clean, stores. What comes out the same re-runs nothing after it.

    Args:
        datasets: Entries of params.yaml's download section; none: all of them
        download: Ask the source again even where params did not change
    """
    stages = [f"stores@{name}" for name in datasets] or ["stores"]
    sources = [f"download@{name}" for name in datasets] or ["download"]
    return run_graph(Request(targets=stages, force=sources if download else ()))
