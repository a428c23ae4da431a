"""Addresses in MLflow of what a stage left, for whoever shows the stage."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tasks import tracking


def run_links(stage: str, flow_run_id: str) -> list[tuple[str, str]]:
    """(run name, address) of the runs of `stage` made under this flow run, the latest first; none without a server.

    MLFLOW_UI_URL wins over MLFLOW_TRACKING_URI where people reach the server by another name than the workers.
    """
    if not (address := _server()):
        return []
    tracking.flush()
    store = tracking.client()
    wanted = f"tags.`prefect.flow_run_id` = '{flow_run_id}' AND tags.`stage` = '{stage}'"
    experiments = [item.experiment_id for item in store.search_experiments()]
    runs = store.search_runs(experiments, wanted, order_by=["start_time DESC"])
    page = f"{address}/#/experiments"
    return [(run.info.run_name or stage, f"{page}/{run.info.experiment_id}/runs/{run.info.run_id}") for run in runs]


def version_link(file: Path) -> tuple[str, str] | None:
    """(words, address) of the registered version that a version.json tells; None without a server."""
    if not (address := _server()):
        return None
    told = json.loads(file.read_text())
    return f"{told['name']} version {told['version']}", f"{address}/#/models/{told['name']}/versions/{told['version']}"


def _server() -> str:
    """Empty where MLflow is a file."""
    address = os.environ.get("MLFLOW_UI_URL") or os.environ.get("MLFLOW_TRACKING_URI", "")
    return address.rstrip("/") if address.startswith("http") else ""
