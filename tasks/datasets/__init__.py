"""One module per annotation format, and the demo dataset."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from models.family import InputError

if TYPE_CHECKING:
    import pandas as pd


class Format(Protocol):
    """What a format module exports. Table columns: id, path, split, start (s), group, annotation (JSON)."""

    def read(self, folder: Path) -> pd.DataFrame:
        """The clips that the annotations in `folder` list; `path` is relative to `folder`."""
        ...

    def write(self, table: pd.DataFrame, folder: Path) -> None:
        """The rows in the original form again."""
        ...

    def class_of(self, annotation: str) -> str | None:
        """The one class, of all its labels together, that a subset may choose a clip by; None where it has none."""
        ...


def load_format(name: str) -> Format:
    """The format module called `name`; InputError lists the known ones."""
    modules = {path.stem: path.stem for path in Path(__file__).parent.glob("[!_]*.py")}
    if name in modules and hasattr(module := import_module(f"tasks.datasets.{name}"), "read"):
        return cast(Format, module)
    known = sorted(stem for stem in modules if hasattr(import_module(f"tasks.datasets.{stem}"), "read"))
    raise InputError(f"params.yaml: format {name!r} is unknown; known: {', '.join(known)}")
