"""dvc.yaml, params.yaml, the packages and the families say the same words."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.repo import Repo
from dvc.stage import PipelineStage
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


# Imported by stages, and no dependency of them: an edit here cannot change what a stage leaves.
PLUMBING = {
    "models/__init__.py": "finds a family by its name",
    "models/family.py": "declares types, computes nothing",
    "tasks/__init__.py": "says how threads wait for each other",
    "tasks/command.py": "prints lines and errors",
    "tasks/graph.py": "reads dvc.lock and git for the tags of runs",
    "tasks/journal.py": "tells MLflow what a stage did",
    "tasks/params.py": "reads params.yaml, whose values DVC compares itself",
    "tasks/storage.py": "moves finished files to their place",
    "tasks/tracking.py": "sends the journals to MLflow",
    "stores: tasks/templates/quarantine.html": "it writes the list; only clean writes the page",
    "features: tasks/templates/quarantine.html": "so does it",
}


SHARED = (Path("models"), Path("tasks/datasets"), Path("tasks/data"))


def imported(file: Path) -> set[Path]:
    """Our files that a file imports, within functions too, but not for annotations alone."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative imports hide what a stage depends on"
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    ours = [ROOT.joinpath(*name.split(".")) for name in names if name.split(".")[0] in ("tasks", "models")]
    return {found for path in ours for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()}


def code_of(stage: str, target: str) -> set[str]:
    """All of our code behind a stage: what its module imports, what it loads by name, and templates by their name."""
    is_data = target in PARAMS["download"]
    module = ROOT / "tasks" / f"{stage if (ROOT / 'tasks' / f'{stage}.py').exists() else 'train'}.py"
    todo = [module, *([] if is_data else (ROOT / "models" / target).glob("*.py"))]
    seen: set[Path] = set()
    while todo:
        file = todo.pop()
        if file in seen:
            continue
        seen.add(file)
        if file.suffix != ".py":
            continue
        todo += imported(file)
        todo += [page for page in (ROOT / "tasks/templates").iterdir() if f'"{page.name}")' in file.read_text()]
        if file == ROOT / "tasks/datasets/__init__.py":
            todo.append(file.with_name(f"{PARAMS['download'][target]['format']}.py"))
    empty = {file for file in seen if file.name == "__init__.py" and len(ast.parse(file.read_text()).body) < 2}
    return {str(file.relative_to(ROOT)) for file in seen - empty}


@pytest.fixture(scope="module")
def dependencies() -> dict[str, set[str]]:
    """Dependencies of each stage, `clean@sounds`, as DVC resolves them."""
    with Repo(str(ROOT)) as repo:
        stages = [stage for stage in repo.index.stages if isinstance(stage, PipelineStage)]
        return {str(stage.name): {str(dep.def_path) for dep in stage.deps} for stage in stages}


def test_stages_depend_on_all_code_that_decides_their_result(dependencies: dict[str, set[str]]) -> None:
    assert {name.partition("@")[0] for name in dependencies} == set(GRAPH)
    for name, known in dependencies.items():
        covered = known | {path.removeprefix(f"{name.partition('@')[0]}: ") for path in PLUMBING}
        for file in code_of(*name.split("@")):
            places = {file, *map(str, Path(file).parents)}
            assert places & covered, f"dvc.yaml: {name} depends on {file}; name it in deps, or in PLUMBING and say why"


def test_dependencies_exist_and_are_needed(dependencies: dict[str, set[str]]) -> None:
    every = {name: code_of(*name.split("@")) for name in dependencies}
    for name, known in dependencies.items():
        # What a stage's families or formats share is one list for all of them.
        alike = [files for other, files in every.items() if other.partition("@")[0] == name.partition("@")[0]]
        shared = {file for files in alike for file in files if Path(file).parent in SHARED}
        needed = {place for file in every[name] | shared for place in (file, *map(str, Path(file).parents))}
        for path in known:
            if path.split("/")[0] in ("tasks", "models"):
                assert (ROOT / path).exists(), f"dvc.yaml: {name}: {path} is gone"
                assert path in needed, f"dvc.yaml: {name} does not import {path}"


def test_plumbing_exists() -> None:
    assert all((ROOT / path.rpartition(" ")[2]).is_file() for path in PLUMBING)


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
    command = ["git", "grep", "-n", "-I", "-E", pattern, "--", "."]
    assert not subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
