"""`make up`: a Prefect server, an MLflow server and a worker per pool on this machine, until Ctrl-C.

Everything runs under a guard, so nothing is left behind however this process ends. State lies in .duet/.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from flows import orchestration
from flows.services import BIN, RESTART, Service, answers, wait_for
from models.family import InputError
from tasks import command, dvc_process, slots

POOLS = ("cpu", "gpu")
CPU_RUNS = 4  # flow runs at once; a pipeline waiting for the GPU counts as one


@dataclass(frozen=True)
class Settings:
    """Where the servers listen."""

    host: str
    prefect_port: int
    mlflow_port: int

    @property
    def reach(self) -> str:
        """The host by which clients on this machine reach the servers."""
        return "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host

    @property
    def prefect(self) -> str:
        """Address of the Prefect UI; the API lies below it."""
        return f"http://{self.reach}:{self.prefect_port}"

    @property
    def mlflow(self) -> str:
        """Address of MLflow."""
        return f"http://{self.reach}:{self.mlflow_port}"


def check(settings: Settings) -> bool:
    """Whether passwords are on; InputError when they are not and others could reach the servers."""
    secured = bool(os.environ.get("PREFECT_SERVER_API_AUTH_STRING") and os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD"))
    try:
        is_loopback = settings.host == "localhost" or ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback and not secured:
        raise InputError(
            f"{settings.host} is reachable from elsewhere; set PREFECT_SERVER_API_AUTH_STRING (user:password), "
            "MLFLOW_AUTH_ADMIN_PASSWORD and MLFLOW_FLASK_SERVER_SECRET_KEY, or keep 127.0.0.1"
        )
    if secured and not os.environ.get("MLFLOW_FLASK_SERVER_SECRET_KEY"):
        raise InputError("MLFLOW_FLASK_SERVER_SECRET_KEY is not set; MLflow's login needs a long random text there")
    return secured


def environment(settings: Settings, project: Path, secured: bool) -> dict[str, str]:
    """What servers, workers and the stages they run find around them."""
    state = project / ".duet"
    env = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # of features that we do not use; five processes less
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_HOME": str(state / "prefect"),
        "PREFECT_API_URL": f"{settings.prefect}/api",
        "PREFECT_UI_URL": settings.prefect,
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "MLFLOW_TRACKING_URI": settings.mlflow,
        "DUET_PROJECT": str(project),
    }
    if secured:
        env["PREFECT_API_AUTH_STRING"] = env["PREFECT_SERVER_API_AUTH_STRING"]
        env |= {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": env["MLFLOW_AUTH_ADMIN_PASSWORD"]}
        env["MLFLOW_AUTH_CONFIG_PATH"] = str(state / "mlflow-auth.ini")
    return env


def services(settings: Settings, project: Path, env: Mapping[str, str], secured: bool) -> dict[str, Service]:
    """The servers and the workers, by name."""
    host = ["--host", settings.host]
    # The same database and artifacts as without a server, so that earlier runs of `dvc repro` are there too.
    store = ["--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", str(project / "mlruns")]
    login = ["--app-name", "basic-auth", "--allowed-hosts", "*"] if secured else []
    lines = {
        "prefect": ["prefect", "server", "start", *host, "--port", str(settings.prefect_port)],
        "mlflow": ["mlflow", "server", *host, "--port", str(settings.mlflow_port), "--workers", "1", *store, *login],
    }
    limits = {"cpu": CPU_RUNS, "gpu": len(slots.devices())}
    for pool in POOLS:
        worker = ["prefect", "worker", "start", "--pool", pool, "--type", "process", "--install-policy", "never"]
        lines[f"worker-{pool}"] = [*worker, "--name", f"{pool}@{os.uname().nodename}", "--limit", str(limits[pool])]
    logs = project / ".duet/logs"
    logs.mkdir(parents=True, exist_ok=True)
    return {
        name: Service(name, [str(BIN / line[0]), *line[1:]], logs / f"{name}.log", env, project)
        for name, line in lines.items()
    }


def deploy(project: Path, env: Mapping[str, str], stop: Event) -> None:
    """Make the pools and apply prefect.yaml."""
    steps = [["work-pool", "create", pool, "--type", "process", "--overwrite"] for pool in POOLS]
    steps.append(["deploy", "--all", "--prefect-file", str(Path(__file__).parents[1] / "prefect.yaml")])
    log = project / ".duet/logs/deploy.log"
    for step in steps:
        line = [str(BIN / "prefect"), "--no-prompt", *step]
        code, tail = dvc_process.run(line, project, lambda text: None, stop, log=log, environment=env)
        if code:
            raise InputError(f"prefect {' '.join(step[:2])}: {' '.join(tail[-5:])}")


def serve(settings: Settings, project: Path, stop: Event) -> None:
    """Start everything, keep it running until `stop`, end it: the workers first, so that their runs can report."""
    secured = check(settings)
    env = environment(settings, project, secured)
    if secured:
        database = f"sqlite:///{project / '.duet/mlflow-auth.db'}"
        rules = "authorization_function = mlflow.server.auth:authenticate_request_basic_auth"
        Path(env["MLFLOW_AUTH_CONFIG_PATH"]).write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {database}\nadmin_username = admin\n{rules}\n"
        )
    known = services(settings, project, env, secured)
    servers = {"prefect": f"{settings.prefect}/api/health", "mlflow": f"{settings.mlflow}/health"}
    try:
        for name, address in servers.items():
            if answers(address):
                raise InputError(f"something answers at {address} already; stop it or choose another port")
            known[name].start()
        for name, address in servers.items():
            wait_for(known[name], address, stop)
        deploy(project, env, stop)
        command.say(f"Prefect  {settings.prefect}\nMLflow   {settings.mlflow}\nCtrl-C stops both and the workers")
        while not stop.wait(1):
            for service in known.values():
                if service.has_ended() and time.monotonic() - service.started > RESTART:
                    if service.running:
                        command.say(f"{service.name} ended; starting it again (its log: {service.log})")
                    service.start()
    except dvc_process.Stopped:
        pass
    finally:
        for group in (known.keys() - servers, servers):
            for name in group:
                if running := known[name].running:
                    running.stop()
            for name in group:
                known[name].end()


def main() -> None:
    """Read the addresses, serve until a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default=os.environ.get("DUET_HOST", "127.0.0.1"), help="or DUET_HOST")
    parser.add_argument("--prefect-port", type=int, default=int(os.environ.get("DUET_PREFECT_PORT", "4200")))
    parser.add_argument("--mlflow-port", type=int, default=int(os.environ.get("DUET_MLFLOW_PORT", "5000")))
    stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    project = orchestration.project()
    (project / ".duet").mkdir(exist_ok=True)
    serve(Settings(**vars(parser.parse_args())), project, stop)
    command.say("stopped; nothing is left running")


if __name__ == "__main__":
    command.run(main)
