"""Segments of YouTube's videos, by a program yt-dlp that stands in for the real one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import pytest

from models.family import InputError
from tasks import storage, youtube
from tasks.download import Download, download
from tasks.youtube import YouTube

ROOT = Path(__file__).parents[2]
IDS = ["-good-one-0", "good_two__1", "dead-video_", "NA012345678"]
RAW, CLIPS = Path("data/sounds/raw/video"), youtube.CLIPS / "360p"
SETTINGS = Download("youtube", "vggsound", None, None, None, YouTube("given", height=360, workers=2, retry_dead=False))
# Notes what it was called with; fails for ids in fail.json as yt-dlp does; else writes a clip in two goes.
STAND_IN = """#!{python}
import json, os, pathlib, sys, time
here = pathlib.Path({here!r})
video = sys.argv[-1].partition("?v=")[2]
with (here / "calls.jsonl").open("a") as handle:
    handle.write(json.dumps(dict(video=video, argv=sys.argv[1:], cwd=os.getcwd())) + "\\n")
fail = json.loads((here / "fail.json").read_text())
if video in fail:
    pathlib.Path("clip.mp4.part").write_bytes(b"half")
    sys.exit("ERROR: [youtube] " + video + ": " + fail[video])
content = (here / "clip.mp4").read_bytes()
with open(sys.argv[sys.argv.index("--output") + 1].replace("%(ext)s", "mp4"), "wb") as handle:
    handle.write(content[:500])
    handle.flush()
    time.sleep(float((here / "pause").read_text()))
    handle.write(content[500:])
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_clip: Callable[..., Path]) -> Path:
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "bin/clip.mp4")
    program = tmp_path / "bin/yt-dlp"
    program.write_text(STAND_IN.format(python=sys.executable, here=str(tmp_path / "bin")))
    program.chmod(0o755)
    (tmp_path / "bin/pause").write_text("0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    fail({"dead-video_": "Video unavailable. This video has been removed by the uploader"})
    (tmp_path / "given").mkdir()
    rows = [f"{video},{30 + k},rain,{'test' if k % 2 else 'train'}\n" for k, video in enumerate(IDS)]
    (tmp_path / "given/vggsound.csv").write_text("".join(rows))
    return tmp_path


def fail(reasons: dict[str, str]) -> None:
    Path("bin/fail.json").write_text(json.dumps(reasons))


def calls() -> list[dict]:
    log = Path("bin/calls.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_each_clip_is_cut_once_and_dead_ones_are_noted(project: Path) -> None:
    line = download("sounds", SETTINGS)
    assert line.startswith("download sounds: 4 clips listed (1 of the clips without a file), 4 files")
    assert sorted(path.name for path in RAW.iterdir()) == [
        "-good-one-0_000030.mp4", "NA012345678_000033.mp4", "good_two__1_000031.mp4",
    ]  # fmt: skip
    with av.open(str(RAW / "-good-one-0_000030.mp4")) as container:
        assert len(list(container.decode(video=0))) == 10
    assert not [path for path in youtube.CLIPS.rglob(".*") if path.name != ".lock"]
    notes = dict(line.split("\t", 1) for line in (CLIPS / youtube.JOURNAL).read_text().splitlines())
    assert notes["dead-video__32000_42000.mp4"].startswith("dead\t[youtube] dead-video_: Video unavailable")
    assert notes["-good-one-0_30000_40000.mp4"] == "done\t"
    (call,) = [call for call in calls() if call["video"] == "-good-one-0"]
    assert call["argv"][-2:] == ["--", "https://www.youtube.com/watch?v=-good-one-0"]
    assert call["argv"][call["argv"].index("--download-sections") + 1] == "*30.000-40.000"
    assert not Path(call["cwd"]).exists()

    shutil.rmtree("data")
    assert download("sounds", SETTINGS) == line
    assert len(calls()) == 4  # neither what is there nor what is dead is asked for again
    fail({})
    again = replace(SETTINGS, youtube=YouTube("given", height=360, workers=2, retry_dead=True))
    assert download("sounds", again).startswith("download sounds: 4 clips listed, 5 files")
    assert [call["video"] for call in calls()[4:]] == ["dead-video_"]


def test_clips_beside_the_annotations_are_not_fetched(project: Path) -> None:
    (project / "given/video").mkdir()
    for k in (0, 1, 2):
        shutil.copy(project / "bin/clip.mp4", project / f"given/video/{IDS[k]}_{30 + k:06d}.mp4")
    download("sounds", SETTINGS)
    assert [call["video"] for call in calls()] == ["NA012345678"]


@pytest.mark.parametrize(
    "reason",
    [
        "Sign in to confirm you're not a bot. Use --cookies",
        "Unable to download API page: HTTP Error 429: Too Many Requests",
        "Video unavailable. This content isn't available, try again later.",
        "Unable to download webpage: [Errno -3] Temporary failure in name resolution",
        "ffmpeg is not installed. Aborting",
    ],
)
def test_what_may_pass_is_no_death(project: Path, reason: str) -> None:
    fail({IDS[1]: reason})
    with pytest.raises(InputError, match=r"1 clips failed, and may not next time \(good_two__1: .*run again"):
        download("sounds", SETTINGS)
    assert not Path("data").exists()
    fail({})
    assert download("sounds", SETTINGS).startswith("download sounds: 4 clips listed, 5 files")
    assert [call["video"] for call in calls()].count(IDS[1]) == 2 and len(calls()) == 5


def test_a_site_that_answers_nobody_is_left_alone(project: Path) -> None:
    videos = [f"{k:011d}" for k in range(100)]
    (project / "given/vggsound.csv").write_text("".join(f"{video},1,rain,train\n" for video in videos))
    fail(dict.fromkeys(videos, "HTTP Error 429: Too Many Requests"))
    with pytest.raises(InputError, match="10 clips failed"):
        download("sounds", SETTINGS)
    assert len(calls()) <= 30


@pytest.mark.parametrize(
    "video", ["--exec=evil", "../../../ab", "short", "abc&list=xyz", "good_two__1x", "$(touch x)0"]
)
def test_what_is_no_id_never_reaches_the_program(project: Path, video: str) -> None:
    with (project / "given/vggsound.csv").open("a") as handle:
        handle.write(f"{video},1,rain,train\n")
    with pytest.raises(InputError, match="no YouTube id"):
        download("sounds", SETTINGS)
    assert not calls()


def test_what_is_missing_is_said(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for changed, message in (
        (replace(SETTINGS, youtube=None), "its section `youtube` is null"),
        (replace(SETTINGS, format="wildlife"), "format wildlife name no video"),
        (replace(SETTINGS, youtube=YouTube("nowhere", 360, 1, False)), "nowhere is no folder"),
        (replace(SETTINGS, youtube=YouTube("given", 360, 0, False)), "workers must be 1 or more"),
    ):
        with pytest.raises(InputError, match=message):
            download("sounds", changed)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="no program yt-dlp; install it"):
        download("sounds", SETTINGS)


def test_killed_in_the_midst_of_a_clip(project: Path) -> None:
    (project / "bin/pause").write_text("0.5")
    (project / "params.yaml").write_text(
        "download: {sounds: {source: youtube, format: vggsound, sha256: null, endpoint: null, demo: null,"
        " youtube: {annotations: given, height: 360, workers: 1, retry_dead: false}}}\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DUET_TRACKING": "off"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks.download", "sounds"],
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while process.poll() is None and len(calls()) < 2:
        time.sleep(0.01)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    there = {path.name for path in CLIPS.glob("*.mp4")}
    assert (
        there == {"-good-one-0_30000_40000.mp4"}
        and (CLIPS / next(iter(there))).read_bytes() == (project / "bin/clip.mp4").read_bytes()
    )
    (project / "bin/pause").write_text("0")
    settings = replace(SETTINGS, youtube=YouTube("given", height=360, workers=1, retry_dead=False))
    assert download("sounds", settings).startswith("download sounds: 4 clips listed (1 of the")
    assert [call["video"] for call in calls()].count("-good-one-0") == 1
    assert not list(storage.WORK.iterdir()) and not list(youtube.CLIPS.rglob(".*.tmp"))
