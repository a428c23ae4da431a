"""What DVC and git know of the workspace: content hashes out of dvc.lock, the commit, whether code was edited since."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

LOCK = Path("dvc.lock")
# The code that decides a result. What else does, params.yaml and dvc.lock, each version keeps: a run with other params
# works in a checkout of a commit that does not hold them.
CODE = ("models", "tasks", "flows", "dvc.yaml", "requirements.lock")


def stages(lock: Path = LOCK) -> dict[str, dict[str, Any]]:
    """Stage name (`clean@sounds`) -> its entry in dvc.lock; empty before the first `dvc repro`."""
    if not lock.exists():
        return {}
    return (YAML(typ="safe", pure=True).load(lock.read_text()) or {}).get("stages") or {}


def hashes(stage: str, lock: Path = LOCK) -> dict[str, dict[str, str]]:
    """`{"deps": {path: md5}, "outs": {path: md5}}` of one stage; both empty for a stage that never ran under DVC."""
    entry = stages(lock).get(stage, {})
    return {side: {item["path"]: item.get("md5", "") for item in entry.get(side, ())} for side in ("deps", "outs")}


def out_hashes(paths: Iterable[Path | str], lock: Path = LOCK) -> dict[str, str]:
    """Path -> md5 of the stage outs that `paths` are, or lie in; a path that no stage has made is left out."""
    known = {out["path"]: out.get("md5", "") for entry in stages(lock).values() for out in entry.get("outs", ())}
    found = {}
    for path in map(Path, paths):
        for place in (path, *path.parents):
            if place.as_posix() in known:
                found[place.as_posix()] = known[place.as_posix()]
                break
    return found


def commit() -> str:
    """The checked-out commit, or "unknown" outside a git repository."""
    return _git("rev-parse", "HEAD") or "unknown"


def dirty() -> bool:
    """Whether code differs from the commit, new files included."""
    return bool(_git("status", "--porcelain", "--", *CODE))


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
