"""One decode pass per clip into the frame store and the audio store: `python -m tasks.stores DATASET`.

Work goes by shards. A finished shard survives a kill in `.duet/work` and is not made again; what is in a shard depends
on the manifest alone, so the bytes do not depend on the number of workers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from models.family import InputError
from models.transforms import LogMel
from tasks import command, params, quarantine, storage, tracking
from tasks.data import (
    archive_rows,
    audio,
    clip_files,
    cluster,
    index,
    manifest,
    picture_folder,
    prepared,
    sound_files,
    video,
    workers,
)
from tasks.data.audio_store import audio_writer
from tasks.data.frame_store import shard_name, write_frames

MEL_BINS = 128  # of the statistics, as every family hears
MINUTE = 6000  # mel frames of a long video that are there at once
READERS = {clip_files.PICTURE: picture_folder, clip_files.ROW: archive_rows}  # by the ending of a clip's path
LISTED = ["id", "split", "path", "duration", "has_video", "annotation"]  # of the manifest, in the index
KINDS = {
    "shard": int, "row": int, "num_frames": int, "width": int, "height": int, "has_audio": bool, "audio_row": int,
}  # fmt: skip
MEL = ("mel_sum", "mel_squares", "mel_count")  # of each clip's log-mel, as `sums` gives them
STEP = {"step": float}  # seconds from one stored frame to the next; in the index where frame_step chose them


@dataclass(frozen=True)
class Stores:
    """Section `stores.<dataset>` of params.yaml."""

    num_frames: int  # per clip, from its first to its last frame at equal distances; 0 = by frame_step
    frame_step: int  # every such frame of a video, however long it is; 0 = by num_frames
    short_side: int  # pixels; 0 keeps the size
    quality: int  # of the JPEGs, 1 to 100
    sample_rate: int  # Hz, mono
    codec: audio.Codec
    shards: int
    workers: int
    scheduler: str  # processes | dask | address of a Dask scheduler: who the workers are; the bytes are the same
    max_quarantine: float  # share of clips that may fail before the stage does

    @property
    def preparation(self) -> video.Preparation:
        """What decides a stored clip's bytes."""
        return video.Preparation(self.num_frames, self.short_side, self.quality, self.sample_rate, self.frame_step)


def build_shard(
    root: Path, clips: list[dict[str, Any]], number: int, settings: Stores, work: Path
) -> list[dict[str, Any]]:
    """Decode the manifest rows of one shard into its two files; their index rows. A shard that is there is read back."""
    torch.set_num_threads(1)  # one process a core already
    frames = work / "stores" / shard_name("frames", number, settings.shards, "tsv")
    sounds = work / "stores" / shard_name("audio", number, settings.shards, "h5")
    done = work / shard_name("done", number, settings.shards, "json")
    if done.is_file() and frames.is_file() and sounds.is_file():
        for _ in clips:
            workers.advance()
        return json.loads(done.read_text())
    rows: list[dict[str, Any]] = []
    with audio_writer(sounds, settings.sample_rate, settings.codec) as add_sound:
        write_frames(frames, _decoded(root, clips, number, settings, rows, add_sound))
    with storage.atomic_file(done) as temporary:
        temporary.write_text(json.dumps(rows))
    return rows


def _decoded(
    root: Path,
    clips: list[dict[str, Any]],
    number: int,
    settings: Stores,
    rows: list[dict[str, Any]],
    add_sound: Callable[[str, np.ndarray], int],
) -> Iterator[tuple[str, int, int, list[bytes]]]:
    """Rows of the frame store one by one; the sound goes to its store, what the index says of each clip into `rows`."""
    mel = LogMel(settings.sample_rate, MEL_BINS)
    position = 0
    for clip in clips:
        row: dict[str, Any] = {name: clip[name] for name in ("id", "path", "split")} | {"reason": "", "detail": ""}
        rows.append(row)
        try:
            reader = READERS.get(Path(clip["path"]).suffix, video)
            stored = reader.read_clip(root / clip["path"], settings.preparation)
            if (stored.wave is not None) != clip["has_audio"]:
                raise video.ClipError("changed", "the file is not the one that was cleaned; run the clean stage again")
        except video.ClipError as error:
            row |= {"reason": error.reason, "detail": error.detail}
        else:
            row |= {"shard": number, "row": position, "num_frames": len(stored.jpegs)}
            row |= {"width": stored.width, "height": stored.height, "has_audio": clip["has_audio"], "audio_row": -1}
            if settings.frame_step:
                row["step"] = settings.frame_step / stored.fps
            if stored.wave is not None:
                row |= {"audio_row": add_sound(clip["id"], stored.wave), "mel": mel_sums(stored.wave, mel)}
            yield clip["id"], stored.width, stored.height, stored.jpegs
            position += 1
        workers.advance()


