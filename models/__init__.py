"""What is learned: pure tensors. Files are shared, folders are families."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.family import Family


def names() -> list[str]:
    """Names of all families: the folders of this package. There is no other registry."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/__init__.py"))


def load(name: str) -> Family:
    """The family called `name`; ValueError lists the known ones."""
    if name not in names():
        raise ValueError(f"unknown family {name!r}; known: {', '.join(names())}")
    return import_module(f"models.{name}").FAMILY
