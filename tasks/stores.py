"""One decode pass per clip into the frame store and the audio store: `python -m tasks.stores DATASET`.

Work goes by shards. A finished shard survives a kill in `.duet/work` and is not made again; what is in a shard depends on the
manifest alone, so the bytes do not depend on the number of workers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from models.family import InputError
from models.transforms import LogMel
from tasks import command, params, storage, tracking
from tasks.data import audio, manifest, video
from tasks.data.audio_store import AudioStore, write_audio
from tasks.data.frame_store import INDEX, shard_name, write_frames


@dataclass(frozen=True)
class Stores:
    """Section `stores.<dataset>` of params.yaml."""

    num_frames: int  # per clip, from its first to its last frame at equal distances
    short_side: int  # pixels; 0 keeps the size
    quality: int  # of the JPEGs, 1 to 100
    sample_rate: int  # Hz, mono
    codec: audio.Codec
    shards: int
    workers: int
    max_quarantine: float  # share of clips that may fail before the stage does

    @property
    def preparation(self) -> video.Preparation:
        """What decides a stored clip's bytes."""
        return video.Preparation(self.num_frames, self.short_side, self.quality, self.sample_rate)


def build_shard(
    root: Path, clips: list[tuple[str, str]], number: int, settings: Stores, work: Path
) -> list[dict[str, Any]]:
    """Decode the (id, path) clips of one shard into its two files; returns their index rows. Skipped when done before."""
    done = work / shard_name("done", number, settings.shards, "json")
    if done.is_file():
        return json.loads(done.read_text())
    rows: list[dict[str, Any]] = []
    waves: list[tuple[str, np.ndarray]] = []

    def decoded() -> Iterator[tuple[str, int, int, list[bytes]]]:
        for clip, path in clips:
            row: dict[str, Any] = {"id": clip, "path": path, "shard": number, "reason": "", "detail": ""}
            try:
                stored = video.read_clip(root / path, settings.preparation)
            except video.ClipError as error:
                rows.append({**row, "reason": error.reason, "detail": error.detail})
                continue
            heard = stored.wave is not None and len(stored.wave) > 0
            position = sum(not other["reason"] for other in rows)
            size = {"num_frames": len(stored.jpegs), "width": stored.width, "height": stored.height}
            rows.append({**row, "row": position, **size, "has_audio": heard, "audio_row": len(waves) if heard else -1})
            if stored.wave is not None and heard:
                waves.append((clip, stored.wave))
            yield clip, stored.width, stored.height, stored.jpegs

    write_frames(work / shard_name("frames", number, settings.shards, "tsv"), decoded())
    target = work / shard_name("audio", number, settings.shards, "h5")
    write_audio(target, waves, settings.sample_rate, settings.codec)
    with storage.atomic_file(done) as temporary:
        temporary.write_text(json.dumps(rows))
    return rows


def build_shards(root: Path, table: pd.DataFrame, settings: Stores, work: Path) -> pd.DataFrame:
    """All shards over processes; the index rows in order of shard and row."""
    clips = list(zip(table["id"], table["path"], strict=True))
    parts = [clips[k :: settings.shards] for k in range(settings.shards)]
    results: dict[int, list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(settings.workers) as pool, tqdm(total=len(clips), desc="stores", unit="clip") as bar:
        jobs = {pool.submit(build_shard, root, part, k, settings, work): k for k, part in enumerate(parts)}
        try:
            for job in as_completed(jobs):
                results[jobs[job]] = job.result()
                bar.update(len(results[jobs[job]]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return pd.DataFrame([row for k in range(settings.shards) for row in results[k]])


def measure_sound(store: AudioStore, train: list[str]) -> dict[str, float]:
    """Mean and standard deviation of the train clips' log-mel (128 bins), over frames that hold sound."""
    total, squares, count, mels = 0.0, 0.0, 0, {}
    for clip in tqdm(train, desc="log-mel statistics", unit="clip"):
        wave, rate = store.read(clip)
        mel = mels.setdefault(rate, LogMel(rate, 128))
        values = mel(torch.from_numpy(wave)[None]).double()
        total, squares, count = total + float(values.sum()), squares + float((values**2).sum()), count + values.numel()
    if count == 0:
        return {"mel_mean": 0.0, "mel_std": 1.0}
    mean = total / count
    return {"mel_mean": round(mean, 6), "mel_std": round(max(squares / count - mean**2, 1e-12) ** 0.5, 6)}


def finish(root: Path, table: pd.DataFrame, index: pd.DataFrame, work: Path) -> dict[str, float]:
    """Move the shards to data/<dataset>/stores with their index, quarantine list and statistics."""
    good = index[index["reason"] == ""]
    kinds = {
        "shard": int,
        "row": int,
        "num_frames": int,
        "width": int,
        "height": int,
        "has_audio": bool,
        "audio_row": int,
    }
    with storage.atomic_folder(root / "stores") as folder:
        for path in sorted(work.glob("frames-*")) + sorted(work.glob("audio-*.h5")):
            shutil.copyfile(path, folder / path.name)
        good[["id", *kinds]].astype(kinds).to_parquet(folder / INDEX, index=False)
        failed = index[index["reason"] != ""].merge(table[["id", "split"]], on="id")
        failed[["id", "path", "split", "reason", "detail"]].to_csv(folder / "quarantine.csv", index=False)
        heard = good.loc[good["has_audio"], "id"]
        train = table.loc[(table["split"] == "train") & table["id"].isin(heard), "id"].tolist()
        stats = measure_sound(AudioStore(folder), train)
        stats |= {"clips": len(good), "without_sound": int(len(good) - len(heard)), "failed": len(failed)}
        (folder / "stats.json").write_text(json.dumps(stats, indent=1) + "\n")
    return stats


def stores(dataset: str, settings: Stores) -> dict[str, float]:
    """Write data/<dataset>/stores; returns the statistics."""
    root = storage.DATA / dataset
    table = manifest.read(dataset)
    if settings.shards < 1 or settings.num_frames < 1 or settings.workers < 1:
        raise InputError(f"params.yaml: stores.{dataset}: shards, num_frames and workers must be 1 or more")
    identity = [
        asdict(settings.preparation),
        settings.codec,
        settings.shards,
        table[["id", "path", "checksum"]].to_json(),
    ]
    work = storage.WORK / f"stores-{dataset}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}"
    with storage.locked(work):
        index = build_shards(root, table, settings, work)
        failed = index[index["reason"] != ""]
        if len(failed) > settings.max_quarantine * len(index):
            first = failed.iloc[0]
            raise InputError(
                f"{dataset}: {len(failed)} of {len(index)} clips cannot be decoded, more than stores.{dataset}.max_quarantine"
                f" = {settings.max_quarantine:g}; the first is {first['path']} ({first['reason']}: {first['detail']})"
            )
        stats = finish(root, table, index, work)
    shutil.rmtree(work)
    return stats


def main() -> None:
    """Build the stores of one dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="an entry of params.yaml's download section")
    dataset = parser.parse_args().dataset
    settings = params.stage(Stores, "stores", dataset)
    root = storage.DATA / dataset
    with tracking.run(f"stores@{dataset}", asdict(settings), [root / "raw", root / "subset", root / "clean"]) as run:
        stats = stores(dataset, settings)
        run.log(stats)
    command.say(
        f"{dataset}: {stats['clips']} clips stored, {stats['without_sound']} without sound, {stats['failed']} failed; "
        f"log-mel mean {stats['mel_mean']:.3f}, deviation {stats['mel_std']:.3f}"
    )


if __name__ == "__main__":
    command.run(main)
