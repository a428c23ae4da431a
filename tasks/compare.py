"""Two versions of a family side by side: `python -m tasks.compare FAMILY FIRST SECOND`, such as `t3av 3 4`.

Prints the numbers, and leaves one page with everything in artifacts/FAMILY/compare/FIRST-SECOND and in an MLflow run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import models
from models.family import Family, InputError, Table
from models.metrics import full_name
from tasks import bundle, command, params, promote, report, storage, tracking, versions
from tasks.data import manifest
from tasks.predict import Predictor
from tasks.versions import Version

TIMED_CLIPS, ROUNDS = 32, 3  # test clips answered by both in turn, the fastest round counts
MAX_CLASSES = 25  # in the picture; the table has all


@dataclass(frozen=True)
class Side:
    """One of the two versions with what it keeps."""

    version: Version
    metrics: dict[str, float]
    classes: pd.DataFrame  # per_class.csv; empty for a family that has none
    predictions: pd.DataFrame
    params: dict[str, str]

    @property
    def name(self) -> str:
        """The heading of its column."""
        return f"version {self.version.number}"

    @cached_property
    def bundle(self) -> bundle.Bundle:
        """Its weights."""
        return bundle.load(tracking.download_bundle(self.version.address))


def load(version: Version) -> Side:
    """What the version's run keeps."""
    with versions.kept(version, tracking.EVALUATION) as folder:
        classes = folder / "plots/per_class.csv"
        table = pd.read_csv(classes, keep_default_na=False, na_values=[""]) if classes.is_file() else pd.DataFrame()
        metrics = json.loads((folder / "metrics.json").read_text())
    values = tracking.client().get_run(version.run_id).data.params
    return Side(version, metrics, table, versions.predictions(version), values)


def main() -> None:
    """Compare, print, keep."""
    parser = argparse.ArgumentParser(prog="python -m tasks.compare", description="Two versions side by side.")
    parser.add_argument("family", choices=models.names())
    parser.add_argument("first", type=int)
    parser.add_argument("second", type=int)
    given = parser.parse_args()
    gate = params.stage(promote.Promote, "promote")
    out = storage.ARTIFACTS / given.family / "compare" / f"{given.first}-{given.second}"
    stage = f"compare@{given.family}"
    with storage.alone(stage), tracking.run(stage, {"first": given.first, "second": given.second}) as run:
        lines = compare(given.family, (given.first, given.second), gate, out)
        for path in sorted(path for path in out.rglob("*") if path.is_file()):
            run.artifact(path, "/".join(path.relative_to(out).parent.parts))
    command.say("\n".join([*lines, f"compare: the page is {out / 'compare.html'}"]))


def compare(family: str, numbers: tuple[int, int], gate: promote.Promote, out: Path) -> list[str]:
    """Write the page and its tables to `out`; returns the most important of it as lines."""
    if numbers[0] == numbers[1]:
        raise InputError(f"version {numbers[0]} twice: name two versions of duet-{family}")
    first, second = (load(versions.find(f"models:/duet-{family}/{number}")) for number in numbers)
    try:
        verdict = str(promote.compare(family, second.version, first.version, gate))
        clips = disagreements(first, second, models.load(family))
    except InputError as error:
        verdict = str(error)
        clips = Table("Clips on which they differ", pd.DataFrame(), f"Left out: {error}")
    tables = {
        "metrics": metric_table(first, second),
        "classes": class_table(first, second),
        "clips": clips,
        "speed": speed_table(first, second),
        "params": difference_table("Params that differ", first.params, second.params, first, second),
        "data": difference_table("Data and code", provenance(first), provenance(second), first, second),
    }
    pictures = {"metrics": draw_intervals(first, second), "classes": draw_classes(tables["classes"].frame)}
    write(out, models.load(family).title, f"{second.version} against {first.version}: {verdict}", tables, pictures)
    shown = [tables[name].frame.to_string(index=False, na_rep="–") for name in ("metrics", "speed")]
    return [*"\n\n".join(shown).splitlines(), "", tables["clips"].note, verdict]


