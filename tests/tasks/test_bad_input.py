"""What people and machines do to a run: each ends in one line that says what to do, or in a row of the quarantine list.

The commands are the real ones on real files. Whatever goes wrong, what earlier runs made stays as it is and nothing
half-written is left; once the cause is gone, the same command makes the same bytes as if nothing had happened.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import pytest

from tasks.checkout import edit_params
from tests.tasks.stage_process import Command, Outcome, contents, run, start, stop_at

ROOT = Path(__file__).parents[2]
CSV = "".join(
    f"{label[0]}{k},1,{label},{'test' if k == 3 else 'train'}\n" for label in ("dog", "rain") for k in range(4)
)
SMALL = {
    "download.sounds": {
        "source": "source", "format": "vggsound", "sha256": None, "endpoint": None, "demo": None, "youtube": None,
    },
    "subset.sounds": {"mode": "counts", "num_classes": 2, "num_train": 9, "num_test": 9, "media": "none", "seed": 1},
    "clean.sounds.workers": 1,
    "clean.sounds.val_share": 0.34,
    "stores.sounds.num_frames": 2,
    "stores.sounds.short_side": 16,
    "stores.sounds.shards": 8,
    "stores.sounds.workers": 1,
    "train.num_workers": 0,
    "train.checkpoint_interval": 1,
    "t3av.model": {
        "vit_model_name": "none", "dim": 16, "encoder_layers": 1, "encoder_heads": 2, "num_frames": 2,
        "frame_size": 16, "patch_size": 8, "audio_patch_size": 8, "tubelet": 1, "sample_rate": 16000,
        "audio_duration": 0.5, "num_mel_bins": 16, "bb_layers": 1, "bb_heads": 2,
    },
    "t3av.pretrain.epochs": 2,
    "t3av.pretrain.batch_size": 2,
    "t3av.contrastive.epochs": 1,
    "t3av.contrastive.batch_size": 2,
}  # fmt: skip
COMMANDS = [
    ("download", "sounds"),
    ("subset", "sounds"),
    ("clean", "sounds"),
    ("stores", "sounds"),
    ("train", "t3av", "pretrain"),
    ("train", "t3av", "contrastive"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, write_clip: Callable[..., Path]) -> Path:
    """A project whose stages have all run, up to the phase contrastive; the first clip of all has no sound."""
    project = tmp_path_factory.mktemp("finished") / "project"
    for k, line in enumerate(CSV.splitlines()):
        ytid = line.partition(",")[0]
        write_clip(project / f"source/video/{ytid}_000001.mp4", 300 + 50 * k, sound=ytid != "d3")
    (project / "source/vggsound.csv").write_text(CSV)
    shutil.copy(ROOT / "params.yaml", project)
    edit_params(project / "params.yaml", SMALL, {})
    for command in COMMANDS:
        outcome = run(project, *command)
        assert (outcome.code, outcome.errors) == (0, []), outcome
    return project


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "project"))


def refused(project: Path, *command: str, prepare: Callable[[], object] | None = None) -> str:
    """The one line with which the command ends; what was there before is there still, and nothing else."""
    before = contents(project)
    outcome = run(project, *command, prepare=prepare)
    check_refused(outcome)
    assert contents(project) == before
    assert not [path for path in project.rglob(".*") if path.suffix in (".tmp", ".part", ".old")]
    return outcome.errors[0]


def check_refused(outcome: Outcome) -> None:
    assert outcome.code == 1 and len(outcome.errors) == 1, outcome
    assert re.match(r"error: .+; .+", outcome.errors[0]), "it says what is wrong; and what to do"


def assert_goes_through(project: Path, finished: Path, *command: str) -> None:
    """The command succeeds now, and the project is what it would be had nothing happened."""
    outcome = run(project, *command)
    assert (outcome.code, outcome.errors) == (0, []), outcome
    assert contents(project) == contents(finished)


# --- annotations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "folder"), [("download", "source"), ("subset", "data/sounds/raw"), ("clean", "data/sounds/subset")]
)
def test_missing_csv(project: Path, finished: Path, stage: str, folder: str) -> None:
    (project / folder / "vggsound.csv").unlink()
    line = refused(project, stage, "sounds")
    assert line.startswith(f"error: {folder}/vggsound.csv not found, nor train.csv and test.csv beside it; ")
    (project / folder / "vggsound.csv").write_bytes((finished / folder / "vggsound.csv").read_bytes())
    assert_goes_through(project, finished, stage, "sounds")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("ytid,start,label,split\n" + CSV, "vggsound.csv starts with a header (ytid, start, label, split); "),
        (CSV.replace("d2,1,dog,", "d2,1,dog, big,"), "vggsound.csv row 3 has 5 columns, 4 expected; "),
        (CSV.replace("d2,1,dog,", "d2,dog,1,"), "vggsound.csv row 3: start 'dog' is no whole number of seconds; "),
    ],
)
def test_csv_with_header_or_wrong_columns(project: Path, finished: Path, wrong: str, words: str) -> None:
    (project / "source/vggsound.csv").write_text(wrong)
    assert refused(project, "download", "sounds").startswith(f"error: source/{words}")
    (project / "source/vggsound.csv").write_text(CSV)
    assert_goes_through(project, finished, "download", "sounds")


def test_unknown_split(project: Path, finished: Path) -> None:
    (project / "source/vggsound.csv").write_text(CSV.replace("r1,1,rain,train", "r1,1,rain,trian"))
    line = refused(project, "download", "sounds")
    assert line == "error: source/vggsound.csv row 6: split 'trian' is unknown; write train or test"
    fresh = project / "source/fixed.csv"  # as editors write: another file of the same size takes the name
    fresh.write_text(CSV)
    fresh.replace(project / "source/vggsound.csv")
    assert_goes_through(project, finished, "download", "sounds")


def test_empty_class(project: Path, finished: Path) -> None:
    source, clip = project / "source/vggsound.csv", project / "data/sounds/raw/video/r3_000001.mp4"
    source.write_text(CSV.replace("r1,1,rain", "r1,1,"))
    line = refused(project, "download", "sounds")
    assert line == "error: source/vggsound.csv row 6: the label is empty; name the sound or delete the row"
    source.write_text(CSV)
    content = clip.read_bytes()
    clip.unlink()
    line = refused(project, "subset", "sounds")
    assert line.startswith("error: class 'rain' has no test clip whose file exists; bring its files or ")
    clip.write_bytes(content)
    assert_goes_through(project, finished, "subset", "sounds")


# --- media ------------------------------------------------------------------------------------------------------------


def assert_quarantined(project: Path, clip: str, reason: str) -> None:
    """Past the allowed share the clean stage refuses; below it, the clip is a row of quarantine.csv, and no other is."""
    line = refused(project, "clean", "sounds")
    report = ".duet/reports/sounds/clean-quarantine.csv"
    assert line == (
        f"error: sounds: 1 of 8 clips are unusable (1 {reason}), more than clean.sounds.max_quarantine = 0.05; "
        f"the list is {report}; mend the files or raise that share"
    )
    edit_params(project / "params.yaml", {"clean.sounds.max_quarantine": 0.2}, {})
    assert run(project, "clean", "sounds").code == 0
    for path in (project / report, project / "data/sounds/clean/quarantine.csv"):
        rows = pd.read_csv(path)
        assert rows[["id", "path", "reason"]].to_numpy().tolist() == [[clip, f"raw/video/{clip}.mp4", reason]]
    kept = pd.read_parquet(project / "data/sounds/clean/manifest.parquet")["id"]
    assert sorted([*kept, clip]) == sorted(f"{line.partition(',')[0]}_000001" for line in CSV.splitlines())


def test_no_audio_track(project: Path, finished: Path) -> None:
    table = pd.read_parquet(finished / "data/sounds/clean/manifest.parquet").set_index("id")
    assert not table.loc["d3_000001", "has_audio"], "kept, and marked, where params do not ask for sound"
    edit_params(project / "params.yaml", {"clean.sounds.require_audio": True}, {})
    assert_quarantined(project, "d3_000001", "no audio")


def test_truncated_mp4(project: Path) -> None:
    clip = project / "data/sounds/raw/video/r1_000001.mp4"
    os.truncate(clip, clip.stat().st_size * 3 // 5)
    assert_quarantined(project, "r1_000001", "unreadable")


def drop_rights() -> None:
    """Give up root's right to read everything."""
    assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="capset is Linux's")
