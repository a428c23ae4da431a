"""Servers and workers as processes of this machine that end with whoever started them."""

from __future__ import annotations

import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from prefect.settings import PREFECT_API_URL, temporary_settings

from models.family import InputError
from tasks import dvc_process

BIN = Path(sys.executable).parent
PATIENCE = 600.0  # seconds for a server's first start, which makes its database, on a busy machine
RESTART = 10.0  # seconds between two starts of a service that keeps ending


@dataclass
class Service:
    """One process that is kept running."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    folder: Path
    running: dvc_process.Guarded | None = None
    started: float = -RESTART

    def start(self) -> None:
        """Start it, its output appended to its log."""
        self.started = time.monotonic()
        with self.log.open("ab") as log:
            self.running = dvc_process.guarded(
                self.command, grace=35, cwd=self.folder, env=dict(self.environment), stdout=log, stderr=log
            )

    def end(self) -> None:
        """Stop it and wait until nothing of it is left."""
        if self.running:
            self.running.stop()
            self.running.process.wait()

    def has_ended(self) -> bool:
        """Whether it should be started again."""
        return self.running is None or self.running.process.poll() is not None


def answers(address: str) -> bool:
    """Whether a server says anything at all there, a refusal without password included."""
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def wait_for(service: Service, address: str, stop: Event) -> None:
    """Return when the server answers; InputError with its log when it ends or takes too long."""
    while not answers(address):
        if stop.is_set():
            raise dvc_process.Stopped
        late = time.monotonic() - service.started > PATIENCE
        if service.has_ended() or late:
            tail = " | ".join(service.log.read_text(errors="replace").splitlines()[-3:])
            raise InputError(f"{service.name} did not start at {address} ({tail}); its log is {service.log}")
        time.sleep(0.5)


@contextmanager
def private_server(project: Path) -> Iterator[None]:
    """The server of PREFECT_API_URL; where there is none, one of our own for as long as the block lasts.

    Prefect would start one itself, but leaves it behind when this process is killed.
    """
    if PREFECT_API_URL.value():
        yield
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    home = project / ".duet/prefect-private"
    home.mkdir(parents=True, exist_ok=True)
    env = {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    line = [str(BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", port]
    server = Service("prefect", line, home / "server.log", os.environ | env, project)
    server.start()
    try:
        wait_for(server, f"http://127.0.0.1:{port}/api/health", Event())
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
            yield
    finally:
        server.end()
