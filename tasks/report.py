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
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.nn import functional

from models.family import Attention, Example, Results, Table
from models.metrics import full_name
from models.transforms import LogMel
from tasks import bundle, storage, timeline
from tasks.data import manifest
from tasks.data.audio_store import AudioStore
from tasks.data.frame_store import FrameStore
from tasks.data.prepared_store import PreparedFrames, PreparedSounds, open_stores
from tasks.journal import flatten

if TYPE_CHECKING:
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
MAX_CONFUSIONS = 10  # pairs of classes listed below a confusion matrix
FILM = 5  # pictures of a strip
NUM_MELS = 80  # rows of a spectrogram
HOT, STRENGTH = COLORS[5], 0.7  # how relevance is laid over pictures and sounds, at most this opaque


def write(scored: Scored, results: Results, folder: Path) -> None:
    """Write report.html and plots/*.png into `folder`."""
    pictures = {name: draw(table) for name, table in results.tables.items() if table.plot}
    metas = {name: json.loads((scored.folders[name] / bundle.META).read_text()) for name in scored.trained}
    learned = [name for name, meta in metas.items() if meta["epoch"]]  # not weights that were taken as they came
    pictures |= {f"training_{name}": curves(name, scored.folders[name]) for name in learned}
    for name, png in pictures.items():
        (folder / "plots" / f"{name}.png").write_bytes(png)
    page = (
        templates()
        .get_template("report.html")
        .render(
            title=scored.family.title,
            dataset=scored.dataset,
            headline=headline(results.metrics),
            sections=[
                section(name, table, pictures.get(name, b""))
                for name, table in results.tables.items()
                if name != "predictions"
            ],
            curves=[(name, data_uri(pictures[f"training_{name}"])) for name in learned],
            examples=gallery(results.examples, storage.DATA / scored.dataset / "stores", scored.clip.audio_seconds),
            explained=any(example.video_relevance is not None for example in results.examples),
            attended=any(example.attention is not None for example in results.examples),
            provenance=provenance(scored, metas),
            settings={name: sorted(flatten(meta["config"] | meta["training"]).items()) for name, meta in metas.items()},
        )
    )
    (folder / "report.html").write_text(page)


def templates() -> Environment:
    """The pages, which escape what they are given."""
    return Environment(loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape())


def headline(metrics: dict[str, float]) -> list[dict[str, str]]:
    """The numbers that have an interval, as name, value and interval: in per cent, but for scores that go beyond 1."""
    shown = [name for name in metrics if f"{name}_low" in metrics]
    return [
        {
            "name": full_name(name),
            "value": f"{100 * metrics[name]:.1f} %" if metrics[f"{name}_high"] <= 1 else f"{metrics[name]:.2f}",
            "interval": _interval(metrics[f"{name}_low"], metrics[f"{name}_high"]),
        }
        for name in shown
    ]


def _interval(low: float, high: float) -> str:
    return f"{100 * low:.1f} – {100 * high:.1f}" if high <= 1 else f"{low:.2f} – {high:.2f}"


def section(name: str, table: Table, picture: bytes) -> dict[str, Any]:
    """A table with its picture, as the template takes it.

    Beside a confusion matrix stand its worst pairs of classes; a timeline says all that its table says.
    """
    frame = worst_pairs(table.frame) if table.plot == "confusion" else table.frame
    shown = frame.head(0 if table.plot == "timeline" else MAX_ROWS)
    return {
        "name": name,
        "title": table.title,
        "note": table.note,
        "picture": data_uri(picture),
        "width": int.from_bytes(picture[16:20]),  # pixels, as a PNG's header has them
        "columns": [str(column) for column in frame.columns],
        "numeric": [pd.api.types.is_numeric_dtype(frame[column]) for column in frame.columns],
        "rows": list(zip(*(_cells(shown[column]) for column in shown), strict=True)),
        "hidden": max(0, len(frame) - MAX_ROWS),
    }


def _cells(column: pd.Series) -> list[str]:
    """A column as text, its numbers with equally many decimals."""
    if not pd.api.types.is_float_dtype(column):
        return column.astype(str).tolist()
    greatest = column.abs().max()
    digits = 3 if greatest <= 1 else 2 if greatest <= 10 else 1
    return [f"{value:.{digits}f}" if np.isfinite(value) else "–" for value in column]


