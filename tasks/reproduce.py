"""Train a version again from what it was made of: `python -m tasks.reproduce models:/duet-t3av/4`.

In a checkout of its own with the version's commit, params.yaml and dvc.lock: its data are fetched by their hashes, every
training stage runs again. Exit code 0 only when the weights have the same SHA-256.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from threading import Event

from models.family import InputError
from tasks import bundle, checkout, command, dvc_process, graph, lineage, params, storage, tracking, versions
from tasks.dvc_process import StageFailed
from tasks.lineage import Lineage
from tasks.versions import Version


def main() -> None:
    """Reproduce one version."""
    parser = argparse.ArgumentParser(prog="python -m tasks.reproduce", description="Train a version again.")
    parser.add_argument("version", help="models:/duet-FAMILY/NUMBER or models:/duet-FAMILY@ALIAS")
    version = versions.find(parser.parse_args().version)
    is_same, line = reproduce(Path.cwd(), version)
    command.say(f"reproduce: {line}")
    if not is_same:
        sys.exit(1)


def reproduce(project: Path, version: Version) -> tuple[bool, str]:
    """Whether the weights came out the same, and a line that says so. Where they did not, the checkout stays."""
    commit = commit_of(project, version)
    made = lineage.read(version)
    stages = training_stages(made)
    with checkout.own(project, f"reproduce-{version.name}-{version.number}", {}, {}, commit) as folder:
        with versions.kept(version, tracking.SOURCE) as source:
            for name in (params.PARAMS, graph.LOCK):
                shutil.copyfile(source / name, folder / name)
        fetch(folder, made, stages)
        for stage in stages:
            command.say(f"{stage} of {commit[:12]}")
            train(project, folder, stage)
        out = Path(made.entries[made.last]["outs"][0]["path"])
        found, wanted = storage.file_digest(folder / out / bundle.WEIGHTS), version.tags["duet.sha256"]
        if found == wanted:
            checkout.remove(project, folder)
            return True, f"{version} is reproduced: its weights are identical (SHA-256 {wanted})"
        place = (folder / out).relative_to(project)
        return (
            False,
            f"{version} is NOT reproduced: SHA-256 {found}, registered {wanted}; the new weights are in {place}",
        )


def commit_of(project: Path, version: Version) -> str:
    """The commit whose code made the version; InputError when no commit did, or it is not in this clone."""
    commit = version.tags.get("git.commit", "unknown")
    if version.tags.get("git.dirty") != "false":
        raise InputError(f"{version} was made by code that no commit holds (edited after {commit[:12]}); commit first")
    try:
        return checkout.git(project, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    except InputError:
        raise InputError(f"{version}: its commit {commit} is not in this clone; git fetch it and try again") from None


def training_stages(made: Lineage) -> list[str]:
    """The stages that led to the weights and whose results are weights themselves, in order."""
    root = storage.ARTIFACTS
    return [s for s in made.order() if all(root in Path(out["path"]).parents for out in made.entries[s]["outs"])]


def fetch(folder: Path, made: Lineage, stages: list[str]) -> None:
    """Bring the data of these stages, by the hashes in dvc.lock, from the cache or the remote."""
    needed = {item for stage in stages for item in made.inputs(stage) if made.made_by(*item) not in stages}
    verb = "pull" if checkout.has_remote(folder) else "checkout"
    for path, md5 in sorted(needed):
        if made.made_by(path, md5) is None:
            raise InputError(f"{made.version}: {path} {md5} was made by no stage of its dvc.lock; it cannot be fetched")
        try:
            dvc_process.answer(dvc_process.ask(folder, verb, "--quiet", path))
        except InputError as error:
            where = "the cache or the remote" if verb == "pull" else "the cache, and its checkout knows no remote"
            raise InputError(f"{made.version}: {path} {md5} is not in {where} ({error})") from None


def train(project: Path, folder: Path, stage: str) -> None:
    """Run one stage again; it leaves no MLflow run, as it is no new result."""
    log = project / ".duet/logs" / folder.name / f"{stage}.log"
    try:
        dvc_process.reproduce(
            stage, folder, command.say, Event(), log=log, force=True, environment={"DUET_TRACKING": "off"}
        )
    except StageFailed as error:
        last = str(error).splitlines()[-1]
        raise InputError(f"{stage} does not run here ({last}); see {log}, the checkout is {folder}") from None


if __name__ == "__main__":
    command.run(main)