def link_shard(
    root: Path, clips: list[dict[str, Any]], number: int, settings: Stores, work: Path
) -> list[dict[str, Any]]:
    """Of prepared clips the two files themselves go into the stores, by hard link; their index rows."""
    rows: list[dict[str, Any]] = []
    for position, clip in enumerate(clips):
        row: dict[str, Any] = {name: clip[name] for name in ("id", "path", "split")} | {"reason": "", "detail": ""}
        files = clip_files.files_of(root / clip["path"])
        try:
            shape, mel = prepared.open_pictures(files[0]).shape, prepared.open_sound(files[1])
        except video.ClipError as error:
            row |= {"reason": error.reason, "detail": error.detail}
        else:
            for file, kind in zip(files, (clip_files.PICTURES, clip_files.SOUNDS), strict=True):
                storage.link_or_copy(file, work / "stores" / kind / f"{clip['id']}{file.suffix}")
            row |= {"shard": number, "row": position, "num_frames": shape[1], "width": shape[3], "height": shape[2]}
            row |= {"has_audio": True, "audio_row": position, "mel": sums(torch.from_numpy(np.array(mel)))}
        rows.append(row)
        workers.advance()
    return rows


def note_shard(
    root: Path, clips: list[dict[str, Any]], number: int, settings: Stores, work: Path
) -> list[dict[str, Any]]:
    """Of clips that are features alone there is nothing to store: their index rows."""
    rows: list[dict[str, Any]] = []
    for position, clip in enumerate(clips):
        row = {name: clip[name] for name in ("id", "path", "split")} | {"reason": "", "detail": ""}
        row |= {"shard": number, "row": position, "num_frames": clip["frames"], "width": 0, "height": 0}
        rows.append(row | {"has_audio": False, "audio_row": -1})
        workers.advance()
    return rows


def shard_table(
    build: Callable[..., list[dict[str, Any]]],
    root: Path,
    clips: pd.DataFrame,
    number: int,
    settings: Stores,
    work: Path,
) -> pd.DataFrame:
    """What `build` says of a shard, by the clips' places in the manifest; all shards as rows would be objects by the million."""
    rows = build(root, clips.to_dict("records"), number, settings, work)
    for row in rows:
        row |= dict(zip(MEL, row.pop("mel", ()), strict=False))
    return pd.DataFrame(rows, columns=[*quarantine.COLUMNS, *KINDS, *STEP, *MEL], index=clips.index)


BUILDERS = {clip_files.SUFFIX: link_shard, clip_files.FEATURES: note_shard}  # by the ending of a clip's path


def mel_sums(wave: np.ndarray, mel: LogMel) -> tuple[float, float, int]:
    """`sums` of the log-mel of (N,) int16."""
    parts = [(0.0, 0.0, 0)]
    for first in range(0, mel.num_frames(len(wave)), MINUTE):
        part = wave[first * mel.shift : (first + MINUTE - 1) * mel.shift + mel.length].astype(np.float32)
        parts.append(sums(mel(torch.from_numpy(part / audio.FULL_SCALE)[None])))
    total, squares, count = zip(*parts, strict=True)
    return sum(total), sum(squares), sum(count)


def sums(values: torch.Tensor) -> tuple[float, float, int]:
    """Sum, sum of squares and number."""
    values = values.double()
    return float(values.sum()), float(values.square().sum()), values.numel()


def statistics(table: pd.DataFrame, rows: pd.DataFrame, folder: Path) -> dict[str, float]:
    """Log-mel mean and deviation over the train clips' frames, and what the stores hold. Sums do not depend on order."""
    good = rows["reason"] == ""
    heard = good & rows["has_audio"].eq(True)
    train = heard & (rows["split"] == "train")
    total, squares, count = (math.fsum(rows.loc[train, name]) for name in MEL) if train.any() else (0.0, 1.0, 1.0)
    num_good, num_heard = int(good.sum()), int(heard.sum())
    mean = total / max(count, 1)
    return {
        "mel_mean": round(mean, 6),
        "mel_std": round(max(squares / max(count, 1) - mean**2, 1e-12) ** 0.5, 6),
        "clips": num_good,
        "seconds": round(float(table.loc[~table["id"].isin(rows.loc[~good, "id"]), "duration"].sum()), 3),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "without_sound": num_good - num_heard,
        "share_without_sound": round(1 - num_heard / max(num_good, 1), 6),
        "failed": len(rows) - num_good,
    }