def worst_pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """The classes most often taken for another one, of a confusion table whose first column names the rows."""
    names, counts = frame.iloc[:, 0].astype(str).to_numpy(), frame.iloc[:, 1:].to_numpy(int)
    wrong = counts * (1 - np.eye(len(counts), dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_CONFUSIONS]
    true, taken = np.unravel_index(order[wrong.flat[order] > 0], counts.shape)
    pairs = {"true": names[true], "taken for": names[taken], "clips": counts[true, taken]}
    return pd.DataFrame({**pairs, "of": counts.sum(1)[true]})


# --- pictures ------------------------------------------------------------------------------------------------------------


def draw(table: Table) -> bytes:
    """A table as its kind of plot, PNG."""
    with mpl.rc_context(STYLE):
        figure = Figure(layout="constrained")
        kinds = {"confusion": _confusion, "bars": _bars, "lines": _lines, "timeline": timeline.draw}
        kinds[table.plot](figure, table.frame)
        return png(figure)


def _confusion(figure: Figure, frame: pd.DataFrame) -> None:
    names, counts = frame.iloc[:, 0].astype(str).tolist(), frame.iloc[:, 1:].to_numpy(float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(0.42 * len(names) + 2.2, 4.5, 11))
    figure.set_size_inches(side + 0.8, side)
    axes = figure.subplots()
    named = len(names) <= MAX_NAMES
    # One clip in fifty would be invisible among many classes: there, colour grows as the root of the share.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(1 if named else 0.5, 0, 1))
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.04)
    axes.spines[:].set_visible(False)
    if not named:
        axes.set(xlabel="predicted (number of the class)", ylabel="true (number of the class)")
        return
    axes.set(xlabel="predicted", ylabel="true")
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
        values = frame[column].to_numpy(float)
        bars = axes.barh(places, values, height * 0.92, label=str(column), color=COLORS[k % 6])
        known = [f"{value:.2f}" if np.isfinite(value) else "" for value in values]
        axes.bar_label(bars, known, padding=3, fontsize=8, color="#3a4450")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set_xlim(0, max(1.0, float(np.nanmax(frame[series].to_numpy(float), initial=0)) * 1.1))
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.06), ncols=len(series))


def _lines(figure: Figure, frame: pd.DataFrame) -> None:
    figure.set_size_inches(7, 4)
    axes = figure.subplots()
    for column in frame.columns[1:]:
        axes.plot(frame.iloc[:, 0], frame[column], label=str(column))
    axes.set_xlabel(str(frame.columns[0]))
    axes.legend()


def curves(phase: str, folder: Path) -> bytes:
    """Losses of a phase and its validation scores (the learning rate where it has none) over its epochs, PNG."""
    history = pd.read_csv(folder / bundle.HISTORY)
    kept = json.loads((folder / bundle.META).read_text())["epoch"]
    losses = [name for name in ("train_loss", "val_loss") if name in history]
    scores = [
        name
        for name in history.columns
        if name.startswith("val_") and name != "val_loss" and history[name].dropna().between(0, 1).all()
    ]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        _over_epochs(left, history, losses, "loss", phase)
        _over_epochs(right, history, scores[:4] or ["lr"], "validation" if scores else "learning rate", "")
        for axes in (left, right):
            axes.axvline(kept, color="#8a94a0", linestyle=":", linewidth=1.2, zorder=0)
        return png(figure)


