"""The stores stage on real files: what is written, and that no interruption changes it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from distributed import LocalCluster

from models.family import InputError
from models.transforms import LogMel
from tasks import storage, stores
from tasks.data import manifest, video
from tasks.data.audio_store import AudioStore
from tasks.data.frame_store import FrameStore
from tasks.stores import Stores

ROOT = Path(__file__).parents[2]
SETTINGS = Stores(4, 0, 32, 90, 16000, "pcm16", 3, 2, "processes", 0.05)
BUILD_SHARD = stores.build_shard
CLIPS = ["long_gop", "short_gop", "open_gop", "uneven", "mute", "edit_list", "upright", "still"]


@pytest.fixture(scope="module")
def cleaned(media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with raw files of the dataset "sounds" and their manifest."""
    project = tmp_path_factory.mktemp("project")
    rows = []
    for k, name in enumerate(CLIPS):
        path = project / "data/sounds/raw/video" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(media / path.name, path)
        facts = asdict(video.probe(path)) | {"checksum": storage.file_digest(path), "annotation": "{}", "start": 0.0}
        split = "test" if k in (1, 4) else "train"
        rows.append(
            facts | {"id": name, "path": f"raw/video/{name}.mp4", "split": split, "group": name, "has_video": True}
        )
    manifest.write(pd.DataFrame(rows), project / "data/sounds/clean/manifest.parquet")
    return project


