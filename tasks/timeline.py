"""Segments of clips over time: what is there above, what was found below, a line a class."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MultipleLocator

INK, LINE = "#3a4450", "#e3e8ee"
PALEST = 0.25  # opacity of a detection of score 0
LONG = 120  # seconds from which on time is told in minutes
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600)  # seconds between ticks
MAX_TICKS = 12
NOTHING = "nothing"  # kind of the row of a clip without a segment


def draw(figure: Figure, frame: pd.DataFrame) -> None:
    """A panel a clip of `Table.plot` timeline, with truth or detections or both; the lower its score, the paler one is."""
    kinds = [kind for kind in ("truth", "found") if (frame["kind"] == kind).any()]
    clips = [frame[frame["clip"] == clip] for clip in frame["clip"].unique()]
    rows = [own["label"].nunique() for own in clips]
    figure.set_size_inches(9.5, 0.5 + sum(0.34 * num + 0.62 for num in rows))
    panels = figure.subplots(len(clips), 1, squeeze=False, height_ratios=[num + 0.4 for num in rows])[:, 0]
    color = mpl.rcParams["axes.prop_cycle"].by_key()["color"][0]
    for axes, own in zip(panels, clips, strict=True):
        _panel(axes, own, {kind: face for kind, face in (("truth", INK), ("found", color)) if kind in kinds})
    handles = {"truth": Patch(color=INK, label="truth"), "found": Patch(color=color, label="found (paler: less sure)")}
    if kinds:
        figure.legend(handles=[handles[kind] for kind in kinds], loc="outside upper right", ncols=2)


def _panel(axes: Axes, own: pd.DataFrame, faces_of: dict[str, str]) -> None:
    names, line = np.unique(own["label"].astype(str), return_inverse=True)
    duration = float(own["duration"].iloc[0])
    height = 0.8 / max(len(faces_of), 1)
    for lane, (kind, face) in enumerate(faces_of.items()):
        rows = (own["kind"] == kind).to_numpy()
        start, length = own["start"].to_numpy()[rows], (own["end"] - own["start"]).to_numpy()[rows]
        faces = np.empty((len(start), 4))
        faces[:, :3] = to_rgb(face)
        faces[:, 3] = 1 if kind == "truth" else PALEST + (1 - PALEST) * own["score"].to_numpy()[rows]
        top = line[rows] - 0.4 + lane * height
        axes.barh(top, length, 0.9 * height, start, align="edge", color=faces, edgecolor="white", linewidth=0.8)
    if (own["kind"] == NOTHING).all():
        axes.text(duration / 2, 0, "nothing found", ha="center", va="center", color=INK)
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    axes.set(xlim=(0, duration), ylim=(len(names) - 0.5, -0.5))
    axes.hlines(np.arange(len(names) - 1) + 0.5, 0, duration, colors=LINE, linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.set_title(str(own["clip"].iloc[0]).replace("$", r"\$"), loc="left", fontsize=9, color=INK)
    step = next((step for step in STEPS if duration / step < MAX_TICKS), STEPS[-1])
    axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda second, place: _clock(second, duration)))


def _clock(second: float, duration: float) -> str:
    """12 or 12.5 s of a short clip, 3:20 of a long one."""
    return f"{int(second) // 60}:{int(second) % 60:02}" if duration >= LONG else f"{second:g} s"