def _over_epochs(axes: Axes, history: pd.DataFrame, columns: list[str], label: str, title: str) -> None:
    """One line a column; epochs without a value are passed over."""
    prefix = "val_" if label == "validation" else ""
    for column in columns:
        known = history[["epoch", column]].dropna()
        axes.plot(known["epoch"], known[column], marker=".", label=full_name(column.removeprefix(prefix)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel=label)
    axes.set_title(title, loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)


def png(figure: Figure) -> bytes:
    """The figure as PNG without anything that differs from run to run."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def data_uri(picture: bytes, kind: str = "png") -> str:
    """Bytes of a picture for an img tag; none for none."""
    if not picture:
        return ""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


# --- examples ------------------------------------------------------------------------------------------------------------


def gallery(examples: list[Example], stores: Path, seconds: float) -> list[dict[str, Any]]:
    """Each example with its film strip and the picture of its sound, of which the model heard so many `seconds`."""
    frames, sounds = open_stores(stores)
    return [
        {
            "clip": example.clip,
            "truth": example.truth,
            "right": example.predictions[0][0] == example.truth,
            "bars": [(name, round(100 * score, 1)) for name, score in example.predictions],
            "film": data_uri(film_strip(frames, example.clip, example.video_relevance), "jpeg"),
            "sound": data_uri(sound_picture(sounds, example, seconds)) if example.clip in sounds else "",
            "attention": data_uri(attended(example.attention, seconds)) if example.attention else "",
        }
        for example in examples
    ]


def film_strip(frames: FrameStore | PreparedFrames, clip: str, relevance: np.ndarray | None = None) -> bytes:
    """Up to FILM of the clip's frames side by side, below them what was looked at, JPEG; nothing without pictures."""
    stored = frames.num_frames(clip)
    if not stored:
        return b""
    columns = sorted({round(i * (stored - 1) / (FILM - 1)) for i in range(FILM)})
    pictures = list(frames.decode(clip, columns))
    strip = np.concatenate(pictures, axis=1)
    if relevance is not None:
        slots = [min(column * len(relevance) // max(stored - 1, 1), len(relevance) - 1) for column in columns]
        tinted = [tint(picture, relevance[slot]) for picture, slot in zip(pictures, slots, strict=True)]
        strip = np.concatenate([strip, np.concatenate(tinted, axis=1)])
    return simplejpeg.encode_jpeg(np.ascontiguousarray(strip), 85, "RGB")


def sound_picture(sounds: AudioStore | PreparedSounds, example: Example, seconds: float) -> bytes:
    """The clip's spectrogram, PNG: made from its waveform, or the one that was prepared, whose units nobody noted."""
    if not isinstance(sounds, PreparedSounds):
        return spectrogram(*sounds.read(example.clip), example.audio_relevance, seconds)
    with mpl.rc_context({**STYLE, "font.size": 9}):
        figure = Figure(figsize=(4.2, 1.6), layout="constrained")
        axes = figure.subplots()
        axes.imshow(sounds.read(example.clip).T, origin="lower", aspect="auto", cmap="magma")
        axes.set(xlabel="frame", ylabel="mel bin")
        return png(figure)


def attended(attention: Attention, seconds: float) -> bytes:
    """A row a word: its attention over the clip's frames and over the `seconds` of its sound, PNG.

    In one scale: as dark as a half of a row is on the whole, so much of the word's attention went there.
    """
    shares = {"frames, first to last": attention.video, "seconds of sound": attention.audio}
    maps = {label: values * values.shape[1] for label, values in shares.items()}
    greatest = max(float(values.max(initial=0)) for values in maps.values())
    with mpl.rc_context({**STYLE, "font.size": 8}):
        figure = Figure(figsize=(5.2, 0.6 + 0.15 * len(attention.words)), layout="constrained")
        for axes, (label, values) in zip(figure.subplots(1, 2, sharey=True), maps.items(), strict=True):
            width = seconds if label == "seconds of sound" else values.shape[1]
            extent = (0, width, len(attention.words), 0)
            axes.imshow(values, cmap="Blues", vmin=0, vmax=greatest or 1, aspect="auto", extent=extent)
            axes.set_xlabel(label)
            axes.set_yticks(np.arange(len(attention.words)) + 0.5, attention.words)
            if label != "seconds of sound":
                axes.set_xticks([])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        return png(figure)


def tint(picture: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """A frame (H, W, 3) in grey, coloured as far as relevance (h, w) says of its middle square, which the model saw."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = torch.from_numpy(relevance)[None, None].float()
    strength = np.zeros((height, width, 1))
    strength[top : top + side, left : left + side, 0] = functional.interpolate(square, (side, side), mode="bilinear")[
        0, 0
    ]
    strength *= STRENGTH
    grey = picture.mean(2, keepdims=True)
    return (grey * (1 - strength) + 255 * np.array(to_rgb(HOT)) * strength).round().astype(np.uint8)


def spectrogram(wave: np.ndarray, rate: int, relevance: np.ndarray | None = None, seconds: float = 0.0) -> bytes:
    """The clip's log-mel picture, PNG, with what of its first `seconds` was listened to; nothing below one window."""
    front_end = LogMel(rate, NUM_MELS)
    if not front_end.num_frames(len(wave)):
        return b""
    mel = front_end(torch.from_numpy(wave)[None])[0].T.numpy()
    low, high = np.percentile(mel, [5, 99.5])
    pitches = np.array([f for f in (500, 1000, 2000, 4000, 8000) if f < rate / 2])
    scale = np.log1p(np.array([20, *pitches, rate / 2]) / 700)  # mel, but for a factor
    with mpl.rc_context({**STYLE, "font.size": 9}):
        figure = Figure(figsize=(4.2, 1.6), layout="constrained")
        axes = figure.subplots()
        extent, colors = (0, len(wave) / rate, 0, 1), "magma" if relevance is None else "gray"
        axes.imshow(mel, origin="lower", aspect="auto", cmap=colors, vmin=low, vmax=high, extent=extent)
        if relevance is not None:
            hot = np.empty((*relevance.shape, 4))
            hot[..., :3], hot[..., 3] = to_rgb(HOT), STRENGTH * relevance
            axes.imshow(hot, origin="lower", aspect="auto", extent=(0, seconds, 0, 1))
            axes.set_xlim(0, len(wave) / rate)
        axes.set_yticks((scale[1:-1] - scale[0]) / (scale[-1] - scale[0]), [f"{f / 1000:g}" for f in pitches])
        axes.set(xlabel="seconds", ylabel="kHz")
        return png(figure)


def provenance(scored: Scored, metas: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """What was trained on what: clips a split, clips left out, and each phase's weights by their SHA-256."""
    data = storage.DATA / scored.dataset
    counts = scored.table["split"].value_counts()
    dropped = sum(len(pd.read_csv(data / stage / "quarantine.csv")) for stage in ("clean", "stores"))
    clips = ", ".join(f"{counts.get(split, 0)} {split}" for split in manifest.SPLITS)
    rows = [("data", f"{scored.dataset}: {clips}"), ("in quarantine", f"{dropped} clips")]
    for name, meta in metas.items():
        origin = meta["started_from"]
        start = origin if isinstance(origin, str) else f"{origin['phase']} {origin['sha256']}"
        digest = storage.file_digest(scored.folders[name] / bundle.WEIGHTS)
        rows.append((name, f"weights {digest}, of epoch {meta['epoch']}, started from {start}"))
    return rows
