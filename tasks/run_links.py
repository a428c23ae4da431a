"""Addresses of the MLflow runs that a stage left, for whoever shows the stage."""

from __future__ import annotations

import os

from tasks import tracking


def run_links(stage: str, flow_run_id: str) -> list[tuple[str, str]]:
    """(run name, address) of the runs of `stage` made under this flow run, the latest first; none without a server.

    MLFLOW_UI_URL wins over MLFLOW_TRACKING_URI where people reach the server by another name than the workers.
    """
    address = os.environ.get("MLFLOW_UI_URL") or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not address.startswith("http"):
        return []
    tracking.flush()
    store = tracking.client()
    wanted = f"tags.`prefect.flow_run_id` = '{flow_run_id}' AND tags.`stage` = '{stage}'"
    experiments = [item.experiment_id for item in store.search_experiments()]
    runs = store.search_runs(experiments, wanted, order_by=["start_time DESC"])
    page = f"{address.rstrip('/')}/#/experiments"
    return [(run.info.run_name or stage, f"{page}/{run.info.experiment_id}/runs/{run.info.run_id}") for run in runs]
