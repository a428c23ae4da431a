"""docker/ without a Docker engine: its files by their rules, its entrypoint by running it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from docker.utils import exclude_paths
from jsonschema import Draft202012Validator, ValidationError, validate
from prefect.utilities.templating import apply_values, find_placeholders
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
ENTRYPOINT = DOCKER / "entrypoint.sh"
DOCKERFILE = (DOCKER / "worker.Dockerfile").read_text()
COMPOSE = YAML(typ="safe").load(DOCKER / "compose.yaml")
SERVICES = COMPOSE["services"]
TEMPLATE = json.loads((DOCKER / "kubernetes-job.json").read_text())
BIN = Path(sys.executable).parent
PATH = f"{BIN}{os.pathsep}{os.environ['PATH']}"
SECRET = re.compile(r"PASSWORD|SECRET|ACCESS_KEY|AUTH|CONNECTION_URL")


def filled_env(folder):
    """example.env as a person would leave it."""
    path = folder / "filled.env"
    path.write_text(re.sub(r"^(\w+)=$", r"\1=filled1234567", (DOCKER / "example.env").read_text(), flags=re.MULTILINE))
    return path


def tool(name):
    found = shutil.which(name, path=PATH)
    if not found:
        pytest.skip(f"{name} is not installed; the assertions of this file stand in for it")
    return found


# --- worker.Dockerfile ------------------------------------------------------------------------------------------------


def test_dockerfile_follows_the_rules():
    lines = re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    users = [text for word, text in steps if word == "USER"]
    assert users[-1] == "10001", "by number: Kubernetes' runAsNonRoot cannot look a name up"
    bases = [text.split()[0] for word, text in steps if word == "FROM"]
    given = dict(text.split("=", 1) for word, text in steps if word == "ARG")
    for base in (given["BASE"] if name == "${BASE}" else name for name in bases):
        assert re.fullmatch(r"[\w/.-]+:\d[\w.-]+", base), f"{base} is not pinned"
    assert not [word for word, _ in steps if word == "ADD"]
    apt = [text for word, text in steps if word == "RUN" and "apt-get" in text]
    assert all("--no-install-recommends" in text and "rm -rf /var/lib/apt/lists/*" in text for text in apt)
    copies = [i for i, (word, text) in enumerate(steps) if word == "COPY" and "--from" not in text]
    installs = [i for i, (_, text) in enumerate(steps) if "--requirement /opt/requirements.lock" in text]
    assert steps[copies[1]][1].startswith("requirements.lock")
    assert copies[1] < installs[0] < copies[-1] and steps[copies[-1]][1] == "--chown=duet:duet . ."
    assert {"HEALTHCHECK", "WORKDIR", "ENTRYPOINT"} <= {word for word, _ in steps}
    assert not [text for word, text in steps if word in ("ARG", "ENV") and SECRET.search(text)]


def test_the_lock_has_what_the_image_installs_by_name():
    lock = (ROOT / "requirements.lock").read_text()
    assert re.search(r"^uv==", lock, re.MULTILINE)
    assert re.search(r"^setuptools==", lock, re.MULTILINE)  # --no-build-isolation


def test_build_context_has_the_code_and_no_secrets(tmp_path):
    kept = ["models/t3av/model.py", "tasks/data/video.py", "dvc.yaml", "requirements.lock", "docker/entrypoint.sh"]
    hidden = [".git/HEAD", "data/sounds/raw/a.mp4", "artifacts/t3av/w", ".venv/bin/python", ".duet/work/x", "mlflow.db"]
    hidden += [".dvc/config.local", ".dvc/cache/files/a", "docker/.env", "models/__pycache__/x.pyc", "mlruns/1"]
    for name in kept + hidden:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    patterns = (DOCKER / "worker.Dockerfile.dockerignore").read_text().splitlines()
    sent = exclude_paths(str(tmp_path), [line for line in patterns if line and not line.startswith("#")])
    assert {name for name in sent if (tmp_path / name).is_file()} == set(kept)


@pytest.mark.parametrize(("name", "file"), [("hadolint", "worker.Dockerfile"), ("shellcheck", "entrypoint.sh")])
def test_linters_have_nothing_to_say(name, file):
    subprocess.run([tool(name), DOCKER / file], check=True)


# --- compose.yaml -----------------------------------------------------------------------------------------------------


def test_compose_accepts_the_file(tmp_path):
    command = [tool("docker-compose"), "-f", DOCKER / "compose.yaml", "--env-file"]
    done = subprocess.run(
        [*command, filled_env(tmp_path), "config", "--format", "json"], capture_output=True, check=True
    )
    assert set(json.loads(done.stdout)["services"]) == set(SERVICES)
    empty = subprocess.run(
        [*command, DOCKER / "example.env", "config", "-q"], capture_output=True, text=True, check=False
    )
    assert empty.returncode and "POSTGRES_PASSWORD is missing a value" in empty.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_each_service(name):
    service = SERVICES[name]
    image = service["image"]
    assert re.search(r":v?\d[\w.-]*$", image), f"{image} is not pinned"
    assert service["restart"] == ("on-failure:5" if name == "buckets" else "unless-stopped")
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:")
    for needed, how in service.get("depends_on", {}).items():
        ends = "service_completed_successfully" if needed == "buckets" else "service_healthy"
        assert how["condition"] == ends
        assert needed == "buckets" or has_health(SERVICES[needed])
    assert name == "buckets" or has_health(service)
    for volume in service.get("volumes", []):
        assert volume.split(":")[0] in COMPOSE["volumes"]
    for variable, value in service.get("environment", {}).items():
        if SECRET.search(variable):
            assert re.search(r"\$\{\w+:\?\}", value), f"{variable} must come from the env file and be asked for"


def has_health(service):
    """Of its own, or by the image's HEALTHCHECK, which is the worker's."""
    return "test" in service.get("healthcheck", {}) or (
        "command" not in service and service["image"].startswith("duet:")
    )


def test_servers_ask_for_passwords_and_the_gpu_worker_gets_gpus():
    assert SERVICES["prefect"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"]
    assert "postgresql+asyncpg://" in SERVICES["prefect"]["environment"]["PREFECT_API_DATABASE_CONNECTION_URL"]
    assert "--app-name basic-auth" in SERVICES["mlflow"]["command"]
    [device] = SERVICES["gpu-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert [name for name, service in SERVICES.items() if "deploy" in service] == ["gpu-worker"]


def test_example_env_names_everything_and_holds_no_secret():
    given = dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / "example.env").read_text(), re.MULTILINE))
    used = re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text())
    assert set(given) == set(used) | {"COMPOSE_PROFILES"}
    assert not [name for name, value in given.items() if re.search("PASSWORD|SECRET", name) and value]


def test_the_lock_has_what_mlflow_needs_to_ask_for_passwords():
    assert re.search(r"^flask-wtf==", (ROOT / "requirements.lock").read_text(), re.MULTILINE | re.IGNORECASE)


# --- kubernetes-job.json ----------------------------------------------------------------------------------------------


def rendered(**values):
    schema = TEMPLATE["variables"]
    given = {"image": "duet:0.1.0", "stage": "pretrain@t3av", "repo": "https://x/duet.git", "remote": "s3://duet/cache"}
    given |= values
    validate(given, schema)
    defaults = {name: about["default"] for name, about in schema["properties"].items() if "default" in about}
    return apply_values(TEMPLATE["job_configuration"], {**defaults, **given})["job_manifest"]


def test_template_and_variables_fit():
    schema = TEMPLATE["variables"]
    Draft202012Validator.check_schema(schema)
    used = {found.name for found in find_placeholders(TEMPLATE["job_configuration"])}
    assert used == set(schema["properties"])
    with pytest.raises(ValidationError, match="does not match"):
        rendered(stage="pretrain; rm -rf /")
    with pytest.raises(ValidationError, match="less than the minimum"):
        rendered(nodes=0)


def test_job_has_a_pod_a_node_and_a_process_a_gpu():
    manifest = rendered(nodes=3, gpus=8)
    spec = manifest["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    [container] = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    variables = {entry["name"]: entry for entry in container["env"]}
    assert variables["DUET_TOPOLOGY"]["value"] == "3x8"
    assert not [entry for entry in container["env"] if not isinstance(entry.get("value", ""), str)]
    for name, entry in variables.items():
        assert "secretKeyRef" in entry.get("valueFrom", {}) or not SECRET.search(name)
    # $(NAME) is filled in by Kubernetes, and only with what stands before it.
    names = list(variables)
    assert names.index("DUET_JOB") < names.index("DUET_MASTER")
    assert container["name"] == "prefect-job"  # by which Prefect finds it
    assert (
        spec["template"]["spec"]["parallelism"] == spec["template"]["spec"]["completions"] == 1
    )  # Prefect asks for it


def test_pods_find_each_other_and_are_not_root():
    service, claim = YAML(typ="safe").load_all(DOCKER / "kubernetes.yaml")
    template = rendered()["spec"]["template"]
    pod, [container] = template["spec"], template["spec"]["containers"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert pod["subdomain"] == service["metadata"]["name"]
    [master] = [entry["value"] for entry in container["env"] if entry["name"] == "DUET_MASTER"]
    assert master == f"$(DUET_JOB)-0.{service['metadata']['name']}"
    claims = [
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    ]
    assert claims == [claim["metadata"]["name"]] and claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert pod["securityContext"]["runAsNonRoot"] and f"USER {pod['securityContext']['runAsUser']}\n" in DOCKERFILE
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


# --- entrypoint.sh ----------------------------------------------------------------------------------------------------

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
    with (tmp_path / "worker.log").open("wb") as log:
        process = subprocess.Popen([ENTRYPOINT], cwd=duet, env=env, stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{health}/health"))
        pools = run(
            BIN / "prefect",
            "work-pool",
            "ls",
            "--output",
            "json",
            cwd=duet,
            **given | {"PREFECT_API_AUTH_STRING": "duet:word"},
        )
        assert [(pool["name"], pool["type"]) for pool in json.loads(pools.stdout)] == [("cpu", "process")]
    finally:
        process.terminate()
        assert process.wait(90) is not None


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
