"""The closing words of `make demo`: what was reached, and where to look: `python -m tasks.summary FAMILY`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Print the table. Loads nothing heavy: it stands between the last stage and the person who waits."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tasks.summary FAMILY")
    root = Path("artifacts") / sys.argv[1]
    print("\n".join(summary(root)))


def summary(root: Path) -> list[str]:
    """The lines for a family's folder of artifacts."""
    metrics, version = _read(root / "evaluate" / "metrics.json"), _read(root / "register" / "version.json")
    plots = sorted((root / "evaluate" / "plots").glob("*.png"))
    aliases = ", ".join(version["aliases"])
    return [
        "",
        *_table(metrics),
        "",
        f"report    {root}/evaluate/report.html",
        f"plots     {root}/evaluate/plots ({len(plots)} pictures)",
        f"version   {version['name']} {version['version']} ({aliases})",
        f"predict   {version['predict']}",
        "runs      mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000",
        "          then open http://127.0.0.1:5000",
    ]


def _table(metrics: dict[str, float]) -> list[str]:
    """One line a metric; where `x_low` and `x_high` stand beside `x`, they are its 95 % interval."""
    names = [
        name
        for name in metrics
        if not any(name.removesuffix(end) != name and name.removesuffix(end) in metrics for end in ("_low", "_high"))
    ]
    width = max(map(len, names), default=0)
    lines = []
    for name in names:
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        interval = f"   [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
        value = metrics[name]
        lines.append(
            f"{name:<{width}}  {value:>8.0f}"
            if value.is_integer() and value > 1
            else f"{name:<{width}}  {value:>8.3f}{interval}"
        )
    return lines


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        sys.exit(f"error: {path} not found; run `make demo` (or dvc repro) first")


if __name__ == "__main__":
    main()
