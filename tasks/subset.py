"""Choose the clips to work on: `python -m tasks.subset DATASET`. What is chosen is written in the original form again."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

from models.family import InputError
from tasks import command, params, storage, tracking
from tasks.command import say
from tasks.data import clip_files
from tasks.datasets import class_names, load_format, write_class_names


@dataclass(frozen=True)
class Subset:
    """Section `subset.<dataset>` of params.yaml."""

    # Everything; so many train and test clips of each class, val to be carved out anew; everything of some classes.
    mode: Literal["all", "counts", "classes"]
    num_classes: int  # more than there are: a warning, and all of them
    num_train: int  # of each class, in mode counts; a class that has fewer gives all
    num_test: int
    media: Literal["none", "link", "copy"]  # what becomes of the chosen videos
    seed: int


def select(
    table: pd.DataFrame, exists: pd.Series, class_of: Callable[[str], str | None], settings: Subset
) -> pd.DataFrame:
    """The chosen rows: in order of the table for mode all, else class by class, train before val before test.

    `class_of` gives an annotation's class. Clips without one are in no class.
    """
    if settings.mode == "all":
        return table
    labels = table["annotation"].map(class_of)
    if labels.isna().all():
        raise InputError("the annotations have no single label to choose by; set subset mode to all")
    chosen = choose_classes(sorted(labels.dropna().unique()), settings)
    present = table[exists].assign(label=labels[exists])
    pick = _counted if settings.mode == "counts" else _whole
    parts = [part for label in chosen for part in pick(label, present[present["label"] == label], settings)]
    return pd.concat(parts).drop(columns="label").reset_index(drop=True)


def _counted(label: str, rows: pd.DataFrame, settings: Subset) -> Iterator[pd.DataFrame]:
    """So many train and test clips of a class."""
    for split, count in (("train", settings.num_train), ("test", settings.num_test)):
        found = rows[rows["split"] == split]
        if found.empty and count:
            raise InputError(
                f"class {label!r} has no {split} clip whose file exists; bring its files or lower num_classes"
            )
        yield found.sample(min(count, len(found)), random_state=settings.seed)


def _whole(label: str, rows: pd.DataFrame, settings: Subset) -> Iterator[pd.DataFrame]:
    """All clips of a class."""
    if rows.empty:
        say(f"warning: class {label!r} has no clip whose file exists")
    for split in ("train", "val", "test"):
        yield rows[rows["split"] == split]


def choose_classes(known: list[str], settings: Subset) -> list[str]:
    """`num_classes` of the sorted class names, drawn from the seed; all of them, with a warning, when that is too many."""
    if settings.num_classes < 1 or min(settings.num_train, settings.num_test) < 0:
        raise InputError("params.yaml: subset: num_classes must be 1 or more, num_train and num_test 0 or more")
    if settings.num_classes > len(known):
        say(f"warning: {settings.num_classes} classes asked for, {len(known)} there are; all of them are taken")
        return known
    drawn = np.random.default_rng(settings.seed).choice(len(known), settings.num_classes, replace=False)
    return [known[k] for k in sorted(drawn)]


def bring_media(table: pd.DataFrame, source: Path, target: Path, media: str) -> tuple[int, int]:
    """Link or copy the chosen files; returns how many were brought and how many are not there."""
    found = [path for path in table["path"] if clip_files.is_there(source / path)]
    for path in tqdm(found, desc="media", unit="clip"):
        for file in clip_files.files_of(source / path):
            if file.is_file():
                storage.link_or_copy(file, target / file.relative_to(source), link=media == "link")
    return len(found), len(table) - len(found)


def subset(dataset: str, settings: Subset) -> str:
    """Write data/<dataset>/subset; returns the closing line."""
    form = load_format(params.value("download", dataset, "format"))
    raw = storage.DATA / dataset / "raw"
    table = form.read(raw)
    exists = pd.Series([clip_files.is_there(raw / path) for path in table["path"]], index=table.index)
    chosen = select(table, exists, form.class_of, settings)
    words = f"{dataset}: {len(chosen)} of {len(table)} clips chosen"
    if settings.mode != "all":
        words += f" ({(~exists).sum()} passed over, their files are missing)"
    with storage.atomic_folder(storage.DATA / dataset / "subset") as folder:
        form.write(chosen, folder)
        write_class_names(form, class_names(form, raw), folder)
        if settings.media != "none":
            brought, skipped = bring_media(chosen, raw, folder, settings.media)
            words += f", {brought} files brought by {settings.media}, {skipped} skipped"
    return words


def main() -> None:
    """Choose the clips of one dataset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", help="an entry of params.yaml's download section")
    dataset = parser.parse_args().dataset
    settings = params.stage(Subset, "subset", dataset)
    stage = f"subset@{dataset}"
    with storage.alone(stage), tracking.run(stage, asdict(settings), [storage.DATA / dataset / "raw"]):
        line = subset(dataset, settings)
    say(line)


if __name__ == "__main__":
    command.run(main)
