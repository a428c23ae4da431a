"""What the orchestrator costs: the pipeline flow against `dvc repro` on a graph of trivial stages, all in one run.

    python benchmarks/overhead.py

Both are timed as commands, from the shell's point of view, so imports count. The Prefect server runs already.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks import table
from benchmarks.table import Row
from flows import services, up
from tasks import dvc_process

STAGES, REPEATS = 10, 3
PARAMS = "orchestration:\n  max_parallel: 2\n  stages: {}\n"
DEFAULT = "  default: {pool: cpu, devices: 0, retries: 0, backoff: 0, timeout: null}\n"


def build_project(root: Path, stages: int) -> None:
    """A repository whose first stage feeds all others."""
    graph = "stages:\n  s0:\n    cmd: echo 0 > s0.txt\n    outs: [s0.txt]\n"
    for i in range(1, stages):
        graph += f"  s{i}:\n    cmd: echo {i} > s{i}.txt\n    deps: [s0.txt]\n    outs: [s{i}.txt]\n"
    (root / "dvc.yaml").write_text(graph)
    (root / "params.yaml").write_text(PARAMS + DEFAULT)
    (root / ".dvc").mkdir()
    (root / ".dvc/config").write_text("[core]\n    analytics = false\n    check_update = false\n")
    (root / ".gitignore").write_text("*.txt\n/.duet/\n")
    for line in (["init", "-q"], ["add", "-A"], ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x"]):
        subprocess.run(["git", *line], cwd=root, check=True)


def timed(command: list[str], root: Path, env: Mapping[str, str], repeats: int) -> float:
    """Median wall seconds of a command."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run(command, cwd=root, env=env, check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def stages(quick: bool) -> Iterator[Row]:
    """Both with everything cached, then with everything to do."""
    num = 3 if quick else STAGES
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        build_project(root, num)
        settings = up.Settings("127.0.0.1", port, 0)
        (root / ".duet").mkdir()
        env = up.environment(settings, root, secured=False)
        server = dvc_process.guarded(
            [str(services.BIN / "prefect"), "server", "start", "--port", str(port)],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not services.answers(f"{settings.prefect}/api/health"):
                time.sleep(0.5)
            yield from compare(root, env, num, 1 if quick else REPEATS)
        finally:
            server.stop()
            server.process.wait()


def compare(root: Path, env: Mapping[str, str], num: int, repeats: int) -> Iterator[Row]:
    """The ratios are how many times longer ours takes."""
    env = {**env, "DUET_TRACKING": "off"}
    repro = [str(services.BIN / "dvc"), "repro"]
    flow = [sys.executable, "-m", "flows.pipeline", "--workspace", "current"]
    timed(flow, root, env, 1)  # fills dvc.lock and the server's first tables
    title = f"pipeline flow of {num} trivial stages, {{}}: how much longer it takes"
    peer, ours = timed(repro, root, env, repeats), timed(flow, root, env, repeats)
    yield Row(title.format("nothing to do"), "s", ours, peer, "dvc repro", ours / peer, "<= 3")
    peer, ours = timed([*repro, "--force"], root, env, 1), timed([*flow, "--force"], root, env, 1)
    yield Row(title.format("everything to do"), "s", ours, peer, "dvc repro", ours / peer)


PARTS = {"stages": stages}

if __name__ == "__main__":
    table.main(__doc__, PARTS)
