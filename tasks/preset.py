"""Write a published recipe into params.yaml: `python -m tasks.preset FAMILY NAME`.

A preset is models/<family>/<name>.yaml with the shape of params.yaml. Its data sections (`stores: …`) hold one entry, which
goes to the dataset that the family trains on. Only the values it names change; comments and everything else stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

import models
from models.family import InputError
from tasks import command, params, storage


def load_preset(family: str, name: str) -> dict[str, Any]:
    """The preset's sections; InputError lists the known ones."""
    models.load(family)
    folder = Path(models.__file__).parent / family
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise InputError(f"{family} has no preset {name!r}; it has {', '.join(known) or 'none'}")
    return params.read(folder / f"{name}.yaml")


def overlay(target: dict[str, Any], source: Mapping[str, Any], where: str = "") -> list[str]:
    """Put the values of `source` into `target` in place; returns what changed as `key: old → new`."""
    changes = []
    for key, value in source.items():
        place = f"{where}{key}"
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            changes += overlay(target[key], value, f"{place}.")
        elif target.get(key) != value or key not in target:
            changes.append(f"{place}: {target.get(key, 'unset')} → {value}")
            target[key] = value
    return changes


def main() -> None:
    """Apply a preset and list what it changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help="such as t3av")
    parser.add_argument("name", help="such as vggsound")
    arguments = parser.parse_args()
    preset = load_preset(arguments.family, arguments.name)
    yaml = YAML()  # the round-trip kind: comments and layout stay
    yaml.width = 120
    document = yaml.load(params.PARAMS.read_text())
    dataset = document[arguments.family]["dataset"]
    sections = {key: value if key == arguments.family else {dataset: value} for key, value in preset.items()}
    changes = overlay(document, sections)
    with storage.atomic_file(params.PARAMS) as temporary:
        yaml.dump(document, temporary)
    for change in changes:
        command.say(f"  {change}")
    command.say(f"preset {arguments.family}/{arguments.name}: {len(changes)} values of {params.PARAMS} changed")


if __name__ == "__main__":
    command.run(main)
