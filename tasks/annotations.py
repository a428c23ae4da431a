"""What a format has to say of its annotations once the files are probed: a page, and an error where training would be wrong."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape

from models.family import InputError
from tasks import quarantine, storage
from tasks.datasets import Format, Review, reviewer


def review(form: Format, table: pd.DataFrame, folder: Path, dataset: str) -> Path | None:
    """Write the page and return its path, None where the format checks nothing; InputError for findings that are errors.

    `table` is the subset's, with what was found in the files; `folder` holds the annotations as they came.
    """
    check = reviewer(form)
    if check is None:
        return None
    found, page = check(table, folder), quarantine.REPORTS / dataset / "annotations.html"
    write_page(found, dataset, page)
    errors = [finding for finding in found.findings if finding.severity == "error"]
    if errors:
        first = f"{f'video {errors[0].clip}: ' if errors[0].clip else ''}{errors[0].text}"
        raise InputError(
            f"{dataset}: {len(errors)} {'error' if len(errors) == 1 else 'errors'} in the annotations, first {first}; "
            f"mend them or leave those videos out; all are listed in {page}"
        )
    return page


def write_page(found: Review, dataset: str, path: Path) -> None:
    """One self-contained HTML page: what the annotations are like, what suits them, and all findings, errors first."""
    page = Environment(loader=FileSystemLoader(quarantine.TEMPLATES), autoescape=select_autoescape())
    ordered = sorted(found.findings, key=lambda finding: (finding.severity, finding.clip))
    counts = {name: sum(finding.severity == name for finding in ordered) for name in ("error", "warning")}
    tables = {title: [list(frame.columns), *frame.to_numpy().tolist()] for title, frame in found.tables.items()}
    with storage.atomic_file(path) as temporary:
        text = page.get_template("annotations.html").render(
            dataset=dataset, findings=ordered[: quarantine.SHOWN], counts=counts, tables=tables, advice=found.advice
        )
        temporary.write_text(text, encoding="utf-8")
