"""The seed every test starts from, and small real media files, made once a session."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: processes take a file each, and the last one would run alone."""
    items.sort(key=lambda item: item.path.name != "test_demo.py")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers each time."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of MP4 files of 96 x 64 pixels at 30 frames/s, most of 3 s with a stereo tone and noise at 44.1 kHz."""
    import imageio_ffmpeg

    folder = tmp_path_factory.mktemp("media")
    binary = imageio_ffmpeg.get_ffmpeg_exe()

    def make(name: str, *settings: str, picture: str = "testsrc2=", sound: str = "", seconds: float = 3) -> None:
        inputs = ["-f", "lavfi", "-i", f"{picture}size=96x64:rate=30:duration={seconds}"]
        if sound:
            inputs += ["-f", "lavfi", "-i", f"aevalsrc={sound}:d={seconds}:s=44100"]
        codec = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-bf", "3", "-threads", "1"]
        subprocess.run([binary, "-v", "error", *inputs, *codec, *settings, str(folder / name)], check=True)

    def copy(name: str, source: str, *settings: str, **before: list[str]) -> None:
        command = [binary, "-v", "error", *before.get("before", []), "-i", str(folder / source), "-c", "copy"]
        subprocess.run([*command, *settings, str(folder / name)], check=True)

    tone = "0.3*sin(880*PI*t)+0.05*random(0)|0.2*sin(2000*PI*t)"
    make("long_gop.mp4", "-g", "300", "-movflags", "+faststart", sound=tone)
    make("short_gop.mp4", "-g", "12", sound=tone)
    make("open_gop.mp4", "-g", "15", "-x264-params", "open-gop=1")
    make("uneven.mp4", "-vf", "select=not(mod(n\\,3))+gt(n\\,60)", "-fps_mode", "vfr")
    make("mute.mp4")
    make("still.mp4", picture="color=c=teal:", sound="0|0")
    make("one_frame.mp4", "-frames:v", "1")
    make("sound.m4a", "-vn", sound=tone)
    copy("edit_list.mp4", "long_gop.mp4", "-t", "1.5", before=["-ss", "1.03"])
    copy("upright.mp4", "short_gop.mp4", before=["-display_rotation", "90"])
    copy("stream.ts", "long_gop.mp4")
    whole = (folder / "long_gop.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) * 3 // 5])
    (folder / "no_index.mp4").write_bytes((folder / "short_gop.mp4").read_bytes()[:20000])
    (folder / "empty.mp4").touch()
    # Zeros over the coded picture data, which begins behind the index of a +faststart file.
    start = whole.index(b"mdat") + 4 + (len(whole) - whole.index(b"mdat")) // 2
    (folder / "damaged.mp4").write_bytes(whole[:start] + bytes(6000) + whole[start + 6000 :])
    return folder