@pytest.mark.parametrize(
    ("command", "folder"),
    [
        (("download", "sounds"), "source/video"),
        (("subset", "sounds"), "data/sounds/raw/video"),
        (("clean", "sounds"), "data/sounds/raw/video"),
        (("stores", "sounds"), "data/sounds/clean"),
        (("train", "t3av", "pretrain"), "data/sounds/stores"),
    ],
)
def test_unreadable_folder(project: Path, finished: Path, command: tuple[str, ...], folder: str) -> None:
    (project / folder).chmod(0)
    line = refused(project, *command, prepare=drop_rights)
    assert folder in line or "8 of 8 clips are unusable (8 unreadable)" in line
    (project / folder).chmod(0o755)
    assert_goes_through(project, finished, *command)


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        (("download", "sounds"), "source"),
        (("download", "sounds"), "data"),
        (("clean", "sounds"), "data/sounds/raw/video"),
        (("train", "t3av", "contrastive"), "artifacts/t3av/pretrain"),
    ],
)
def test_a_file_where_a_folder_should_be(project: Path, finished: Path, command: tuple[str, ...], folder: str) -> None:
    place = project / folder
    place.rename(project / "aside")
    place.write_text("no folder")
    line = refused(project, *command)
    assert folder in line or "8 of 8 clips are unusable (8 unreadable)" in line
    place.unlink()
    (project / "aside").rename(place)
    assert_goes_through(project, finished, *command)


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["file size", "file system"])
def full(request: pytest.FixtureRequest, project: Path) -> Iterator[tuple[Callable[[], object] | None, Path]]:
    """What limits a command to some 40 KB, and the folder that is full: by the size of a file, or a disk really full."""
    work = project / ".duet"
    if request.param == "file size":
        yield partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000)), work
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=80k", "none", str(work)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount")
    try:
        yield None, work
    finally:
        subprocess.run(["umount", str(work)], check=True)