def finish(table: pd.DataFrame, rows: pd.DataFrame, folder: Path, digest: str) -> dict[str, float]:
    """Write index, quarantine list and statistics beside the shards in `folder`; returns the statistics.

    The index repeats what a loader asks of the manifest, whose `table` and `digest` these are.
    """
    good = rows["reason"] == ""
    stats = statistics(table, rows, folder)
    kinds = KINDS | (STEP if rows["step"].notna().any() else {})
    stored = rows.loc[good, list(kinds)].astype(kinds).sort_index()
    listed = table[LISTED] if good.all() else table.loc[stored.index, LISTED]
    index.write(listed.join(stored), folder, digest)
    quarantine.write_list(rows[~good], folder / "quarantine.csv")
    (folder / "stats.json").write_text(json.dumps(stats, indent=1) + "\n")
    return stats


def stores(dataset: str, settings: Stores) -> dict[str, float]:
    """Write data/<dataset>/stores; returns the statistics."""
    root, name = storage.DATA / dataset, f"stores.{dataset}"
    table = manifest.read_clean(dataset, [*LISTED, "frames", "has_audio"])
    if min(settings.shards, settings.workers, settings.sample_rate) < 1:
        raise InputError(f"params.yaml: {name}: shards, workers and sample_rate must be 1 or more")
    if min(settings.num_frames, settings.frame_step) != 0 or max(settings.num_frames, settings.frame_step) < 1:
        raise InputError(f"params.yaml: {name}: one of num_frames and frame_step must be 1 or more, the other 0")
    if not 1 <= settings.quality <= 100 or settings.short_side < 0:
        raise InputError(f"params.yaml: {name}: quality goes from 1 to 100, short_side is 0 or more pixels")
    code = [
        storage.file_digest(Path(str(module.__file__)))
        for module in (video, audio, sound_files, clip_files, prepared, picture_folder, archive_rows)
    ]
    listed = manifest.digest(dataset)
    identity = [asdict(settings.preparation), settings.codec, settings.shards, listed, code]
    work = storage.WORK / f"stores-{dataset}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}"
    with storage.locked(work):
        is_here = settings.scheduler == "processes"
        (work / "stores").mkdir(exist_ok=True)
        # Workers of Dask may have another working directory.
        source, target = (root, work) if is_here else (root.resolve(), work.resolve())
        build = BUILDERS.get(Path(table["path"].iloc[0]).suffix, build_shard)
        clips = table.drop(columns="annotation")
        jobs = [(build, source, clips.iloc[k :: settings.shards], k, settings, target) for k in range(settings.shards)]
        if is_here:
            results = workers.work(shard_table, jobs, settings.workers, len(table), "stores")
        else:
            results = cluster.work(shard_table, jobs, settings.workers, settings.scheduler, "stores")
            storage.remove_unfinished(work)  # of workers that died
        rows = pd.concat(results)
        del jobs, results  # which are as large as the tables that they came from and went into
        failed = rows[rows["reason"] != ""]
        quarantine.check_share(failed, len(rows), settings.max_quarantine, name)
        stats = finish(table, rows, work / "stores", listed)
        storage.install_folder(work / "stores", root / "stores")
        shutil.rmtree(work)
    return stats


def main() -> None:
    """Build the stores of one dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="an entry of params.yaml's download section")
    dataset = parser.parse_args().dataset
    settings = params.stage(Stores, "stores", dataset)
    root, stage = storage.DATA / dataset, f"stores@{dataset}"
    inputs = [root / "raw", root / "subset", root / "clean"]
    with storage.alone(stage), tracking.run(stage, asdict(settings), inputs) as run:
        stats = stores(dataset, settings)
        run.log(stats)
    command.say(
        f"{dataset}: {stats['clips']} clips stored, {stats['without_sound']} without sound, {stats['failed']} failed; "
        f"{stats['bytes'] / 1e6:.1f} MB; log-mel mean {stats['mel_mean']:.3f}, deviation {stats['mel_std']:.3f}"
    )


if __name__ == "__main__":
    command.run(main)
