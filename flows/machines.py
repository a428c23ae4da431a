"""A stage on another machine than its run: a checkout like the run's, and the way back of its entry in dvc.lock.

The two share a git repository (the commit), DVC's remote (inputs and outputs) and Prefect's API (all else), no folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from uuid import UUID

from prefect import get_client, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey

from models.family import InputError
from tasks import checkout, dvc_process, graph

FILES = ("params.yaml", "dvc.lock")  # what a run changes in its checkout


@dataclass(frozen=True)
class Origin:
    """Where the checkout of a run lies, and what makes one like it."""

    machine: str
    commit: str  # empty: its code was never committed
    files: dict[str, str]  # FILES that are there, with their text


def describe(project: Path, folder: Path) -> Origin:
    """The checkout as it is now."""
    edited = checkout.git(
        folder, "status", "--porcelain", "--untracked-files=no", ".", *(f":!{name}" for name in FILES)
    )
    commit = "" if edited else checkout.git(folder, "rev-parse", "HEAD")
    texts = {name: (folder / name).read_text() for name in FILES if (folder / name).exists()}
    return Origin(_machine(project), commit, texts)


@contextmanager
def workplace(project: Path, folder: Path, stage: str, origin: Origin | None) -> Iterator[Path]:
    """The run's checkout where it is on this machine, else one like it, which goes when the block ends well."""
    if origin is None or origin.machine == _machine(project):
        if not (folder / "dvc.yaml").exists():
            raise InputError(f"{folder} is not on this machine; `dvc config exp.auto_push true` in the run's project")
        yield folder
        return
    if not origin.commit:
        raise InputError(
            f"the code in {folder} is not committed, so another machine cannot have it; commit and push it"
        )
    checkout.fetch(project, origin.commit)
    name = f"{folder.name}-{re.sub(r'[^A-Za-z0-9]+', '-', stage)}"
    with checkout.own(project, name, {}, {}, origin.commit) as place:
        for file, text in origin.files.items():
            (place / file).write_text(text)
        needs = dvc_process.parse_dot(dvc_process.answer(dvc_process.ask(place, "dag", "--dot")))[stage]
        if needs:
            log = project / ".duet/logs" / f"{name}-pull.log"
            dvc_process.pull(needs, place, get_run_logger().info, Event(), log=log)
        yield place
        checkout.remove(project, place)


def hand_back(stage: str, project: Path, place: Path) -> None:
    """Show the stage's entry of dvc.lock as an artifact of this flow run."""
    entry = graph.stages(place / "dvc.lock")[stage]
    create_table_artifact(
        key=_key(stage), table=[entry], description=f"{stage} in dvc.lock, made at {_machine(project)}"
    )


def take_back(stage: str, folder: Path, run: UUID) -> bool:
    """Put the entry that flow run `run` handed back into the dvc.lock of the run's checkout; False: it worked there."""
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[_key(stage)]), flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(artifact_filter=wanted)
    for artifact in artifacts:
        dvc_process.adopt(folder, stage, json.loads(str(artifact.data))[0])
    return bool(artifacts)


def _key(stage: str) -> str:
    return f"{re.sub(r'[^a-z0-9]+', '-', stage.lower()).strip('-')}-lock"


def _machine(project: Path) -> str:
    """A name for this clone on this machine."""
    return f"{os.uname().nodename}:{project}"