@pytest.fixture
def project(cleaned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    shutil.copytree(cleaned, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(prelude: str = "", **popen: object) -> subprocess.Popen[str]:
    """The stage in a process of its own, as the command runs it; `prelude` comes before."""
    code = (
        f"from tasks import command, stores\n{prelude}\n"
        f"command.run(lambda: print(stores.stores('sounds', stores.Stores(**{asdict(SETTINGS)}))))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=pipe, stderr=pipe, text=True, **popen)  # type: ignore


def test_stored_clips_are_the_decoded_ones(project: Path) -> None:
    stats = stores.stores("sounds", SETTINGS)
    folder = project / "data/sounds/stores"
    frames, sounds = FrameStore(folder), AudioStore(folder)
    assert set(frames.ids) == set(CLIPS) and len(sounds) == 5
    for name in CLIPS:
        clip = video.read_clip(project / f"data/sounds/raw/video/{name}.mp4", SETTINGS.preparation)
        assert frames.read(name, [3, 0]) == [clip.jpegs[3], clip.jpegs[0]]
        if clip.wave is not None:
            wave, rate = sounds.read(name)
            assert rate == 16000 and np.array_equal(np.round(wave * 32768), clip.wave)
    assert (stats["clips"], stats["without_sound"], stats["failed"]) == (8, 3, 0)
    assert stats["share_without_sound"] == 0.375
    assert stats["seconds"] == pytest.approx(manifest.read("sounds")["duration"].sum(), abs=1e-3)
    names = [path.name for path in folder.iterdir()]
    assert sorted(names) == sorted(
        [f"frames-0000{k}-of-00003.{ending}" for k in range(3) for ending in ("tsv", "lineidx", "lineidx.8b")]
        + [f"audio-0000{k}-of-00003.h5" for k in range(3)]
        + ["index.arrow", "quarantine.csv", "stats.json"]
    )
    assert not list((project / ".duet/work").iterdir())


def test_statistics_are_those_of_train_alone(project: Path) -> None:
    stats = stores.stores("sounds", SETTINGS)
    assert stats == json.loads((project / "data/sounds/stores/stats.json").read_text())
    sounds, mel = AudioStore(project / "data/sounds/stores"), LogMel(16000, 128)
    train = [name for name in CLIPS if name in sounds and name not in ("short_gop", "mute")]
    values = torch.cat([mel(torch.from_numpy(sounds.read(name)[0])[None]).flatten() for name in train]).double()
    assert stats["mel_mean"] == pytest.approx(values.mean().item(), abs=1e-5)
    assert stats["mel_std"] == pytest.approx(values.std(correction=0).item(), abs=1e-5)


@pytest.mark.parametrize("codec", ["pcm16", "flac", "mp3"])
def test_same_bytes_whatever_the_number_of_workers(project: Path, codec: str) -> None:
    digests = set()
    for workers in (1, 2):
        stores.stores("sounds", replace(SETTINGS, workers=workers, codec=codec, num_frames=2))  # type: ignore
        digests.add(storage.folder_digest(project / "data/sounds/stores"))
    assert len(digests) == 1


def die_once(
    root: Path, clips: list[dict[str, Any]], number: int, settings: Stores, work: Path
) -> list[dict[str, Any]]:
    """Build a shard; the first worker at the second one is killed with half of it written."""
    if number == 1 and not (work / "died").exists():
        (work / "died").touch()
        read = iter([video.read_clip, lambda *_: os.kill(os.getpid(), signal.SIGKILL)])
        video.read_clip = lambda *arguments: next(read)(*arguments)
    return BUILD_SHARD(root, clips, number, settings, work)


@pytest.mark.slow
def test_dask_makes_the_same_bytes_also_when_a_worker_is_killed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores.stores("sounds", SETTINGS)
    expected = storage.folder_digest(project / "data/sounds/stores")
    names = {path.name for path in (project / "data/sounds/stores").iterdir()}
    monkeypatch.setattr(stores, "build_shard", die_once)
    removed: list[Path] = []
    remove = storage.remove_unfinished
    monkeypatch.setattr(
        storage, "remove_unfinished", lambda folder: (removed.extend(folder.rglob(".*.tmp")), remove(folder))
    )
    stores.stores("sounds", replace(SETTINGS, scheduler="dask"))
    assert any(path.name.startswith(".frames-00001") for path in removed)  # it did die half way
    assert storage.folder_digest(project / "data/sounds/stores") == expected
    assert {path.name for path in (project / "data/sounds/stores").iterdir()} == names


@pytest.mark.slow
def test_a_dask_scheduler_by_its_address(project: Path) -> None:
    stores.stores("sounds", SETTINGS)
    expected = storage.folder_digest(project / "data/sounds/stores")
    with LocalCluster(1, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as elsewhere:
        stores.stores("sounds", replace(SETTINGS, scheduler=elsewhere.scheduler_address))
    assert storage.folder_digest(project / "data/sounds/stores") == expected
    with pytest.raises(InputError, match="no Dask scheduler at nowhere"):
        stores.stores("sounds", replace(SETTINGS, scheduler="nowhere"))


def test_killed_in_the_middle_and_run_again(project: Path) -> None:
    stores.stores("sounds", SETTINGS)
    expected = storage.folder_digest(project / "data/sounds/stores")
    shutil.rmtree(project / "data/sounds/stores")
    # One worker, slow from the second shard on, so that the kill comes between shards and in the middle of one.
    slow = (
        "import time\nfrom tasks.data import video\nread = video.read_clip\ncount = [0]\nkept = stores.workers.work\n"
        "def read_slowly(*arguments):\n    count[0] += 1\n    time.sleep(60 if count[0] == 5 else 0)\n"
        "    return read(*arguments)\n"
        "video.read_clip = read_slowly\n"
        "stores.workers.work = lambda function, jobs, workers, *rest: kept(function, jobs, 1, *rest)\n"
    )
    run = start(slow)
    done = lambda: list((project / ".duet/work").glob("stores-sounds-*/done-*.json"))  # noqa: E731
    halfway = lambda: list((project / ".duet/work").glob("stores-sounds-*/stores/.frames-00001*.tmp"))  # noqa: E731
    wait_until(lambda: bool(done() and halfway()))
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert not (project / "data/sounds/stores").exists()
    finished = done()
    shard = finished[0].parent / "stores" / "frames-00000-of-00003.tsv"
    inode = shard.stat().st_ino
    wait_until(lambda: not held(finished[0].parent))
    stores.stores("sounds", SETTINGS)
    assert storage.folder_digest(project / "data/sounds/stores") == expected
    assert (project / "data/sounds/stores" / shard.name).stat().st_ino == inode  # moved, not made again
    assert not [path for path in (project / "data/sounds/stores").iterdir() if path.name.startswith(".")]


def test_clips_that_fail_here(project: Path, media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copyfile(media / "damaged.mp4", project / "data/sounds/raw/video/uneven.mp4")
    shutil.copyfile(media / "short_gop.mp4", project / "data/sounds/raw/video/mute.mp4")
    with pytest.raises(InputError) as caught:
        stores.stores("sounds", SETTINGS)
    assert "2 of 8 clips are unusable (1 changed, 1 damaged), more than stores.sounds.max_quarantine = 0.05" in str(
        caught.value
    )
    assert "uneven.mp4: damaged" in capsys.readouterr().out
    assert len(pd.read_csv(project / ".duet/reports/sounds/stores-quarantine.csv")) == 2
    assert not (project / "data/sounds/stores").exists()
    stats = stores.stores("sounds", replace(SETTINGS, max_quarantine=0.5))
    assert (stats["clips"], stats["failed"]) == (6, 2)
    lost = pd.read_csv(project / "data/sounds/stores/quarantine.csv")
    assert lost["id"].tolist() == ["mute", "uneven"] and lost["split"].tolist() == ["test", "train"]
    frames = FrameStore(project / "data/sounds/stores")
    assert set(frames.ids) == set(manifest.read("sounds")["id"]) == set(CLIPS) - {"mute", "uneven"}
    assert all(len(frames.read(name, range(4))) == 4 for name in frames.ids)


@pytest.mark.parametrize("wrong", [{"shards": 0}, {"quality": 101}, {"short_side": -1}, {"sample_rate": 0}])
def test_values_that_cannot_work(project: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"params.yaml: stores.sounds"):
        stores.stores("sounds", replace(SETTINGS, **wrong))  # type: ignore


def held(folder: Path) -> bool:
    try:
        with storage.locked(folder):
            return False
    except InputError:
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