def test_full_disk_during_a_store_write(
    project: Path, finished: Path, full: tuple[Callable[[], object] | None, Path]
) -> None:
    limit, work = full
    line = refused(project, "stores", "sounds", prepare=limit)
    assert line.startswith("error: no space left while writing .duet/work/stores-sounds-")
    assert line.endswith("; free some and run again, nothing is lost")
    done = {path: path.stat().st_mtime_ns for path in work.glob("work/*/done-*.json")}
    assert 0 < len(done) < 8
    if limit is None:
        subprocess.run(["mount", "-o", "remount,size=10m", str(work)], check=True)
    with halted(project, "stores", "sounds", at="shutil.rmtree") as second:
        assert done.items() <= {path: path.stat().st_mtime_ns for path in work.glob("work/*/done-*.json")}.items()
        second.go_on()
        assert second.wait().code == 0
    assert contents(project) == contents(finished)


def test_full_disk_during_a_checkpoint(project: Path, finished: Path) -> None:
    line = refused(project, *PRETRAIN, prepare=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert line.startswith("error: no space left while writing ")
    assert_goes_through(project, finished, *PRETRAIN)


@contextmanager
def halted(project: Path, *command: str, at: str, after: str = "") -> Iterator[Command]:
    """The command, stopped as `stop_at` says; nothing is left of it when the block ends."""
    started = start(project, *command, prepare=partial(stop_at, at, after))
    try:
        end = time.monotonic() + 60
        while psutil.Process(started.process.pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < end
            time.sleep(0.02)
        yield started
    finally:
        started.process.kill()
        started.process.join()


@pytest.mark.parametrize("command", COMMANDS[:5], ids=" ".join)
def test_two_runs_at_once(project: Path, finished: Path, command: tuple[str, ...]) -> None:
    with halted(project, *command, at="open", after="fcntl.flock") as first:
        assert "is in use by another run; wait for it or stop it" in refused(project, *command)
        first.go_on()
        assert first.wait().code == 0
    assert contents(project) == contents(finished)


# --- params -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "right", "wrong", "words"),
    [
        (("download", "sounds"), "sha256:", "sha265:", "download.sounds.sha265 is not known; download.sounds takes "),
        (("subset", "sounds"), "mode: counts", "mode: count", "subset.sounds.mode is 'count'; choose 'all', 'counts'"),
        (("clean", "sounds"), "    format:", "    form:", "download.sounds.format is missing; "),
        (("stores", "sounds"), "shards: 8", "shards: 8.5", "stores.sounds.shards is 8.5, a float; it must be a int"),
        (("stores", "sounds"), "stores:", "store:", "no section 'stores'; there is "),
        (
            ("train", "t3av", "pretrain"),
            "mask_ratio: 0.75\n",
            "mask_ration: 0.75\n",
            "t3av.pretrain.mask_ration is not",
        ),
        (("train", "t3av", "pretrain"), "min_lr:", "minimal_lr:", "train.minimal_lr is not known; it takes "),
        (("train", "t3av", "pretrain"), "  dataset: sounds", "  data: sounds", "t3av.dataset is missing; "),
        (("train", "t3av", "pretrain"), "  min_lr: 0.0\n", "  min_lr: 0.0\n  min_lr: 1\n", " is not YAML: found dup"),
    ],
)
def test_params_typo(project: Path, command: tuple[str, ...], right: str, wrong: str, words: str) -> None:
    text = (project / "params.yaml").read_text()
    assert right in text
    (project / "params.yaml").write_text(text.replace(right, wrong))
    line = refused(project, *command)
    assert line.startswith("error: params.yaml") and words in line


# --- checkpoints ------------------------------------------------------------------------------------------------------


PRETRAIN, CONTRASTIVE = ("train", "t3av", "pretrain"), ("train", "t3av", "contrastive")
OTHER = "artifacts/t3av/contrastive/weights.safetensors"


@pytest.mark.parametrize(
    ("command", "change", "words"),
    [
        (
            CONTRASTIVE,
            {"t3av.model.dim": 32},
            "artifacts/t3av/pretrain/weights.safetensors: checkpoint of another archi",
        ),
        (
            CONTRASTIVE,
            {"t3av.model.bb_layers": 2},
            "artifacts/t3av/pretrain/weights.safetensors: checkpoint of another ar",
        ),
        (PRETRAIN, {"t3av.model.vit_model_name": OTHER}, f"{OTHER} does not fit ("),
    ],
)
def test_checkpoint_of_another_architecture(
    project: Path, finished: Path, command: tuple[str, ...], change: dict[str, object], words: str
) -> None:
    text = (project / "params.yaml").read_text()
    edit_params(project / "params.yaml", change, {})
    assert refused(project, *command).startswith(f"error: {words}")
    (project / "params.yaml").write_text(text)
    assert_goes_through(project, finished, *command)


@pytest.fixture
def killed(project: Path) -> Path:
    """The folder `last` of a training of the project that was killed when it was about to turn it to a newer one."""
    outcome = run(project, *PRETRAIN, prepare=partial(stop_at, "os.symlink", "os.symlink", signal.SIGKILL))
    assert outcome.code == -signal.SIGKILL
    (last,) = project.glob(".duet/work/pretrain@t3av-*/last")
    return last


def test_resume_state_of_another_architecture(project: Path, finished: Path, killed: Path) -> None:
    shutil.copyfile(project / OTHER, killed / "weights.safetensors")
    line = refused(project, *PRETRAIN)
    assert "/last is of another architecture (" in line and line.endswith("and run again to start over")
    shutil.rmtree(killed.parent)  # as the line says
    assert_goes_through(project, finished, *PRETRAIN)


@pytest.mark.parametrize("name", ["weights.safetensors", "bundle.json"])
def test_checkpoint_truncated(project: Path, finished: Path, name: str) -> None:
    path = project / "artifacts/t3av/pretrain" / name
    os.truncate(path, path.stat().st_size // 2)
    assert re.match(rf"error: artifacts/t3av/pretrain/{name} is .*damaged", refused(project, *CONTRASTIVE))
    shutil.copyfile(finished / path.relative_to(project), path)
    assert_goes_through(project, finished, *CONTRASTIVE)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
def test_resume_state_truncated(project: Path, finished: Path, killed: Path, name: str) -> None:
    os.truncate(killed / name, (killed / name).stat().st_size // 2)
    line = refused(project, *PRETRAIN)
    assert line.startswith(f"error: {killed.relative_to(project)}/{name} is damaged (")
    assert line.endswith(f"; delete {killed.parent.relative_to(project)} and run again to start over")
    shutil.rmtree(killed.parent)  # as the line says
    assert_goes_through(project, finished, *PRETRAIN)
