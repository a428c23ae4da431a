"""The gate under a real Prefect server: its states and what it shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.testing.utilities import prefect_test_harness

from flows.promote import promote
from tasks import tracking

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A project with a champion that is right half of the time, and a candidate that always is."""
    monkeypatch.setenv("DUET_PROJECT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "params.yaml").write_text("promote: {min_gain: 0.0, num_bootstrap: 500, seed: 1}\n")
    monkeypatch.chdir(tmp_path)
    client = tracking.client()
    client.create_registered_model("duet-t3av")
    for wrong in ("rain", "wind"):
        rows = [f"{i},{i},wind,{rain_or_wind(i, wrong)}" for i in range(100)]
        (tmp_path / "predictions.csv").write_text("\n".join(["clip,group,truth,prediction_1", *rows]))
        run = client.create_run(tracking.experiment(client, "t3av")).info.run_id
        client.log_artifact(run, str(tmp_path / "predictions.csv"), tracking.EVALUATION)
        client.create_model_version("duet-t3av", "x", run, {"duet.evaluation_data": "d"})
    tracking.set_alias("duet-t3av", "champion", 1)
    tracking.set_alias("duet-t3av", "candidate", 2)
    return client


def rain_or_wind(number: int, wrong: str) -> str:
    return wrong if number % 2 else "wind"


def shown(state: Any) -> list[str]:
    with get_client(sync_client=True) as client:
        return [str(a.data) for a in client.read_artifacts() if a.flow_run_id == state.state_details.flow_run_id]


def test_held_then_promoted_then_refused(store: Any) -> None:
    held = promote("t3av", 2, min_gain=0.9, return_state=True)
    assert (held.name, held.is_completed()) == ("Held", True)
    assert "duet-t3av 2 is not promoted" in shown(held)[0]
    passed = promote("t3av", return_state=True)
    assert (passed.name, passed.is_completed()) == ("Promoted", True)
    assert "**duet-t3av 2 is the champion now**" in shown(passed)[0]
    version = store.get_model_version_by_alias("duet-t3av", "champion")
    assert int(version.version) == 2
    assert version.tags["promotion.by"] == f"flow run {passed.state_details.flow_run_id}"
    again = promote("t3av", return_state=True)
    assert again.is_failed()
    assert again.message == "duet-t3av 2 is the champion already; register another version, or name one"
    assert not shown(again)
