"""Write a published recipe into params.yaml: `python -m tasks.preset FAMILY NAME [--print]`.

A preset is models/<family>/<name>.yaml with the shape of params.yaml. Its data sections (`stores: …`) hold one entry, which
goes to the dataset that the family trains on. Only the values it names change; comments and everything else stay.
NAME may be the path of a config file (.yaml, .json) of the original system instead: it is laid over the preset that has
what the original's code fixes.
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


def import_config(family: str, path: Path) -> tuple[dict[str, Any], list[str]]:
    """The sections that the original system's config file means, and notes on what it does not decide."""
    read_config = models.load(family).read_config
    if read_config is None:
        raise InputError(f"{family} reads no config files; give the name of a preset")
    values = params.read(path)
    if not isinstance(values, Mapping):
        raise InputError(f"{path} holds no values by their names; give the config file of the original system")
    try:
        imported = read_config(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    sections = load_preset(family, imported.preset)
    overlay(sections, imported.sections)
    return sections, [f"{path}: {note}" for note in imported.notes]


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
    parser.add_argument("name", help="such as vggsound, or a file such as path/to/config.yaml or args.json")
    parser.add_argument("--print", action="store_true", help="list the changes and leave params.yaml alone")
    arguments = parser.parse_args()
    notes: list[str] = []
    if arguments.name.endswith((".yaml", ".yml", ".json")):
        preset, notes = import_config(arguments.family, Path(arguments.name))
    else:
        preset = load_preset(arguments.family, arguments.name)
    yaml = YAML()  # the round-trip kind: comments and layout stay
    yaml.width = 120
    document = yaml.load(params.PARAMS.read_text())
    dataset = document[arguments.family]["dataset"]
    sections = {key: value if key == arguments.family else {dataset: value} for key, value in preset.items()}
    changes = overlay(document, sections)
    if not arguments.print:
        with storage.atomic_file(params.PARAMS) as temporary:
            yaml.dump(document, temporary)
    for line in [*changes, *notes]:
        command.say(f"  {line}")
    done = "would change" if arguments.print else "changed"
    command.say(f"{arguments.family} {arguments.name}: {len(changes)} values of {params.PARAMS} {done}")


if __name__ == "__main__":
    command.run(main)
