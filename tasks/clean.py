"""Probe every file of a dataset: `python -m tasks.clean DATASET`. Usable clips go to the manifest, the others to quarantine."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape
from tqdm import tqdm

from models.family import InputError
from tasks import command, params, storage, tracking
from tasks.data import manifest, video
from tasks.datasets import load_format

QUARANTINE = ["id", "path", "split", "reason", "detail"]
PIECE = 200  # clips whose probes are kept together, so that a killed run goes on from there
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Clean:
    """Section `clean.<dataset>` of params.yaml."""

    val_share: float  # of train, carved out by source video when the annotations have no val split
    seed: int
    require_audio: bool  # clips without a sound track go to quarantine
    drop_silent: bool
    drop_still: bool
    workers: int
    max_quarantine: float  # share of clips that may be unusable before the stage fails


def listed_clips(dataset: str) -> pd.DataFrame:
    """The subset's rows with `path` relative to data/<dataset>: in the subset where it holds media, else in raw."""
    folder = storage.DATA / dataset / "subset"
    table = load_format(params.section("download", dataset)["format"]).read(folder)
    here = "subset" if (folder / "video").is_dir() else "raw"
    return table.assign(path=[f"{here}/{path}" for path in table["path"]])


def probe_clip(path: Path) -> dict[str, Any]:
    """A file's probe and checksum, or its reason for quarantine."""
    try:
        return {**asdict(video.probe(path)), "checksum": storage.file_digest(path), "reason": "", "detail": ""}
    except video.ClipError as error:
        return {"reason": error.reason, "detail": error.detail}


def probe_all(root: Path, table: pd.DataFrame, workers: int, work: Path) -> list[dict[str, Any]]:
    """Probes of all rows in their order; pieces that an earlier run finished are read back."""
    probes: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers) as pool, tqdm(total=len(table), desc="clean", unit="clip") as bar:
        for paths in _pieces(table["path"].tolist()):
            stats = [_identity(root / path) for path in paths]
            key = hashlib.sha256(json.dumps([paths, stats]).encode()).hexdigest()[:24]
            kept = work / f"{key}.json"
            if kept.is_file():
                found = json.loads(kept.read_text())
            else:
                found = list(pool.map(probe_clip, [root / path for path in paths], chunksize=4))
                with storage.atomic_file(kept) as temporary:
                    temporary.write_text(json.dumps(found))
            probes += found
            bar.update(len(paths))
    return probes


def _pieces(paths: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(paths), PIECE):
        yield paths[start : start + PIECE]


def _identity(path: Path) -> list[int]:
    if not path.exists():
        return []
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def judge(table: pd.DataFrame, probes: list[dict[str, Any]], settings: Clean) -> pd.DataFrame:
    """The table with the probes' columns and a `reason`, empty for usable clips."""
    joined = pd.concat([table.reset_index(drop=True), pd.DataFrame(probes)], axis=1)
    joined[["reason", "detail"]] = joined[["reason", "detail"]].fillna("")
    usable = joined["reason"] == ""

    def mark(rows: pd.Series, reason: str, detail: str) -> None:
        chosen = rows.fillna(False).astype(bool) & (joined["reason"] == "")
        joined.loc[chosen, ["reason", "detail"]] = [reason, detail]

    flags = {name: joined.get(name, pd.Series(False, joined.index)) for name in ("has_audio", "silent", "still")}
    mark(usable & (flags["has_audio"] == False), "no audio" if settings.require_audio else "", "no sound track")  # noqa: E712
    if settings.drop_silent:
        mark(usable & (flags["silent"] == True), "silent", "loudest sample below -60 dBFS")  # noqa: E712
    if settings.drop_still:
        mark(usable & (flags["still"] == True), "still", "the picture never changes")  # noqa: E712
    _mark_duplicates(joined)
    return joined


def _mark_duplicates(joined: pd.DataFrame) -> None:
    """Of exact copies in several splits only test's stays, so that nothing is scored that was trained on."""
    if "checksum" not in joined:
        return
    rank = joined["split"].map({"test": 0, "val": 1, "train": 2})
    for checksum, rows in joined[joined["reason"] == ""].groupby("checksum"):
        if rows["split"].nunique() < 2:
            continue
        keep = rank[rows.index].min()
        for index in rows.index[rank[rows.index] > keep]:
            twin = rows.loc[rank[rows.index] == keep, "id"].iloc[0]
            joined.loc[index, ["reason", "detail"]] = ["duplicate", f"the same bytes as {twin} in another split"]
        del checksum


