"""Registered versions by their address, and the files that their runs keep."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from models.family import InputError
from tasks import graph, tracking
from tasks.journal import redact
from tasks.tracking import EVALUATION, SOURCE


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    name: str
    number: int
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    run_id: str  # of the MLflow run that registered it

    def __str__(self) -> str:
        """As people call it: `duet-t3av 4`."""
        return f"{self.name} {self.number}"

    @property
    def address(self) -> str:
        """Where MLflow finds it."""
        return f"models:/{self.name}/{self.number}"


def find(address: str) -> Version:
    """The version at models:/NAME/NUMBER or models:/NAME@ALIAS; InputError says what there is."""
    parts = re.fullmatch(r"models:/([\w.-]+)(?:/(\d+)|@([\w-]+))", address)
    if not parts:
        raise InputError(f"{address!r} names no version; write models:/duet-FAMILY/NUMBER or models:/duet-FAMILY@ALIAS")
    name, number, alias = parts.groups()
    store = tracking.client()
    known = {int(item.version): item for item in store.search_model_versions(f"name = '{name}'")}
    if not known:
        where = redact({"uri": tracking.uri()})["uri"]
        raise InputError(f"{address}: {where} has no version of {name}; register one (dvc repro register) first")
    aliases = {key: int(value) for key, value in store.get_registered_model(name).aliases.items()}
    chosen = int(number) if number else aliases.get(alias)
    if chosen not in known:
        there = ", ".join(map(str, sorted(known))) + "".join(f", @{key}" for key in sorted(aliases))
        raise InputError(f"{address}: no such version; there is {there}")
    found = known[chosen]
    names = tuple(sorted(key for key, value in aliases.items() if value == chosen))
    return Version(name, chosen, names, dict(found.tags), str(found.run_id))


def tag(version: Version, tags: Mapping[str, str]) -> None:
    """Put tags on a version."""
    store = tracking.client()
    for key, value in redact(tags).items():
        store.set_model_version_tag(version.name, str(version.number), key, value)


@contextmanager
def kept(version: Version, folder: str) -> Iterator[Path]:
    """A folder of the artifacts of the version's run, as long as the block lasts; InputError when there is none."""
    store = tracking.client()
    if not store.list_artifacts(version.run_id, folder):
        raise InputError(f"{version}: its run {version.run_id} keeps no {folder}/; register it again with this Duet")
    with TemporaryDirectory() as place:
        yield Path(store.download_artifacts(version.run_id, folder, place))


def predictions(version: Version) -> pd.DataFrame:
    """What the version answered to every test clip, sorted by clip."""
    with kept(version, EVALUATION) as folder:
        path = folder / "predictions.csv"
        if not path.is_file():
            raise InputError(f"{version}: its run {version.run_id} keeps no {EVALUATION}/predictions.csv")
        # Texts stay as they are: a class may be called "None", a clip "007".
        table = pd.read_csv(path, dtype={"clip": str, "group": str}, keep_default_na=False)
    return table.sort_values("clip", ignore_index=True)


def lock(version: Version) -> dict[str, dict[str, Any]]:
    """Stage -> its entry in the dvc.lock that the version was made by."""
    with kept(version, SOURCE) as folder:
        return graph.stages(folder / graph.LOCK)
