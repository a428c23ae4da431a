"""One module per annotation format, and the demo dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from models.family import InputError

if TYPE_CHECKING:
    import pandas as pd


Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """Something in the annotations that is odd, or with which training would be wrong."""

    severity: Severity
    clip: str  # its id; "" = the whole dataset
    text: str


@dataclass(frozen=True)
class Review:
    """What annotations are like, once the files are known."""

    findings: list[Finding]
    tables: dict[str, pd.DataFrame]  # by title
    advice: list[str]  # values of params.yaml that suit the data, and why: one sentence each


class Format(Protocol):
    """What a format module exports. Table columns: id, path, split, start (s), group, annotation (JSON).

    It may export `check(table, folder) -> Review` too, for the clean stage: the annotations in `folder` against `table`,
    whose rows have what was found in the files as well. And `classes(folder) -> list[str]`, where the annotations name all
    classes: the position is the class's id, and two may have one name; with it `write_classes(names, folder)`. And `RELEASED`,
    the MD5 of archives that its authors have released, by their name. And `place(name) -> str`: where `read` looks for a file
    that a source, such as a mirror's archive, has under `name`; both relative to the dataset's folder. And
    `segment(id, start) -> (video, start, end) | None`: the YouTube video that a clip is of, and the seconds of it.
    """

    def read(self, folder: Path) -> pd.DataFrame:
        """The clips that the annotations in `folder` list; `path` is relative to `folder`."""
        ...

    def write(self, table: pd.DataFrame, folder: Path) -> None:
        """The rows in the original form again."""
        ...

    def class_of(self, annotation: str) -> str | None:
        """The one class, of all its labels together, that a subset may choose a clip by; None where it has none."""
        ...


def reviewer(form: Format) -> Callable[[pd.DataFrame, Path], Review] | None:
    """The format's `check`, None where it has none."""
    return getattr(form, "check", None)


def class_names(form: Format, folder: Path) -> list[str]:
    """All classes by their id, as the annotations in `folder` list them; none where the format has no such list."""
    classes: Callable[[Path], list[str]] | None = getattr(form, "classes", None)
    return classes(folder) if classes else []


def write_class_names(form: Format, names: Sequence[str], folder: Path) -> None:
    """Write the list that `class_names` reads, where the format has one."""
    write: Callable[[Sequence[str], Path], None] | None = getattr(form, "write_classes", None)
    if write and names:
        write(names, folder)


def released(form: Format) -> dict[str, str]:
    """MD5 of released archives by their name; none where the format knows of none."""
    return getattr(form, "RELEASED", {})


def place(form: Format, name: str) -> str:
    """Where below the dataset's folder a source's file belongs: under its own name where the format does not say."""
    where: Callable[[str], str] | None = getattr(form, "place", None)
    return where(name) if where else name


def segment(form: Format) -> Callable[[str, float], tuple[str, float, float] | None] | None:
    """The format's `segment`, None where its clips name no videos of YouTube."""
    return getattr(form, "segment", None)


def load_format(name: str) -> Format:
    """The format module called `name`; InputError lists the known ones."""
    modules = {path.stem: path.stem for path in Path(__file__).parent.glob("[!_]*.py")}
    if name in modules and hasattr(module := import_module(f"tasks.datasets.{name}"), "read"):
        return cast(Format, module)
    known = sorted(stem for stem in modules if hasattr(import_module(f"tasks.datasets.{stem}"), "read"))
    raise InputError(f"params.yaml: format {name!r} is unknown; known: {', '.join(known)}")
