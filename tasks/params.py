"""params.yaml to typed, frozen configs: an unknown key, a missing key or a wrong type is an error that names the key."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

import models
from models.family import InputError, Phase

PARAMS = Path("params.yaml")
T = TypeVar("T")


def read(path: Path = PARAMS) -> dict[str, Any]:
    """The whole file as plain values. ruamel, like DVC: PyYAML would read 1e-4 as text."""
    try:
        return YAML(typ="safe").load(path.read_text()) or {}
    except FileNotFoundError:
        raise InputError(f"{path} not found; run from the project's root") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{path}{where} is not YAML: {problem}; mend that line or undo the last edit") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def section(*keys: str, path: Path = PARAMS) -> dict[str, Any]:
    """The mapping at a path of keys, such as section("download", "sounds")."""
    value: Any = read(path)
    for depth, key in enumerate(keys):
        if not isinstance(value, Mapping) or key not in value:
            known = ", ".join(map(str, value)) if isinstance(value, Mapping) else "nothing"
            raise InputError(f"{path}: no section {'.'.join(keys[: depth + 1])!r}; there is {known}")
        value = value[key]
    if not isinstance(value, Mapping):
        raise InputError(f"{path}: {'.'.join(keys)} is a single value, a section was expected")
    return dict(value)


def value(*keys: str) -> Any:
    """A single value of params.yaml, such as value("download", "sounds", "format")."""
    found = section(*keys[:-1])
    if keys[-1] not in found:
        raise InputError(f"{PARAMS}: {'.'.join(keys)} is missing; {'.'.join(keys[:-1])} has {', '.join(found)}")
    return found[keys[-1]]


def typed(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """`values` as the dataclass `kind`; `where` is the dotted place in params.yaml for messages."""
    hints = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in fields:
            raise InputError(f"params.yaml: {where}.{key} is not known; {where} takes {', '.join(fields)}")
    for key in fields:
        if key not in values:
            raise InputError(f"params.yaml: {where}.{key} is missing; it is a {_name(hints[key])}")
    return kind(**{key: _convert(hints[key], values[key], f"{where}.{key}") for key in fields})


def _name(hint: Any) -> str:
    return str(hint).replace("typing.", "") if typing.get_origin(hint) else getattr(hint, "__name__", str(hint))


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` checked against a type hint; ints pass as floats, lists become tuples where the hint says so."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return typed(typing.cast(type, hint), value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise InputError(f"params.yaml: {where} is {value!r}; choose {', '.join(map(repr, arguments))}")
        return value
    if origin in (tuple, list) and isinstance(value, list):
        return origin(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected: Any = origin or hint
    if expected is not Any and (not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool)):
        raise InputError(f"params.yaml: {where} is {value!r}, a {type(value).__name__}; it must be a {_name(hint)}")
    return value


def stage(kind: type[T], *keys: str) -> T:
    """A data stage's section as its dataclass, such as stage(Subset, "subset", "sounds")."""
    return typed(kind, section(*keys), ".".join(keys))


def phase(family: str, name: str, training: type[T]) -> tuple[Phase, Any, T]:
    """A phase, its Config and the engine's settings, which share one flat section `<family>.<phase>`.

    What the section lacks of the engine's settings comes from `train`, and a Config field `model` from `<family>.model`:
    what all phases have in common stands once.
    """
    phases = models.load(family).phases
    if name not in phases:
        raise InputError(f"{family} has no phase {name!r}; it has {', '.join(phases)}")
    shared = section("train")
    values, where = shared | section(family, name), f"{family}.{name}"
    engine_keys = {field.name for field in dataclasses.fields(training)}  # pyright: ignore[reportArgumentType]
    config_keys = {field.name for field in dataclasses.fields(phases[name].Config)}
    if "model" in config_keys and "model" not in values:
        values["model"] = section(family, "model")
    for key in values:
        if key not in engine_keys | config_keys:
            known = ", ".join(sorted((engine_keys | config_keys) - {"model"}))
            raise InputError(f"params.yaml: {'train' if key in shared else where}.{key} is not known; it takes {known}")
    config = typed(phases[name].Config, {k: v for k, v in values.items() if k in config_keys}, where)
    return phases[name], config, typed(training, {k: v for k, v in values.items() if k in engine_keys}, where)
