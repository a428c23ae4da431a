"""Cleaning real files: each reason for quarantine, the validation split, the share at which the stage gives up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest

from models.family import InputError
from tasks import clean, storage
from tasks.clean import Clean, carve_val
from tasks.data import manifest
from tasks.datasets import vggsound

ROOT = Path(__file__).parents[2]
LENIENT = Clean(0.0, 7, False, False, False, 2, 1.0)
# ytid -> (file of the `media` fixture, split); nothing is written for "gone"
FILES = {
    "good": ("long_gop.mp4", "train"),
    "-edit": ("edit_list.mp4", "train"),
    "twin": ("short_gop.mp4", "train"),
    "test": ("short_gop.mp4", "test"),
    "mute": ("mute.mp4", "train"),
    "still": ("still.mp4", "train"),
    "gone": ("", "train"),
    "empty": ("empty.mp4", "train"),
    "noindex": ("no_index.mp4", "train"),
    "cut": ("truncated.mp4", "train"),
    "damaged": ("damaged.mp4", "test"),
    "sound": ("sound.m4a", "train"),
    "oneframe": ("one_frame.mp4", "train"),
}
BAD = {
    "gone": "missing",
    "empty": "empty",
    "noindex": "unreadable",
    "cut": "truncated",
    "damaged": "damaged",
    "sound": "no video",
    "oneframe": "too short",
    "twin": "duplicate",
}


@pytest.fixture
def project(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with the dataset "sounds" downloaded and its subset chosen."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("download: {sounds: {format: vggsound}}\n")
    rows = [vggsound.row(ytid, 30, f"label of {ytid}", split) for ytid, (_, split) in FILES.items()]
    vggsound.write(pd.DataFrame(rows), tmp_path / "data/sounds/subset")
    video = tmp_path / "data/sounds/raw/video"
    video.mkdir(parents=True)
    for ytid, (name, _) in FILES.items():
        if name:
            shutil.copyfile(media / name, video / f"{vggsound.clip_id(ytid, 30)}.mp4")
    return tmp_path


def quarantined(folder: Path) -> dict[str, str]:
    table = pd.read_csv(folder / "quarantine.csv", dtype=str)
    return {clip.removesuffix("_000030"): reason for clip, reason in zip(table["id"], table["reason"], strict=True)}


def test_each_reason_by_a_real_file(project: Path) -> None:
    line = clean.clean("sounds", LENIENT)
    folder = project / "data/sounds/clean"
    assert quarantined(folder) == BAD
    assert "5 clips usable (4 train, 0 val, 1 test), 8 in quarantine: 1 damaged, 1 duplicate" in line
    table = manifest.read("sounds").set_index("group")
    assert set(table.index) == set(FILES) - set(BAD)
    good = table.loc["good"]
    assert good["path"] == "raw/video/good_000030.mp4"
    assert good["checksum"] == storage.file_digest(project / "data/sounds" / good["path"])
    assert json.loads(good["annotation"]) == {"label": "label of good"}
    assert table["has_audio"].to_dict() == {"-edit": True, "good": True, "mute": False, "still": True, "test": True}
    assert table["silent"].sum() == 1 and table.loc["still", "silent"] and table.loc["still", "still"]
    assert not list((project / ".duet/work").iterdir())
    detail = pd.read_csv(folder / "quarantine.csv").set_index("id").loc["twin_000030", "detail"]
    assert detail == "the same bytes as test_000030 in test"


def test_params_may_drop_more(project: Path) -> None:
    clean.clean("sounds", replace(LENIENT, require_audio=True, drop_silent=True))
    assert quarantined(project / "data/sounds/clean") == BAD | {"mute": "no audio", "still": "silent"}
    clean.clean("sounds", replace(LENIENT, drop_still=True))
    assert quarantined(project / "data/sounds/clean") == BAD | {"still": "still"}


def test_the_page_shows_what_was_dropped(project: Path) -> None:
    clean.clean("sounds", LENIENT)
    page = (project / "data/sounds/clean/quarantine.html").read_text()
    assert "8 of 13 listed clips" in page
    assert page.count("data:image/jpeg;base64,") == 4  # truncated, damaged, one frame, duplicate
    assert 'src="http' not in page and "<script" not in page and "<link" not in page


def test_same_bytes_whatever_the_number_of_workers(project: Path) -> None:
    clean.clean("sounds", LENIENT)
    first = storage.folder_digest(project / "data/sounds/clean")
    clean.clean("sounds", replace(LENIENT, workers=1))
    assert storage.folder_digest(project / "data/sounds/clean") == first


def test_too_many_bad_clips(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError) as caught:
        clean.clean("sounds", replace(LENIENT, max_quarantine=0.05))
    message = str(caught.value)
    assert message.startswith("sounds: 8 of 13 clips are unusable (1 damaged, 1 duplicate, 1 empty, 1 missing")
    assert "more than clean.sounds.max_quarantine = 0.05" in message and "\n" not in message
    assert "raw/video/twin_000030.mp4: duplicate" in capsys.readouterr().out
    report = project / ".duet/reports/sounds"
    assert len(pd.read_csv(report / "clean-quarantine.csv")) == 8
    assert (report / "quarantine.html").is_file()
    assert not (project / "data/sounds/clean").exists()
    assert list((project / ".duet/work").glob("clean-sounds-*/piece-*.json"))  # kept for the next run


def test_media_of_the_subset_come_first(project: Path) -> None:
    shutil.move(project / "data/sounds/raw/video", project / "data/sounds/subset/video")
    clean.clean("sounds", LENIENT)
    assert manifest.read("sounds")["path"].str.startswith("subset/video/").all()


def test_a_killed_run_goes_on(project: Path) -> None:
    """The run dies at a clip in the middle; what was probed before is not probed again."""
    code = (
        "import os\nfrom pathlib import Path\nfrom tasks import clean\nprobe = clean.probe_clip\n"
        "def deadly(path):\n"
        "    if 'noindex' in path.name:\n"
        "        Path('pid').write_text(str(os.getpid()))\n"
        "        os.kill(os.getppid(), 9)\n"
        "    return probe(path)\n"
        "clean.probe_clip, clean.PIECE = deadly, 2\n"
        f"clean.clean('sounds', clean.Clean(**{asdict(replace(LENIENT, workers=1))}))\n"
    )
    died = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert died.returncode == -signal.SIGKILL
    wait_until(lambda: not alive(int(Path("pid").read_text())))
    code = code.replace("os.kill(os.getppid(), 9)", "print('here')").replace(
        "probe(path)", "print(path.stem) or probe(path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    probed = [line.removesuffix("_000030") for line in done.stdout.split() if line.endswith("_000030")]
    order = list(FILES)
    # The orphaned worker may still have finished what it held; nothing from before the kill is probed again.
    assert set(probed) <= set(order[order.index("noindex") // 2 * 2 :])
    assert quarantined(project / "data/sounds/clean") == BAD


def clips(num: int, labels: int, per_group: int = 1, split: str = "train") -> pd.DataFrame:
    annotation = [json.dumps({"label": f"l{k % labels}"}) for k in range(num)]
    group = [f"g{k % labels}-{k // labels // per_group}" for k in range(num)]
    ids = [f"{split}{k}" for k in range(num)]
    return pd.DataFrame({"id": ids, "group": group, "split": split, "annotation": annotation, "reason": ""})


@pytest.mark.parametrize(("num", "labels", "share"), [(300, 10, 0.15), (96, 12, 0.25), (40, 4, 0.1), (2000, 300, 0.15)])
def test_val_is_a_share_of_each_label(num: int, labels: int, share: float) -> None:
    table = carve_val(clips(num, labels), share, 3)
    val = table[table["split"] == "val"]
    assert len(val) == round(num * share)
    counts = val["annotation"].value_counts().reindex(table["annotation"].unique(), fill_value=0)
    wanted = table["annotation"].value_counts() * share
    assert ((counts - wanted).abs() < 1).all()


def test_val_takes_whole_groups_and_leaves_test_alone() -> None:
    both = pd.concat([clips(300, 5, per_group=3), clips(60, 5, split="test").assign(group="own")], ignore_index=True)
    table = carve_val(both, 0.2, 3)
    assert table.groupby("group")["split"].nunique().max() == 1
    assert (table["split"] == "val").sum() == pytest.approx(60, abs=6)
    assert (table["split"] == "test").sum() == 60


def test_val_follows_the_seed_and_not_the_order_of_rows() -> None:
    table = clips(200, 4)
    first = set(carve_val(table, 0.2, 3).query("split == 'val'")["id"])
    assert set(carve_val(table.sample(frac=1, random_state=5), 0.2, 3).query("split == 'val'")["id"]) == first
    assert set(carve_val(table, 0.2, 4).query("split == 'val'")["id"]) != first


def test_val_of_captions_and_val_that_is_there() -> None:
    table = clips(100, 100)
    assert (carve_val(table, 0.15, 3)["split"] == "val").sum() == 15
    given = pd.concat([table, clips(4, 2, split="val")], ignore_index=True)
    assert carve_val(given, 0.15, 3).equals(given)
    assert carve_val(table, 0.0, 3).equals(table)


def test_workers_end_with_the_process_that_started_them(project: Path) -> None:
    code = (
        "import os, time, pathlib\nfrom tasks.data import workers\n"
        "def sleep(k):\n"
        "    pathlib.Path(f'pid-{k}').write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "workers.work(sleep, [(0,), (1,)], 2, 2, 'sleep')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    pids = [project / "pid-0", project / "pid-1"]
    wait_until(lambda: all(path.exists() and path.read_text() for path in pids))
    process.kill()
    process.wait()
    wait_until(lambda: not any(alive(int(path.read_text())) for path in pids))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
