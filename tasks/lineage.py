"""What a version was made from: `python -m tasks.lineage models:/duet-t3av@champion`.

Followed by content alone: the version keeps the dvc.lock of its making; there each stage's inputs have the hashes of
other stages' outputs. The MLflow run of a stage is the one that had the same inputs and params (`dvc.dep.*`), for the
version's own weights the one that made them (`duet.sha256`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from models.family import InputError
from tasks import checkout, command, journal, preset, tracking, versions
from tasks.versions import Version

if TYPE_CHECKING:
    from mlflow.entities import Run

Entry = Mapping[str, Any]  # of a stage in dvc.lock


@dataclass(frozen=True)
class Lineage:
    """A version and the stages it came from."""

    version: Version
    entries: Mapping[str, Entry]
    last: str  # the stage that made its weights

    def made_by(self, path: str, md5: str) -> str | None:
        """The stage whose output has this path and content."""
        for stage, entry in self.entries.items():
            if any((out["path"], out.get("md5")) == (path, md5) for out in entry.get("outs", ())):
                return stage
        return None

    def inputs(self, stage: str) -> list[tuple[str, str]]:
        """Path and md5 of what the stage read of other stages; its code is not among it."""
        outs = {out["path"] for entry in self.entries.values() for out in entry.get("outs", ())}
        return [(dep["path"], dep["md5"]) for dep in self.entries[stage].get("deps", ()) if dep["path"] in outs]

    def order(self, stage: str | None = None) -> list[str]:
        """The stages that led to `stage` (the last one by default) and itself, each after those it needs."""
        stage, found = stage or self.last, []
        for needed in filter(None, (self.made_by(*item) for item in self.inputs(stage))):
            found += [name for name in self.order(needed) if name not in found]
        return [*found, stage]


def read(version: Version) -> Lineage:
    """The lineage of a version; InputError where its dvc.lock does not tell it."""
    entries = versions.lock(version)
    stage = f"{version.tags.get('duet.phase')}@{version.tags.get('duet.family')}"
    outs = [out for out in entries.get(stage, {}).get("outs", ()) if version.tags.get(f"dvc.out.{out['path']}")]
    if not outs or any(version.tags[f"dvc.out.{out['path']}"] != out["md5"] for out in outs):
        raise InputError(f"{version}: its dvc.lock has no {stage}: it was trained outside DVC; run dvc repro instead")
    return Lineage(version, entries, stage)


# --- runs ----------------------------------------------------------------------------------------------------------------


def find_runs(lineage: Lineage, stage: str) -> list[Run]:
    """Finished MLflow runs of the stage with these inputs and params, the earliest first."""
    store = tracking.client()
    words = [f"tags.`stage` = '{stage}'", "attributes.status = 'FINISHED'"]
    words += [f"tags.`dvc.dep.{path}` = '{md5}'" for path, md5 in lineage.inputs(stage)]
    if stage == lineage.last:
        words.append(f"tags.`duet.sha256` = '{lineage.version.tags['duet.sha256']}'")
    experiments = [item.experiment_id for item in store.search_experiments()]
    runs = store.search_runs(experiments, " AND ".join(words), order_by=["start_time ASC"])
    asked = expected_params(lineage.entries[stage])
    return [
        run for run in runs if all(same(asked[key], value) for key, value in run.data.params.items() if key in asked)
    ]


def expected_params(entry: Entry) -> dict[str, str]:
    """A stage's sections of params.yaml as its run logs them: merged, what all share first, the model under `model`."""
    merged: dict[str, Any] = {}
    sections = entry.get("params", {}).get("params.yaml", {})
    for name in sorted(sections, key=lambda name: name.count(".")):
        values = sections[name] if isinstance(sections[name], Mapping) else {name: sections[name]}
        merged |= {"model": values} if name.endswith(".model") else values
    return journal.params_of(merged)


def same(first: str, second: str) -> bool:
    """Whether two logged values are equal; 1 and 1.0 are."""
    try:
        return math.isclose(float(first), float(second))
    except ValueError:
        return first == second


# --- words ---------------------------------------------------------------------------------------------------------------


