"""Segments of clips over time: what is there above, what was found below, a line a class."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, LINE = "#3a4450", "#e3e8ee"
PALEST = 0.25  # opacity of a detection of score 0
LONG = 120  # seconds from which on time is told in minutes


def draw(figure: Figure, frame: pd.DataFrame) -> None:
    """A panel a clip of `Table.plot` timeline; a detection is the paler the lower its score."""
    clips = [frame[frame["clip"] == clip] for clip in frame["clip"].unique()]
    rows = [own["label"].nunique() for own in clips]
    figure.set_size_inches(9.5, 0.5 + sum(0.34 * num + 0.62 for num in rows))
    panels = figure.subplots(len(clips), 1, squeeze=False, height_ratios=[num + 0.4 for num in rows])[:, 0]
    color = mpl.rcParams["axes.prop_cycle"].by_key()["color"][0]
    for axes, own in zip(panels, clips, strict=True):
        _panel(axes, own, color)
    handles = [Patch(color=INK, label="truth"), Patch(color=color, label="found (paler: less sure)")]
    figure.legend(handles=handles[: 1 + (frame["kind"] == "found").any()], loc="outside upper right", ncols=2)


def _panel(axes: Axes, own: pd.DataFrame, color: str) -> None:
    names, line = np.unique(own["label"].astype(str), return_inverse=True)
    duration = float(own["duration"].iloc[0])
    for kind, top, face in (("truth", -0.4, INK), ("found", 0.04, color)):
        rows = (own["kind"] == kind).to_numpy()
        start, length = own["start"].to_numpy()[rows], (own["end"] - own["start"]).to_numpy()[rows]
        faces = np.empty((len(start), 4))
        faces[:, :3] = to_rgb(face)
        faces[:, 3] = 1 if kind == "truth" else PALEST + (1 - PALEST) * own["score"].to_numpy()[rows]
        axes.barh(line[rows] + top, length, 0.36, start, align="edge", color=faces, edgecolor="white", linewidth=0.8)
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    axes.set(xlim=(0, duration), ylim=(len(names) - 0.5, -0.5))
    axes.hlines(np.arange(len(names) - 1) + 0.5, 0, duration, colors=LINE, linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.set_title(str(own["clip"].iloc[0]).replace("$", r"\$"), loc="left", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(10))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda second, place: _clock(second, duration)))


def _clock(second: float, duration: float) -> str:
    """12 or 12.5 s of a short clip, 3:20 of a long one."""
    return f"{int(second) // 60}:{int(second) % 60:02}" if duration >= LONG else f"{second:g} s"
