"""Probe every file of a dataset: `python -m tasks.clean DATASET`. The manifest lists usable clips, quarantine the others."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models.family import InputError
from tasks import annotations, command, params, quarantine, storage, tracking
from tasks.data import (
    archive_rows,
    audio,
    clip_files,
    feature_files,
    manifest,
    picture_folder,
    prepared,
    sound_files,
    video,
    workers,
)
from tasks.datasets import class_names, load_format

PIECE = 32  # clips whose probes are kept together, so that a killed run goes on from there
KINDS = {
    "frames": int, "width": int, "height": int, "sample_rate": int, "has_audio": bool, "silent": bool, "still": bool,
}  # fmt: skip


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
    table = load_format(params.value("download", dataset, "format")).read(folder).reset_index(drop=True)
    if table.empty:
        raise InputError(f"{folder}: the annotations list no clip")
    here = "subset" if any(clip_files.is_there(folder / path) for path in table["path"]) else "raw"
    return table.assign(path=[f"{here}/{path}" for path in table["path"]])


PROBES = {
    clip_files.SUFFIX: prepared, clip_files.PICTURE: picture_folder, clip_files.FEATURES: feature_files,
    clip_files.ROW: archive_rows,
}  # fmt: skip


def probe_clip(path: Path) -> dict[str, Any]:
    """A file's probe and checksum, or its reason for quarantine."""
    try:
        probe = PROBES.get(path.suffix, video).probe(path)
        checksum = (archive_rows if clip_files.is_row(path) else clip_files).checksum(path)
        return {**asdict(probe), "checksum": checksum, "reason": "", "detail": ""}
    except video.ClipError as error:
        return {"reason": error.reason, "detail": error.detail}


def probe_piece(paths: list[Path], kept: Path) -> list[dict[str, Any]]:
    """Probes of some files, read back from `kept` where an earlier run left them."""
    if kept.is_file():
        for _ in paths:
            workers.advance()
        return json.loads(kept.read_text())
    found = []
    for path in paths:
        found.append(probe_clip(path))
        workers.advance()
    with storage.atomic_file(kept) as temporary:
        temporary.write_text(json.dumps(found))
    return found


def probe_all(root: Path, table: pd.DataFrame, num_workers: int, work: Path) -> pd.DataFrame:
    """Probes of all rows in their order."""
    paths = [root / path for path in table["path"]]
    jobs = [(paths[k : k + PIECE], work / f"piece-{k // PIECE:06d}.json") for k in range(0, len(paths), PIECE)]
    parts = workers.work(probe_piece, jobs, num_workers, len(paths), "clean")
    columns = [*video.Probe.__dataclass_fields__, "checksum", "reason", "detail"]
    return pd.DataFrame([row for part in parts for row in part], columns=columns)


def work_folder(dataset: str, table: pd.DataFrame) -> Path:
    """Where the probes of these very files, by this very code, are kept until the stage is done."""
    paths = [storage.DATA / dataset / path for path in table["path"]]
    state = [[str(path), *(_identity(file) for file in clip_files.files_of(path))] for path in paths]
    modules = (video, audio, sound_files, clip_files, *PROBES.values())
    code = [storage.file_digest(Path(str(module.__file__))) for module in modules]
    digest = hashlib.sha256(json.dumps([state, code]).encode()).hexdigest()[:16]
    return storage.WORK / f"clean-{dataset}-{digest}"


