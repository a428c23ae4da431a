"""Two clones that share no folder: stages of one run on both, through git, S3 and Prefect; results fetched by a third."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import boto3
import pytest

from flows import up
from flows.services import BIN, Service, wait_for
from tasks import dvc_process
from tests.flows.conftest import Toy, shell
from tests.flows.servers import ROOT, Api, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

GRAPH = """
stages:
  prepare:
    cmd: echo ${first.value} > numbers.txt
    params: [first.value]
    outs: [numbers.txt]
  fit:
    cmd: python fit.py
    deps: [fit.py, numbers.txt]
    outs: [model.txt]
  report:
    cmd: sed s/fitted/reported/ model.txt > report.txt
    deps: [model.txt]
    outs: [report.txt]
"""
FIT = """
from pathlib import Path
from tasks import tracking
model = Path("model.txt")
with tracking.run("fit@toy", {"value": Path("numbers.txt").read_text().strip()}) as run:
    model.write_text(f"fitted to {Path('numbers.txt').read_text().strip()} in {Path.cwd()}")
    run.artifact(model)
"""


class Machines:
    """A git server's repository, an S3 store, Prefect, MLflow on that store, and workers with a clone each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.running: list[Service] = []
        self.s3, self.mlflow, prefect = (f"http://127.0.0.1:{free_port()}" for _ in range(3))
        self.api = Api(prefect)
        self.store = boto3.client("s3", endpoint_url=self.s3, aws_access_key_id="duet", aws_secret_access_key="secret")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "MLFLOW", "AWS", "DUET"))}
        self.env = kept | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DO_NOT_TRACK": "1",
            "AWS_ENDPOINT_URL": self.s3,
            "AWS_ACCESS_KEY_ID": "duet",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "PREFECT_API_URL": f"{prefect}/api",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "MLFLOW_TRACKING_URI": self.mlflow,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DUET_REPO": str(root / "origin.git"),
            "DUET_REMOTE": "s3://duet/cache",
        }

    def begin(self) -> None:
        """Start the servers; make buckets, pools and deployments."""
        where = lambda address: ("--host", "127.0.0.1", "--port", address.rpartition(":")[2])  # noqa: E731
        kept = ("--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", "s3://mlflow")
        lines = {
            self.s3: ("moto_server", *where(self.s3)),
            f"{self.mlflow}/health": ("mlflow", "server", *where(self.mlflow), "--workers", "1", *kept),
            f"{self.api.prefect}/api/health": ("prefect", "server", "start", *where(self.api.prefect)),
        }
        started = {address: self.start(line[0], str(BIN / line[0]), *line[1:]) for address, line in lines.items()}
        for address, service in started.items():
            wait_for(service, address, Event())
        for bucket in ("duet", "mlflow"):
            self.store.create_bucket(Bucket=bucket)
        up.deploy(self.root / "prefect", self.env, Event())

    def start(self, name: str, *line: str, **variables: str) -> Service:
        """A process in a folder of its own, with a home of its own for Prefect."""
        folder = self.root / name
        folder.mkdir()
        env = self.env | {"PREFECT_HOME": str(self.root / f"home-{name}"), **variables}
        service = Service(name, line, folder.with_suffix(".log"), env, folder)
        service.start()
        self.running.append(service)
        return service

    def worker(self, clone: str, pool: str) -> Service:
        """As the container does it: a clone made from the repository, then a worker in it."""
        health = {"PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1", "PREFECT_WORKER_WEBSERVER_PORT": str(free_port())}
        return self.start(clone, str(ROOT / "docker/entrypoint.sh"), "worker", DUET_POOL=pool, **health)

    def keys(self, bucket: str) -> list[str]:
        return [entry["Key"] for entry in self.store.list_objects_v2(Bucket=bucket).get("Contents", [])]


@pytest.fixture
def machines(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    monkeypatch.delenv("DUET_TRACKING")
    toy.graph(GRAPH)
    (toy.root / "fit.py").write_text(FIT)
    params = (toy.root / "params.yaml").read_text()
    (toy.root / "params.yaml").write_text(params.replace("stages: {}", "stages: {fit: {pool: gpu}}"))
    toy.commit()
    shell(tmp_path, "git", "clone", "--quiet", "--bare", str(toy.root), "origin.git")
    shutil.rmtree(toy.root)
    made = Machines(tmp_path)
    try:
        made.begin()
        yield made
    finally:
        for service in reversed(made.running):
            service.end()


def test_stages_of_one_run_on_two_machines(machines: Machines, tmp_path: Path) -> None:
    api, a, b = machines.api, tmp_path / "a", tmp_path / "b"
    first = machines.worker("a", "cpu")
    machines.worker("b", "gpu")
    run = api.trigger("pipeline/pipeline", params={"first.value": 7})
    state = api.wait(run)
    assert state["message"] == "3 stages ran, 0 cached", api.log(run)
    done = dict.fromkeys(("prepare", "fit", "report"), "Completed")
    assert api.tasks(run).items() >= done.items()  # beside them the flow run on b

    # `fit` worked in b, on an input that came by S3; its output came to a by S3 too, and `report` used it.
    caches = [{path.name for path in (clone / ".dvc/cache/files").rglob("*") if path.is_file()} for clone in (a, b)]
    remote = {key.rpartition("/")[2] for key in machines.keys("duet") if "/files/" in key}
    assert len(caches[0] & remote) == 3
    assert len(caches[1] & remote) == 2
    deadline = time.monotonic() + 120  # what a stage tells MLflow is sent beside its work
    while not any(key.endswith("model.txt") for key in machines.keys("mlflow")):
        assert time.monotonic() < deadline, machines.keys("mlflow")
        time.sleep(1)
    assert not list((a / ".duet/runs").glob("*/*")) and not list((b / ".duet/runs").glob("*/*"))

    # A third clone that was not there gets the experiment from git and its files from S3.
    c = tmp_path / "c"
    shell(tmp_path, "git", "clone", "--quiet", str(tmp_path / "origin.git"), "c")
    shutil.copy(a / ".dvc/config.local", c / ".dvc/config.local")
    for key, value in (("user.name", "test"), ("user.email", "test@example.org")):
        shell(c, "git", "config", key, value)  # a person's clone has them, and DVC asks for them
    (name,) = {
        ref.rpartition("/")[2] for ref in shell(c, "git", "ls-remote", "origin", "refs/exps/*").split() if "/" in ref
    }
    for command in (["exp", "pull", "origin", name], ["exp", "apply", name]):
        code, tail = dvc_process.run(
            [str(BIN / "dvc"), *command], c, print, Event(), log=c / "log", environment=machines.env
        )
        assert not code, tail
    assert (c / "model.txt").read_text().startswith(f"fitted to 7 in {b}/.duet/runs/")
    assert (c / "report.txt").read_text() == (c / "model.txt").read_text().replace("fitted", "reported")
    assert "value: 7" in (c / "params.yaml").read_text()

    # The first machine is gone. A whole run on the other finds every result in S3.
    first.end()
    shutil.rmtree(a)
    machines.worker("d", "cpu")
    run = api.trigger("pipeline/pipeline", params={"first.value": 7})
    assert api.wait(run)["message"] == "0 stages ran, 3 cached", api.log(run)