def carve_val(table: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """Move whole groups of train to val until each annotation has about `share` of its clips there."""
    if (table["split"] == "val").any() or share == 0:
        return table
    table = table.copy()
    train = table[table["split"] == "train"]
    rng = np.random.default_rng(seed)
    for _, rows in train.groupby("annotation", sort=True):
        groups = sorted(rows["group"].unique())
        rng.shuffle(groups)
        wanted, taken = round(len(rows) * share), 0
        for group in groups:
            members = table.index[(table["group"] == group) & (table["split"] == "train")]
            if taken + len(members) > wanted:
                continue
            table.loc[members, "split"] = "val"
            taken += len(members)
    return table


def write_quarantine(folder: Path, root: Path, dropped: pd.DataFrame, total: int, dataset: str) -> None:
    """quarantine.csv, and a page with a picture of each clip that still has one."""
    with storage.atomic_file(folder / "quarantine.csv") as temporary:
        dropped[QUARANTINE].to_csv(temporary, index=False)
    shown = [
        {**row, "picture": base64.b64encode(picture).decode() if picture else ""}
        for row in dropped.head(500).to_dict("records")
        for picture in [video.thumbnail(root / row["path"]) if (root / row["path"]).is_file() else None]
    ]
    counts = dropped["reason"].value_counts().sort_index().to_dict()
    page = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape()).get_template(
        "quarantine.html"
    )
    with storage.atomic_file(folder / "quarantine.html") as temporary:
        temporary.write_text(page.render(rows=shown, counts=counts, total=total, dropped=len(dropped), dataset=dataset))


def clean(dataset: str, settings: Clean) -> str:
    """Write data/<dataset>/clean; returns the closing line."""
    root = storage.DATA / dataset
    table = listed_clips(dataset)
    judged = judge(table, probe_all(root, table, settings.workers, storage.WORK / f"clean-{dataset}"), settings)
    dropped = judged[judged["reason"] != ""].sort_values("id", kind="stable")
    reports = Path(".duet/reports") / dataset
    write_quarantine(reports, root, dropped, len(judged), dataset)
    counts = ", ".join(f"{n} {reason}" for reason, n in dropped["reason"].value_counts().sort_index().items())
    if len(dropped) > settings.max_quarantine * len(judged):
        raise InputError(
            f"{dataset}: {len(dropped)} of {len(judged)} clips are unusable ({counts}), more than clean.{dataset}."
            f"max_quarantine = {settings.max_quarantine:g}; see {reports / 'quarantine.html'}"
        )
    usable = carve_val(judged[judged["reason"] == ""], settings.val_share, settings.seed)
    usable = usable.assign(has_video=True)
    whole = {
        "frames": int,
        "width": int,
        "height": int,
        "sample_rate": int,
        "has_audio": bool,
        "silent": bool,
        "still": bool,
    }
    with storage.atomic_folder(root / "clean") as folder:
        manifest.write(usable.astype(whole), folder / "manifest.parquet")
        for name in ("quarantine.csv", "quarantine.html"):
            (folder / name).write_bytes((reports / name).read_bytes())
    splits = ", ".join(f"{(usable['split'] == split).sum()} {split}" for split in manifest.SPLITS)
    return f"{dataset}: {len(usable)} clips usable ({splits}), {len(dropped)} in quarantine ({counts or 'none'})"


def main() -> None:
    """Clean one dataset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", help="an entry of params.yaml's download section")
    dataset = parser.parse_args().dataset
    settings = params.stage(Clean, "clean", dataset)
    root = storage.DATA / dataset
    with tracking.run(f"clean@{dataset}", asdict(settings), [root / "raw", root / "subset"]) as run:
        line = clean(dataset, settings)
        table = manifest.read(dataset)
        run.log({"clips": len(table), "hours": float(table["duration"].sum()) / 3600})
        run.artifact(root / "clean" / "quarantine.html")
    command.say(line)


if __name__ == "__main__":
    command.run(main)