def _identity(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def judge(table: pd.DataFrame, settings: Clean) -> pd.DataFrame:
    """The probed table with a reason where the params or a copy in another split make a clip unusable."""
    table = table.copy()
    checks = [
        ("has_audio", False, settings.require_audio, "no audio", "there is no sound track, or nothing on it"),
        ("silent", True, settings.drop_silent, "silent", "the sound is below -60 dB of full scale"),
        ("still", True, settings.drop_still, "still", "the picture never changes"),
    ]
    for column, bad, asked, reason, detail in checks:
        if asked:
            table.loc[(table["reason"] == "") & (table[column] == bad), ["reason", "detail"]] = [reason, detail]
    usable = table.loc[table["reason"] == "", ["id", "split", "checksum"]]
    # Test's stays, so that nothing is scored that was trained on.
    kept = usable.sort_values("split", key=rank_of, kind="stable").drop_duplicates("checksum").set_index("checksum")
    clip, split = (usable["checksum"].map(kept[name]) for name in ("id", "split"))
    others = usable.index[rank_of(usable["split"]) > rank_of(split)]
    table.loc[others, "reason"] = "duplicate"
    told = zip(clip[others], split[others], strict=True)
    table.loc[others, "detail"] = [f"the same bytes as {name} in {place}" for name, place in told]
    return table


def rank_of(splits: pd.Series) -> pd.Series:
    """Which split keeps a clip that stands in several: test before val before train."""
    return splits.map({"test": 0, "val": 1, "train": 2}).astype(int)  # of no clip too


def carve_val(table: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """Move about `share` of the usable train clips to val, whole groups, each annotation's share within one group.

    Groups stand in a row, by annotation and within it at random; along it, as many clips are taken as their share says.
    Annotations that hardly ever repeat, such as captions, do not count.
    """
    if (table["split"] == "val").any() or share == 0:
        return table
    train = table[(table["split"] == "train") & (table["reason"] == "")]
    groups = train.groupby("group", sort=True).agg(stratum=("annotation", "first"), clips=("id", "size"))
    if groups["stratum"].nunique() * 2 > len(groups):
        groups["stratum"] = ""
    order = np.random.default_rng(seed).permutation(len(groups))
    groups = groups.iloc[order].sort_values("stratum", kind="stable")
    chosen, passed, taken = [], 0, 0
    for group, size in groups["clips"].items():
        passed += size
        if passed * share - taken >= size / 2:
            chosen.append(group)
            taken += size
    to_val = (table["split"] == "train") & table["group"].isin(chosen)
    return table.assign(split=table["split"].mask(to_val, "val"))


def clean(dataset: str, settings: Clean) -> str:
    """Write data/<dataset>/clean; returns the closing line."""
    root, section = storage.DATA / dataset, f"clean.{dataset}"
    if not 0 <= settings.val_share < 1 or settings.workers < 1:
        raise InputError(f"params.yaml: {section}: val_share goes from 0 to below 1, workers from 1")
    listed = listed_clips(dataset)
    work = work_folder(dataset, listed)
    with storage.locked(work):
        probed = pd.concat([listed, probe_all(root, listed, settings.workers, work)], axis=1)
        table = judge(carve_val(probed, settings.val_share, settings.seed), settings)
        dropped, usable = table[table["reason"] != ""], table[table["reason"] == ""]
        page = quarantine.REPORTS / dataset / "quarantine.html"
        quarantine.write_page(dropped, len(table), dataset, page)
        quarantine.check_share(dropped, len(table), settings.max_quarantine, section)
        form = load_format(params.value("download", dataset, "format"))
        pages = [page, annotations.review(form, table, root / "raw", dataset)]
        with storage.atomic_folder(root / "clean") as folder:
            has_video = ~usable["path"].map(clip_files.is_features).astype(bool)
            manifest.write(usable.assign(has_video=has_video).astype(KINDS), folder / "manifest.parquet")
            quarantine.write_list(dropped, folder / "quarantine.csv")
            if names := class_names(form, root / "subset"):
                (folder / manifest.CLASSES).write_text(json.dumps(names, ensure_ascii=False, indent=0) + "\n")
            for path in filter(None, pages):
                shutil.copyfile(path, folder / path.name)
        shutil.rmtree(work)
    splits = ", ".join(f"{(usable['split'] == split).sum()} {split}" for split in manifest.SPLITS)
    reasons = f": {quarantine.count_reasons(dropped)}; see {root / 'clean' / page.name}" if len(dropped) else ""
    return f"{dataset}: {len(usable)} clips usable ({splits}), {len(dropped)} in quarantine{reasons}"


def main() -> None:
    """Clean one dataset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", help="an entry of params.yaml's download section")
    dataset = parser.parse_args().dataset
    settings = params.stage(Clean, "clean", dataset)
    root, stage = storage.DATA / dataset, f"clean@{dataset}"
    with storage.alone(stage), tracking.run(stage, asdict(settings), [root / "raw", root / "subset"]) as run:
        line = clean(dataset, settings)
        table = manifest.read_clean(dataset)
        run.log({"clips": len(table), "hours": float(table["duration"].sum()) / 3600})
        for page in sorted((root / "clean").glob("*.html")):
            run.artifact(page)
    command.say(line)


if __name__ == "__main__":
    command.run(main)