def write(out: Path, title: str, lead: str, tables: Mapping[str, Table], pictures: Mapping[str, bytes]) -> None:
    """compare.html, plots/*.csv and plots/*.png."""
    page = report.templates().get_template("compare.html")
    with storage.atomic_folder(out) as folder:
        (folder / "plots").mkdir()
        for name, table in tables.items():
            table.frame.to_csv(folder / "plots" / f"{name}.csv", index=False, float_format="%.6g")
        for name, picture in pictures.items():
            if picture:
                (folder / "plots" / f"{name}.png").write_bytes(picture)
        sections = [report.section(name, table, pictures.get(name, b"")) for name, table in tables.items()]
        (folder / "compare.html").write_text(page.render(title=title, lead=lead, sections=sections))


# --- tables --------------------------------------------------------------------------------------------------------------


def metric_table(first: Side, second: Side) -> Table:
    """Every metric of both, with its interval where it has one, and the difference."""
    names = [name for name in first.metrics | second.metrics if not name.endswith(("_low", "_high"))]
    names.sort(key=lambda name: f"{name}_low" not in first.metrics)  # the main ones have intervals
    frame = pd.DataFrame({"metric": [full_name(name) for name in names]})
    for side in (first, second):
        frame[side.name] = [_with_interval(side.metrics, name) for name in names]
    shared = first.metrics.keys() & second.metrics.keys()
    gains = [f"{second.metrics[name] - first.metrics[name]:+.4g}" if name in shared else "–" for name in names]
    frame["difference"] = gains
    return Table("Metrics", frame, "On the test split, with 95 % bootstrap intervals.")


