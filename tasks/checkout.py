"""A checkout of its own for each run: a git worktree with the project's DVC cache, and an experiment of what it made.

Two runs with different params never see each other's files. What they share is keyed by content: DVC's cache, its run
cache, and the resume state of training.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from models.family import InputError
from tasks import dvc_process, preset
from tasks.journal import OUTBOX
from tasks.storage import WORK, atomic_file, locked

RUNS = Path(".duet/runs")
KEEP = 7 * 86400  # seconds that the checkout of a failed run stays, to look at it


@contextmanager
def own(
    project: Path, name: str, changes: Mapping[str, Any], overlay: Mapping[str, Any], commit: str = "HEAD"
) -> Iterator[Path]:
    """A checkout of a commit with its params.yaml changed; one of that name that was kept is used again.

    It stays after the block unless `remove` was called.
    """
    folder = project / RUNS / name
    with _alone(project):
        _remove_old(project)
    with locked(project / RUNS / f"{name}.lock"):
        if not (folder / ".git").exists():
            with _alone(project):
                git(project, "worktree", "add", "--quiet", "--force", "--detach", str(folder), commit)
        _share(project, folder)
        edit_params(folder / "params.yaml", changes, overlay)
        # What dvc.lock knows is linked from the cache; what the cache lacks is pulled or made by its stage.
        dvc_process.ask(folder, "checkout", "--quiet").communicate()
        yield folder
    if not folder.exists():
        shutil.rmtree(project / RUNS / f"{name}.lock")


def remove(project: Path, folder: Path) -> None:
    """Take a checkout away; what it made stays in the cache."""
    with _alone(project):
        git(project, "worktree", "remove", "--force", str(folder))


def edit_params(path: Path, changes: Mapping[str, Any], overlay: Mapping[str, Any]) -> None:
    """Lay a preset's sections over the file, then set dotted keys that must exist; comments stay."""
    yaml = YAML()
    yaml.width = 4096
    content = yaml.load(path.read_text())
    preset.overlay(content, overlay)
    for dotted, value in changes.items():
        *parents, key = dotted.split(".")
        place = content
        for parent in parents:
            place = place.get(parent) if isinstance(place, Mapping) else None
        if not isinstance(place, Mapping) or key not in place:
            raise InputError(f"params.yaml: {dotted} does not exist, so it cannot be changed")
        place[key] = value  # type: ignore[index]
    if changes or overlay:
        with atomic_file(path) as temporary, temporary.open("w") as file:
            yaml.dump(content, file)


def save_experiment(project: Path, folder: Path, name: str, message: str) -> str | None:
    """What the run made as a DVC experiment: a commit on HEAD with its params.yaml and dvc.lock. None: nothing is new.

    `dvc exp save` would do the same through refs that all worktrees share, so two runs could not save at once.
    """
    git(folder, "add", "--update")
    if (folder / "dvc.lock").exists():
        git(folder, "add", "--force", "dvc.lock")
    head, tree = git(folder, "rev-parse", "HEAD"), git(folder, "write-tree")
    if tree == git(folder, "rev-parse", "HEAD^{tree}"):
        return None
    is_known = git(folder, "config", "--default", "", "user.email")
    identity = () if is_known else ("-c", "user.name=Duet", "-c", "user.email=duet@localhost")
    commit = git(folder, *identity, "commit-tree", tree, "-p", head, "-m", message)
    git(project, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", commit)
    return commit


def git(folder: Path, *arguments: str) -> str:
    """One git command's output; InputError with git's own words where it fails."""
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"git {' '.join(arguments[:2])}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def _share(project: Path, folder: Path) -> None:
    """Let the checkout use the project's cache, credentials and resume state."""
    config = ConfigParser(interpolation=None)
    config.optionxform = str  # type: ignore[assignment]
    config.read(project / ".dvc/config.local")
    cache = dvc_process.answer(dvc_process.ask(project, "cache", "dir")).strip()
    config.read_dict({"cache": {"dir": cache}})
    with (folder / ".dvc/config.local").open("w") as file:
        config.write(file)
    for shared in (WORK, OUTBOX):  # what is not yet sent to MLflow must outlive the checkout
        (project / shared).mkdir(parents=True, exist_ok=True)
        link = folder / shared
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to((project / shared).resolve())


def has_remote(project: Path) -> bool:
    """Whether the project names a default DVC remote, in its configuration or in that of this machine alone."""
    return _config(project).has_option("core", "remote")


def shares(project: Path) -> bool:
    """Whether what runs make leaves this machine, as DVC's own `exp.auto_push` says: outputs, and experiments."""
    return has_remote(project) and _config(project).getboolean("exp", "auto_push", fallback=False)


def fetch(project: Path, commit: str) -> None:
    """Get a commit from git's origin where it is not here yet; InputError when nobody pushed it."""
    here = ["git", "cat-file", "-e", f"{commit}^{{commit}}"]
    if subprocess.run(here, cwd=project, capture_output=True, check=False).returncode:
        try:
            git(project, "fetch", "--quiet", "origin", commit)
        except InputError as error:
            raise InputError(f"commit {commit[:7]} is not on this machine, nor can it be fetched: {error}") from None


def push_experiment(project: Path, name: str) -> None:
    """Send an experiment to the git remote that DVC's `exp.git_remote` names, where `dvc exp pull` finds it."""
    remote = _config(project).get("exp", "git_remote", fallback="origin")
    git(
        project, "push", "--quiet", remote, git(project, "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{name}")
    )


def _config(project: Path) -> ConfigParser:
    config = ConfigParser(interpolation=None)
    config.read([project / ".dvc/config", project / ".dvc/config.local"])
    return config


@contextmanager
def _alone(project: Path) -> Iterator[None]:
    """git's list of worktrees is changed by one process at a time."""
    (project / RUNS).mkdir(parents=True, exist_ok=True)
    with (project / RUNS / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_old(project: Path) -> None:
    for folder in (project / RUNS).iterdir():
        if (folder / ".git").exists() and time.time() - folder.stat().st_mtime > KEEP:
            try:
                with locked(project / RUNS / f"{folder.name}.lock"):
                    git(project, "worktree", "remove", "--force", str(folder))
            except InputError:
                continue  # in use
