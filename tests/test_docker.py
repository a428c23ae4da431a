"""docker/ without a Docker engine: its files by their rules. tests/test_entrypoint.py runs its entrypoint."""

import json
import os
import re
import shutil
import subprocess
import sys
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
