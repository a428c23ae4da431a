"""Clips that cannot be used: their list, a page that shows them, and the share at which a stage gives up."""

from __future__ import annotations

import base64
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape

from models.family import InputError
from tasks import command, storage
from tasks.data import video

COLUMNS = ["id", "path", "split", "reason", "detail"]
REPORTS = Path(".duet/reports")  # DVC removes the outs of a stage that fails; here its list outlives it
TEMPLATES = Path(__file__).parent / "templates"
SHOWN = 500  # clips on the page; the list has all of them


def count_reasons(dropped: pd.DataFrame) -> str:
    """Such as "2 empty, 1 no audio"."""
    return ", ".join(f"{n} {reason}" for reason, n in dropped["reason"].value_counts().sort_index().items()) or "none"


def write_list(dropped: pd.DataFrame, path: Path) -> None:
    """The clips as CSV, sorted by id."""
    with storage.atomic_file(path) as temporary:
        dropped.reindex(columns=COLUMNS).sort_values("id", kind="stable").to_csv(temporary, index=False)


def write_page(dropped: pd.DataFrame, total: int, dataset: str, path: Path) -> None:
    """One self-contained HTML page: how many, why, and a picture of each clip that still has one."""
    rows = dropped.sort_values("id", kind="stable").head(SHOWN).to_dict("records")
    for row in rows:
        picture = video.thumbnail(storage.DATA / dataset / str(row["path"]))
        row["picture"] = base64.b64encode(picture).decode() if picture else ""
    counts = dropped["reason"].value_counts().sort_index().to_dict()
    page = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape())
    with storage.atomic_file(path) as temporary:
        text = page.get_template("quarantine.html").render(
            rows=rows, counts=counts, total=total, dropped=len(dropped), dataset=dataset
        )
        temporary.write_text(text, encoding="utf-8")


def check_share(dropped: pd.DataFrame, total: int, share: float, section: str) -> None:
    """InputError when more than `share` of `total` clips are in `dropped`; the list is left in .duet/reports."""
    if len(dropped) <= share * total:
        return
    stage, _, dataset = section.partition(".")
    path = REPORTS / dataset / f"{stage}-quarantine.csv"
    write_list(dropped, path)
    for row in dropped.head(5).to_dict("records"):
        command.say(f"  {row['path']}: {row['reason']}, {row['detail']}")
    raise InputError(
        f"{dataset}: {len(dropped)} of {total} clips are unusable ({count_reasons(dropped)}), more than "
        f"{section}.max_quarantine = {share:g}; the list is {path}; mend the files or raise that share"
    )
