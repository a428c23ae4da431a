"""The report page of an evaluation: one HTML file with everything in it, the same bytes for the same results."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import simplejpeg
import torch
from cycler import cycler
from jinja2 import Environment, FileSystemLoader, select_autoescape

from models.family import Example, Results, Table
from models.transforms import LogMel
from tasks import bundle, storage
from tasks.data.audio_store import AudioStore
from tasks.data.frame_store import FrameStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tasks.evaluate import Scored

TEMPLATES = Path(__file__).parent / "templates"
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]  # Okabe and Ito: colour-blind safe
STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a94a0",
    "axes.labelcolor": "#3a4450", "xtick.color": "#3a4450", "ytick.color": "#3a4450", "figure.dpi": 110,
    "axes.prop_cycle": cycler(color=COLORS), "legend.frameon": False, "axes.titlesize": 11,
}  # fmt: skip
MAX_ROWS = 40  # of a table on the page; the CSV has all
MAX_NAMES = 40  # classes up to which a confusion matrix names them
FILM = 8  # pictures of a strip


def write(scored: Scored, results: Results, folder: Path) -> None:
    """Write report.html and plots/*.png into `folder`."""
    pictures = {name: draw(table) for name, table in results.tables.items() if table.plot}
    pictures |= {f"training_{name}": curves(name, scored.folders[name]) for name in scored.trained}
    for name, png in pictures.items():
        (folder / "plots" / f"{name}.png").write_bytes(png)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape())
    page = environment.get_template("report.html").render(
        title=scored.family.title,
        dataset=scored.dataset,
        headline=headline(results.metrics),
        sections=[
            section(name, table, pictures.get(name)) for name, table in results.tables.items() if name != "predictions"
        ],
        curves=[(name, data_uri(pictures[f"training_{name}"])) for name in scored.trained],
        examples=gallery(results.examples, storage.DATA / scored.dataset / "stores"),
        provenance=provenance(scored),
    )
    (folder / "report.html").write_text(page)


def headline(metrics: dict[str, float]) -> list[dict[str, str]]:
    """The numbers that have an interval, as name, value and interval in per cent."""
    shown = [name for name in metrics if f"{name}_low" in metrics]
    return [
        {
            "name": name.replace("_", " "),
            "value": f"{100 * metrics[name]:.1f} %",
            "interval": f"{100 * metrics[f'{name}_low']:.1f} – {100 * metrics[f'{name}_high']:.1f}",
        }
        for name in shown
    ]


def section(name: str, table: Table, picture: bytes | None) -> dict[str, Any]:
    """A table with its picture, as the template takes it."""
    frame = table.frame if table.plot != "confusion" else table.frame.iloc[0:0, 0:0]
    return {
        "name": name,
        "title": table.title,
        "note": table.note,
        "picture": data_uri(picture) if picture else "",
        "columns": [str(column) for column in frame.columns],
        "numeric": [pd.api.types.is_numeric_dtype(frame[column]) for column in frame.columns],
        "rows": [[_cell(value) for value in row] for row in frame.head(MAX_ROWS).itertuples(index=False)],
        "hidden": max(0, len(frame) - MAX_ROWS),
    }


def _cell(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return (
            "–"
            if not np.isfinite(value)
            else f"{value:.3f}"
            if value != int(value) or abs(value) < 2
            else f"{value:.0f}"
        )
    return str(value)


# --- pictures ------------------------------------------------------------------------------------------------------------


def draw(table: Table) -> bytes:
    """A table as its kind of plot, PNG."""
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(layout="constrained")
        {"confusion": _confusion, "bars": _bars, "lines": _lines}[table.plot](figure, table.frame)
        return png(figure)


def _confusion(figure: Figure, frame: pd.DataFrame) -> None:
    names, counts = frame.iloc[:, 0].astype(str).tolist(), frame.iloc[:, 1:].to_numpy(float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(0.42 * len(names) + 2.2, 4.5, 11))
    figure.set_size_inches(side + 0.8, side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.04)
    axes.set(xlabel="predicted", ylabel="true")
    axes.spines[:].set_visible(False)
    if len(names) > MAX_NAMES:
        return
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    for i, j in zip(*np.nonzero(counts), strict=True):
        color = "white" if shares[i, j] > 0.5 else "#1c2430"
        axes.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", fontsize=8, color=color)


def _bars(figure: Figure, frame: pd.DataFrame) -> None:
    names, series = frame.iloc[:, 0].astype(str).tolist(), frame.columns[1:]
    figure.set_size_inches(8, 0.7 + 0.21 * len(names) * (len(series) + 1))
    axes = figure.subplots()
    height = 0.8 / len(series)
    for k, column in enumerate(series):
        places = np.arange(len(names)) + (k - (len(series) - 1) / 2) * height
        bars = axes.barh(places, frame[column].to_numpy(float), height * 0.92, label=str(column), color=COLORS[k % 6])
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8, color="#3a4450")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.0, float(np.nanmax(frame[series].to_numpy(float))) * 1.1))
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.06), ncols=len(series))


def _lines(figure: Figure, frame: pd.DataFrame) -> None:
    figure.set_size_inches(7, 4)
    axes = figure.subplots()
    for column in frame.columns[1:]:
        axes.plot(frame.iloc[:, 0], frame[column], label=str(column))
    axes.set_xlabel(str(frame.columns[0]))
    axes.legend()


def curves(phase: str, folder: Path) -> bytes:
    """Training and validation curves of a phase from its history, PNG: losses on the left, the selecting metric right."""
    from matplotlib.figure import Figure

    history = pd.read_csv(folder / bundle.HISTORY)
    chosen = json.loads((folder / bundle.META).read_text())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for column in ("train_loss", "val_loss"):
            if column in history:
                left.plot(history["epoch"], history[column], marker=".", label=column.replace("_", " "))
        left.set(xlabel="epoch", ylabel="loss", title=phase)
        left.legend()
        scores = [
            c for c in map(str, history) if c.startswith("val_") and c != "val_loss" and history[c].between(0, 1).all()
        ]
        for column in scores[:4]:
            right.plot(
                history["epoch"], history[column], marker=".", label=column.removeprefix("val_").replace("_", " ")
            )
        if scores:
            right.legend()
        else:
            right.plot(history["epoch"], history["lr"], marker=".", color=COLORS[2])
        right.axvline(chosen["epoch"], color="#8a94a0", linestyle=":", linewidth=1)
        right.set(
            xlabel="epoch", ylabel="validation" if scores else "learning rate", title="dotted: the epoch that was kept"
        )
        return png(figure)


def png(figure: Figure) -> bytes:
    """The figure as PNG without anything that differs from run to run."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def data_uri(picture: bytes, kind: str = "png") -> str:
    """Bytes of a picture for an img tag."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


# --- examples ------------------------------------------------------------------------------------------------------------


def gallery(examples: list[Example], stores: Path) -> list[dict[str, Any]]:
    """Each example with its film strip and the picture of its sound."""
    frames, sounds = FrameStore(stores), AudioStore(stores)
    return [
        {
            "clip": example.clip,
            "truth": example.truth,
            "right": example.predictions[0][0] == example.truth,
            "bars": [(name, round(100 * score, 1)) for name, score in example.predictions],
            "film": data_uri(film_strip(frames, example.clip), "jpeg"),
            "sound": data_uri(spectrogram(*sounds.read(example.clip))) if example.clip in sounds.places else "",
        }
        for example in examples
    ]


def film_strip(frames: FrameStore, clip: str) -> bytes:
    """Up to FILM of the clip's frames side by side, JPEG."""
    stored = frames.num_frames(clip)
    columns = sorted({round(i * (stored - 1) / (FILM - 1)) for i in range(FILM)})
    pictures = frames.decode(clip, columns)
    strip = np.concatenate(list(pictures), axis=1)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(strip), 85, "RGB")


def spectrogram(wave: np.ndarray, rate: int) -> bytes:
    """The clip's log-mel picture, low pitch at the bottom, PNG."""
    from matplotlib.figure import Figure

    mel = LogMel(rate, 80)(torch.from_numpy(wave)[None])[0].T.numpy()
    with mpl.rc_context({**STYLE, "font.size": 8}):
        figure = Figure(figsize=(5.2, 1.3), layout="constrained")
        axes = figure.subplots()
        low, high = np.percentile(mel, [5, 99.5])
        axes.imshow(
            mel, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high, extent=(0, len(wave) / rate, 0, 80)
        )
        axes.set(xlabel="seconds", ylabel="mel", yticks=[])
        return png(figure)


def provenance(scored: Scored) -> list[tuple[str, str]]:
    """What was trained on what."""
    counts = scored.table["split"].value_counts()
    dropped = len(pd.read_csv(storage.DATA / scored.dataset / "clean" / "quarantine.csv"))
    rows = [
        (
            "data",
            f"{scored.dataset}: " + ", ".join(f"{counts.get(split, 0)} {split}" for split in ("train", "val", "test")),
        ),
        ("in quarantine", f"{dropped} clips"),
    ]
    for name in scored.trained:
        meta = json.loads((scored.folders[name] / bundle.META).read_text())
        origin = meta["started_from"]
        start = origin if isinstance(origin, str) else f"{origin['phase']} {origin['sha256'][:12]}"
        digest = storage.file_digest(scored.folders[name] / bundle.WEIGHTS)
        rows.append((name, f"weights {digest[:12]}, epoch {meta['epoch']}, started from {start}"))
    return rows