def describe(lineage: Lineage, defaults: Mapping[str, Any] | None) -> Iterator[str]:
    """The tree, the version at its root; a stage that several need stands once."""
    version, tags = lineage.version, lineage.version.tags
    yield " ".join([str(version), *(f"@{alias}" for alias in version.aliases)])
    yield f"    weights   sha256 {tags['duet.sha256']}"
    yield f"    judged    on {tags['duet.dataset']}, evaluation data {tags['duet.evaluation_data']}"
    yield f"    {_origin(tags, version.run_id)}"
    if defaults is None:
        yield f"    params    not compared: commit {tags['git.commit'][:12]} is not in this clone"
    yield from _branch(lineage, lineage.last, defaults, "", True, set())


def _branch(
    lineage: Lineage, stage: str, defaults: Mapping[str, Any] | None, margin: str, is_last: bool, seen: set[str]
) -> Iterator[str]:
    out = lineage.entries[stage]["outs"][0]
    title = f"{stage}   {out['path']} {out['md5']}"
    yield f"{margin}{'└── ' if is_last else '├── '}{title}{' (above)' if stage in seen else ''}"
    if stage in seen:
        return
    seen.add(stage)
    below = margin + ("    " if is_last else "│   ")
    needs = lineage.inputs(stage)
    for line in _details(lineage, stage, defaults):
        yield f"{below}{'│   ' if needs else '    '}{line}"
    for number, (path, md5) in enumerate(needs, start=1):
        maker, is_end = lineage.made_by(path, md5), number == len(needs)
        if maker:
            yield from _branch(lineage, maker, defaults, below, is_end, seen)
        else:
            yield f"{below}{'└── ' if is_end else '├── '}{path} {md5}   made by no stage that dvc.lock knows"


def _details(lineage: Lineage, stage: str, defaults: Mapping[str, Any] | None) -> Iterator[str]:
    runs = find_runs(lineage, stage)
    if not runs:
        yield "no MLflow run: it came out of DVC's cache, or MLflow kept its runs elsewhere"
    for run in runs[:1]:
        digest = run.data.tags.get("duet.sha256")
        if digest and stage != lineage.last:
            yield f"weights   sha256 {digest}"
        yield _origin(run.data.tags, run.info.run_id)
    if len(runs) > 1:
        yield f"          and {len(runs) - 1} later runs with the same inputs and params"
    if defaults is not None:
        yield from (f"params    {change}" for change in changed(lineage.entries[stage], defaults))


def _origin(tags: Mapping[str, str], run_id: str) -> str:
    commit = tags.get("git.commit", "unknown")[:12] + (" with edited code" if tags.get("git.dirty") == "true" else "")
    flow = tags.get("prefect.flow_run_url") or tags.get("prefect.flow_run_id") or "none"
    return f"commit    {commit}   MLflow run {run_id}   flow run {flow}"


def changed(entry: Entry, defaults: Mapping[str, Any]) -> list[str]:
    """The stage's params that are not those of the commit, as `t3av.finetune.lr: 0.001 → 0.002`."""
    found = []
    for name, values in entry.get("params", {}).get("params.yaml", {}).items():
        place: Any = defaults
        for key in name.split("."):
            place = place.get(key, {}) if isinstance(place, Mapping) else {}
        found += preset.overlay({"": deepcopy(place)}, {"": values}, name)
    return found


def committed_params(commit: str) -> dict[str, Any] | None:
    """params.yaml of a commit; None when the commit is not in this clone."""
    try:
        text = checkout.git(Path(), "show", f"{commit}:params.yaml")
    except InputError:
        return None
    return YAML(typ="safe", pure=True).load(text)


def main() -> None:
    """Print the tree."""
    parser = argparse.ArgumentParser(prog="python -m tasks.lineage", description="What a version was made from.")
    parser.add_argument("version", help="models:/duet-FAMILY/NUMBER or models:/duet-FAMILY@ALIAS")
    version = versions.find(parser.parse_args().version)
    lineage = read(version)
    tracking.flush()
    for line in describe(lineage, committed_params(version.tags["git.commit"])):
        command.say(line)


if __name__ == "__main__":
    command.run(main)