def _with_interval(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return "–"
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return f"{metrics[name]:.4g}" + (f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else "")


def class_table(first: Side, second: Side) -> Table:
    """What the second version's scores of each class have over the first's, the most changed class first."""
    title = "Differences of classes"
    shared = [name for name in first.classes.select_dtypes("float") if name in second.classes]
    if not shared:
        return Table(title, pd.DataFrame(), "Left out: their evaluations list no scores of classes.")
    key = first.classes.columns[0]
    both = first.classes.merge(second.classes, on=key, suffixes=("_first", "_second"))
    frame = pd.DataFrame({name: both[f"{name}_second"] - both[f"{name}_first"] for name in shared})
    order = frame.abs().mean(axis=1).sort_values(ascending=False, kind="stable").index
    frame.insert(0, key, both[key])
    note = f"{second.name} minus {first.name}; the class that changed most stands first."
    return Table(title, frame.loc[order].reset_index(drop=True), note)


def disagreements(first: Side, second: Side, family: Family) -> Table:
    """The clips that they answer differently, those that the second version lost first."""
    theirs, ours = first.predictions, second.predictions
    # What is known of a clip stands before what was answered: the first column that differs is the answer.
    columns = [name for name in ours if name in theirs]
    answer = next((name for name in columns if not ours[name].equals(theirs[name])), columns[-1])
    rows = np.flatnonzero(ours[answer] != theirs[answer])
    frame = ours.loc[rows, [name for name in columns[: columns.index(answer)] if name != "group"]]
    frame[first.name], frame[second.name] = theirs[answer][rows], ours[answer][rows]
    metric, statistic = family.headline
    worth = [
        # np.eye(1, N, k) weighs clip k alone.
        np.array([told(np.eye(1, len(ours), row))[0] for row in rows.tolist()])
        for told in (statistic(theirs), statistic(ours))
    ]
    gain = worth[1] - worth[0]
    frame = frame.assign(**{f"{metric} gained": gain}).sort_values(f"{metric} gained", kind="stable")
    note = (
        f"They answer {len(rows)} of {len(ours)} clips differently: {second.name} is better on {np.sum(gain > 0)} of "
        f"these, {first.name} on {np.sum(gain < 0)}."
    )
    return Table("Clips on which they differ", frame.reset_index(drop=True), note)


def difference_table(title: str, left: dict[str, str], right: dict[str, str], first: Side, second: Side) -> Table:
    """The keys whose values differ."""
    keys = [key for key in sorted(left | right) if left.get(key) != right.get(key)]
    frame = pd.DataFrame({"name": keys})
    for side, values in ((first, left), (second, right)):
        frame[side.name] = [values.get(key, "–") for key in keys]
    return Table(title, frame, f"{len(left | right) - len(keys)} more are the same.")


def provenance(side: Side) -> dict[str, str]:
    """What data and code the version was made from: hashes of every dependency, the commit, weights and test clips."""
    kept = ("duet.dataset", "duet.evaluation_data", "duet.sha256", "git.commit", "git.dirty")
    return {key: value for key, value in side.version.tags.items() if key in kept or key.startswith("dvc.")}


# --- speed and size ------------------------------------------------------------------------------------------------------


def speed_table(first: Side, second: Side) -> Table:
    """Clips answered in a second, from raw file to answer, and how large the weights are."""
    sides = (first, second)
    frame = pd.DataFrame({"": ["parameters", "bytes of weights"]})
    for side in sides:
        numel = sum(tensor.numel() for tensor in side.bundle.whole().values())
        frame[side.name] = [f"{numel:,}", f"{side.bundle.path.stat().st_size:,}"]
    clips = timed_clips(str(second.bundle.meta["dataset"]))
    if not clips:
        note = f"Speed was not measured: no raw test clip of {second.bundle.meta['dataset']} is here; dvc pull it."
        return Table("Speed and size", frame, note)
    speeds = measure([Predictor(side.bundle) for side in sides], clips)
    frame.loc[len(frame)] = ["clips/s", *(f"{speed:.1f}" for speed in speeds)]
    note = f"The same {len(clips)} raw test clips, decoding included, in turn; the faster of {ROUNDS} rounds."
    return Table("Speed and size", frame, note)


def timed_clips(dataset: str) -> list[Path]:
    """Raw files of the first test clips, as far as they are here."""
    if not manifest.manifest_path(dataset).is_file():
        return []
    rows = manifest.read(dataset)
    paths = rows[rows["split"] == "test"].sort_values("id")["path"][:TIMED_CLIPS]
    return [path for path in (storage.DATA / dataset / name for name in paths) if path.is_file()]


def measure(predictors: list[Predictor], clips: list[Path]) -> list[float]:
    """Clips/s of each, in turns so that a busy machine slows both."""
    times = [[float("inf")] for _ in predictors]
    for predictor in predictors:
        predictor.predict(clips[:1])
    for _ in range(ROUNDS):
        for predictor, spent in zip(predictors, times, strict=True):
            begin = time.perf_counter()
            predictor.predict(clips)
            spent.append(time.perf_counter() - begin)
    return [len(clips) / min(spent) for spent in times]


# --- pictures ------------------------------------------------------------------------------------------------------------


def draw_intervals(first: Side, second: Side) -> bytes:
    """Metrics that have an interval, both versions below each other, PNG; nothing without any."""
    names = [name for name in first.metrics if f"{name}_low" in first.metrics and f"{name}_low" in second.metrics]
    if not names:
        return b""
    with mpl.rc_context(report.STYLE):
        figure = Figure(figsize=(7, 0.9 + 0.6 * len(names)), layout="constrained")
        axes = figure.subplots()
        for shift, side in ((-0.13, first), (0.13, second)):
            value = np.array([[side.metrics[f"{name}{end}"] for end in ("_low", "", "_high")] for name in names]).T
            reach = np.abs(value[[0, 2]] - value[1])
            axes.errorbar(value[1], np.arange(len(names)) + shift, xerr=reach, fmt="o", capsize=3, label=side.name)
        axes.set_yticks(range(len(names)), [full_name(name) for name in names])
        axes.invert_yaxis()
        axes.grid(axis="x", color="#e3e8ee")
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.08), ncols=2)
        return report.png(figure)


def draw_classes(frame: pd.DataFrame) -> bytes:
    """Bars of each class's differences, a panel a score, PNG; nothing for no classes."""
    if frame.empty:
        return b""
    shown, scores = frame.head(MAX_CLASSES), list(frame.columns[1:])
    with mpl.rc_context(report.STYLE):
        figure = Figure(figsize=(2.4 + 2.1 * len(scores), 0.9 + 0.27 * len(shown)), layout="constrained")
        panels = figure.subplots(1, len(scores), sharex=True, sharey=True, squeeze=False)[0]
        for axes, score in zip(panels, scores, strict=True):
            values = shown[score].to_numpy(float)
            axes.barh(range(len(shown)), values, 0.7, color=np.where(values < 0, report.COLORS[5], report.COLORS[0]))
            axes.axvline(0, color="#8a94a0", linewidth=0.8)
            axes.set_title(score)
        panels[0].set_yticks(range(len(shown)), shown.iloc[:, 0].astype(str))
        panels[0].invert_yaxis()
        return report.png(figure)


if __name__ == "__main__":
    command.run(main)
