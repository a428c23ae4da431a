"""docker/entrypoint.sh without a Docker engine: by running it, against real repositories and servers."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from flows.services import Service

ROOT = Path(__file__).parents[1]
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"
BIN = Path(sys.executable).parent
PATH = f"{BIN}{os.pathsep}{os.environ['PATH']}"
TOY = """
stages:
  inputs:
    cmd: mkdir -p data/toy && echo 41 > data/toy/number
    outs: [data/toy]
  pretrain:
    foreach:
      toy: {}
    do:
      cmd: python -m tasks.train ${key} pretrain
      deps: [data/toy]
      outs: ["artifacts/${key}/pretrain"]
"""
# In place of a training that takes minutes: every rank reads the pulled input, and the sum needs all of them.
TOY_TRAIN = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
number = torch.tensor(int(Path("data/toy/number").read_text()) + dist.get_rank())
dist.all_reduce(number)
if dist.get_rank() == 0:
    out = Path("artifacts", *sys.argv[1:])
    out.mkdir(parents=True)
    (out / "sum").write_text(str(number.item()))
dist.destroy_process_group()
"""


def run(*command, cwd, **variables):
    env = {**os.environ, "PATH": PATH, "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def git(folder, *arguments):
    identity = ("-c", "user.name=Duet", "-c", "user.email=duet@localhost")
    done = run("git", *identity, *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def origin(tmp_path):
    """A repository as the workers find it: the project's code and a small graph."""
    folder = tmp_path / "origin"
    for name in ("flows", "tasks", "models"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tasks/train.py").write_text(TOY_TRAIN)
    (folder / "dvc.yaml").write_text(TOY)
    (folder / ".gitignore").write_text("__pycache__/\n.duet/\n")
    git(folder, "init", "--quiet", "--initial-branch=main")
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").touch()
    (folder / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "start")
    return folder


@pytest.fixture
def settings(tmp_path):
    return {
        "DUET_REPO": str(tmp_path / "origin"),
        "DUET_REMOTE": str(tmp_path / "remote"),
        "DUET_POOL": "cpu",
        "PREFECT_API_URL": "http://127.0.0.1:9/api",  # nobody is there
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "AWS_ENDPOINT_URL": "",
    }


def test_entrypoint_is_bash():
    assert os.access(ENTRYPOINT, os.X_OK)
    subprocess.run(["bash", "-n", ENTRYPOINT], check=True)


def test_entrypoint_runs_another_command_as_it_is(tmp_path):
    assert run(ENTRYPOINT, "echo", "two  words", cwd=tmp_path).stdout == "two  words\n"


@pytest.mark.parametrize("missing", ["DUET_REPO", "DUET_REMOTE", "DUET_POOL", "PREFECT_API_URL"])
def test_entrypoint_names_what_is_not_set(tmp_path, settings, missing):
    (tmp_path / "duet").mkdir()
    done = run(ENTRYPOINT, "worker", cwd=tmp_path / "duet", **settings | {missing: ""})
    assert done.returncode == 2 and f"error: {missing} is not set" in done.stderr


def test_worker_checks_out_the_ref_over_the_image_and_again(tmp_path, origin, settings):
    first = git(origin, "rev-parse", "HEAD")
    (origin / "new.txt").write_text("new")
    git(origin, "add", ".")
    git(origin, "commit", "--quiet", "-m", "second")
    duet = tmp_path / "duet"  # as the image leaves it: code without history
    (duet / "tasks").mkdir(parents=True)
    (duet / "tasks/renamed.py").write_text("old")
    (duet / "dvc.yaml").write_text("old")
    secret = {
        "AWS_ENDPOINT_URL": "http://s3:8333",
        "AWS_SECRET_ACCESS_KEY": "do-not-write",
        "DUET_REMOTE": "s3://duet/x",
    }
    env = {**os.environ, "PATH": PATH, **settings, **secret, "DUET_REF": first}
    with subprocess.Popen([ENTRYPOINT], cwd=duet, env=env, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout.readline() == f"code: {first} of origin\n"
        # The script gives way to the worker, which so gets the container's signals.
        wait_until(lambda: b"prefect\0worker\0start\0--pool\0cpu\0" in Path(f"/proc/{worker.pid}/cmdline").read_bytes())
        worker.kill()
    assert git(duet, "rev-parse", "HEAD") == first and git(duet, "status", "--porcelain") == ""
    assert not (duet / "tasks/renamed.py").exists() and not (duet / "new.txt").exists()
    local = (duet / ".dvc/config.local").read_text()
    assert "s3://duet/x" in local and "http://s3:8333" in local and "do-not-write" not in local
    # Next start: another ref, and a file of the run's own that it would overwrite is not lost.
    (duet / "new.txt").write_text("mine")
    done = run(ENTRYPOINT, "worker", cwd=duet, **settings | {"DUET_REF": "main"})
    assert done.returncode == 2 and "commit or remove them" in done.stderr
    assert (duet / "new.txt").read_text() == "mine"
    done = run(ENTRYPOINT, "worker", cwd=duet, **settings | {"DUET_REF": "nowhere"})
    assert done.returncode == 2 and "the repository has no nowhere" in done.stderr


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def answers(address):
    try:
        with urllib.request.urlopen(address, timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False


def wait_until(condition, seconds=180.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)


@pytest.fixture
def prefect_server(tmp_path):
    """Prefect's own server with a password, as compose.yaml starts it but for the database."""
    port = free_port()
    env = {
        **os.environ,
        "PATH": PATH,
        "PREFECT_HOME": str(tmp_path / "server"),
        "PREFECT_SERVER_API_AUTH_STRING": "duet:word",
    }
    env["PREFECT_SERVER_UI_API_URL"] = f"http://127.0.0.1:{port}/api"
    command = [ENTRYPOINT, "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/api/health"))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()  # its database is scratch, and a busy machine makes it take minutes to say goodbye
        process.wait()


def pools(folder, variables):
    listed = run(BIN / "prefect", "work-pool", "ls", "--output", "json", cwd=folder, **variables)
    return [(pool["name"], pool["type"]) for pool in json.loads(listed.stdout)]


@pytest.mark.slow
def test_worker_polls_a_server_that_asks_for_a_password(tmp_path, origin, settings, prefect_server):
    assert json.load(urllib.request.urlopen(f"{prefect_server}/ui-settings"))["api_url"] == f"{prefect_server}/api"
    duet, health = tmp_path / "duet", free_port()
    duet.mkdir()
    given = {**settings, "PREFECT_API_URL": f"{prefect_server}/api", "PREFECT_API_AUTH_STRING": "duet:wrong"}
    given |= {"PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1", "PREFECT_WORKER_WEBSERVER_PORT": health}
    refused = run(ENTRYPOINT, "worker", cwd=duet, **given)
    assert refused.returncode and "401" in refused.stdout + refused.stderr
    env = {**os.environ, "PATH": PATH, **given, "PREFECT_API_AUTH_STRING": "duet:word"}
    # Ended as Docker does it, with a second signal after a while: Prefect's worker can lose the first.
    worker = Service("worker", [str(ENTRYPOINT)], tmp_path / "worker.log", {k: str(v) for k, v in env.items()}, duet)
    worker.start()
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{health}/health"))
        # The worker answers for its health before it has made its pool.
        wait_until(lambda: pools(duet, given | {"PREFECT_API_AUTH_STRING": "duet:word"}) == [("cpu", "process")])
    finally:
        worker.end()


@pytest.mark.slow
def test_two_nodes_train_one_stage(tmp_path, origin, settings):
    assert run("dvc", "repro", "-s", "inputs", cwd=origin).returncode == 0
    git(origin, "add", ".")
    git(origin, "commit", "--quiet", "-m", "inputs")
    assert run("dvc", "remote", "add", "--local", "--default", "store", tmp_path / "remote", cwd=origin).returncode == 0
    pushed = run("dvc", "push", cwd=origin)
    assert pushed.returncode == 0, pushed.stderr
    given = {**os.environ, "PATH": PATH, **settings, "OMP_NUM_THREADS": "1", "DUET_STAGE": "pretrain@toy"}
    given |= {"DUET_TOPOLOGY": "2x1", "DUET_MASTER": "127.0.0.1", "DUET_MASTER_PORT": free_port()}
    # Prefect's command on pod 0 ends in this one; on the other pod it must not run.
    command = [ENTRYPOINT, "node", "dvc", "--wait-for-lock", "repro", "-s", "pretrain@toy"]
    pods = []
    for index in "01":
        (tmp_path / index).mkdir()
        env = given | {"JOB_COMPLETION_INDEX": index}
        pods.append(
            subprocess.Popen(command, cwd=tmp_path / index, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    outputs = [pod.communicate(timeout=300)[0].decode() for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], outputs
    assert (tmp_path / "0/artifacts/toy/pretrain/sum").read_text() == str(41 + 42)
    assert not (tmp_path / "1/artifacts/toy/pretrain").exists()
    assert "pretrain@toy" in (tmp_path / "0/dvc.lock").read_text()
    again = run(*command, cwd=tmp_path / "0", **given | {"JOB_COMPLETION_INDEX": "0"})
    assert again.returncode == 0 and "nothing to train" in again.stdout
