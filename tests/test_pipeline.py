"""dvc.yaml, params.yaml, the packages and the families say the same words."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import models

ROOT = Path(__file__).parents[1]
PARAMS = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
GRAPH = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


def test_every_family_has_its_section_and_its_stages() -> None:
    dag = subprocess.run(
        [Path(sys.executable).parent / "dvc", "dag", "--dot"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in models.names():
        assert name in PARAMS
        for phase in models.load(name).phases:
            assert phase in PARAMS[name], f"params.yaml lacks {name}.{phase}"
            assert f'"{phase}@{name}"' in dag
        assert f'"register@{name}"' in dag


def test_stage_module_and_section_share_one_word() -> None:
    phases = {phase for name in models.names() for phase in models.load(name).phases}
    for stage in GRAPH:
        module = "train" if stage in phases else stage
        assert (ROOT / "tasks" / f"{module}.py").exists()
        if stage not in phases | {"register"}:
            assert stage in PARAMS


def test_families_do_not_import_each_other() -> None:
    for name in models.names():
        for file in (ROOT / "models" / name).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                modules = (
                    [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else [a.name for a in node.names]
                    if isinstance(node, ast.Import)
                    else []
                )
                for module in modules:
                    family = module.split(".")[1] if module.startswith("models.") else name
                    assert family == name or family not in models.names(), f"{file} imports {module}"


def test_no_ignore_file_hides_code() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "models", "tasks", "flows"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", *tracked], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert tracked
    assert not ignored


def test_folders_that_must_not_be_packages() -> None:
    assert not (ROOT / "docker" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("package", ["flows", "tasks", "models"])
def test_packages_import_from_anywhere(package: str, tmp_path: Path) -> None:
    code = f"import {package}; print({package}.__file__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert Path(out.strip()).is_relative_to(ROOT)


def test_no_registry_host_and_no_machine_path_in_the_tree() -> None:
    hosts = "|".join(["py" + r"pi\.org", "python" + "hosted", r"deb\." + "debian", r"registry\." + "npmjs"])
    pattern = hosts + "|(^|[^A-Za-z0-9_.])/" + "(work|root)/"
    command = ["git", "grep", "-n", "-I", "-E", pattern, "--", ".", ":!docker"]  # an image has its own root
    assert not subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
