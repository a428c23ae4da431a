"""The decode pass, against PyAV decoding everything and against the ffmpeg program."""

from __future__ import annotations

import io
import subprocess
from functools import lru_cache
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
import simplejpeg

from tasks.data import video
from tasks.data.video import ClipError, Preparation

WHOLE = ["long_gop.mp4", "short_gop.mp4", "open_gop.mp4", "uneven.mp4", "edit_list.mp4", "upright.mp4", "stream.ts"]


@lru_cache
def every_frame(path: Path) -> list[tuple[int, np.ndarray]]:
    """(presentation time, upright RGB) of all frames, by plain decoding from the start."""
    with av.open(str(path)) as container:
        frames = [(frame.pts, frame) for frame in container.decode(video=0)]
    frames.sort(key=lambda item: item[0])
    return [(pts, np.rot90(f.to_ndarray(format="rgb24"), round(f.rotation / 90))) for pts, f in frames]


def run_ffmpeg(*arguments: str) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *arguments, "pipe:1"]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("count", [1, 7, 120])
def test_frames_are_those_shown_at_that_moment(media: Path, name: str, count: int) -> None:
    everything = every_frame(media / name)
    positions = np.linspace(0, len(everything) - 1, count)
    stored = video.read_clip(media / name, Preparation(count, 0, 100, 16000))
    assert len(stored.jpegs) == count
    for position, jpeg in zip(positions, stored.jpegs, strict=True):
        expected = everything[round(position)][1]
        assert jpeg == video.encode_jpeg(expected, 100)
        assert (stored.height, stored.width) == expected.shape[:2]


def test_times_are_kept_when_frames_are_uneven(media: Path) -> None:
    track, _ = video._sweep(media / "uneven.mp4", 16000)
    assert track.shown == [pts for pts, _ in every_frame(media / "uneven.mp4")]
    assert len(np.unique(np.diff(track.shown))) > 1


def test_unneeded_pictures_are_left_out(media: Path) -> None:
    track, _ = video._sweep(media / "short_gop.mp4", 16000)
    assert len(video._needed(track, {track.shown[0], track.shown[-1]})) < len(track.coded) / 3


@pytest.mark.parametrize(("name", "shape"), [("short_gop.mp4", (32, 48)), ("upright.mp4", (48, 32))])
def test_size_and_rotation_are_ffmpegs(media: Path, name: str, shape: tuple[int, int]) -> None:
    stored = video.read_clip(media / name, Preparation(2, 32, 100, 16000))
    assert (stored.height, stored.width) == shape
    scale = f"scale={shape[1]}:{shape[0]}:flags=bilinear"
    raw = run_ffmpeg("-i", str(media / name), "-vf", scale, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24")
    expected = np.frombuffer(raw, np.uint8).reshape(*shape, 3) @ [0.299, 0.587, 0.114]
    grey = simplejpeg.decode_jpeg(stored.jpegs[0], "GRAY")[..., 0]  # a JPEG keeps colour at half the size
    assert np.abs(grey - expected).mean() < 3
    assert np.abs(grey[::-1, ::-1] - expected).mean() > 30


@pytest.mark.parametrize("rate", [8000, 16000, 32000, 44100])
def test_sound_is_ffmpegs(media: Path, rate: int) -> None:
    path = media / "long_gop.mp4"
    wave = video.read_clip(path, Preparation(1, 0, 90, rate)).wave
    expected = np.frombuffer(run_ffmpeg("-i", str(path), "-ac", "1", "-ar", str(rate), "-f", "s16le"), np.int16)
    assert wave is not None and wave.dtype == np.int16
    assert abs(len(wave) - len(expected)) <= rate * 0.03  # the padding of the last AAC frame
    heard = len(expected) - rate // 50
    assert np.abs(wave[:heard].astype(int) - expected[:heard]).max() <= 2


def test_no_sound_track_is_no_silence(media: Path) -> None:
    assert video.read_clip(media / "mute.mp4", Preparation(2, 0, 90, 16000)).wave is None
    silence = video.read_clip(media / "still.mp4", Preparation(2, 0, 90, 16000)).wave
    assert silence is not None and len(silence) > 40000 and not silence.any()


def test_bytes_in_memory_give_the_same_clip(media: Path) -> None:
    path = media / "long_gop.mp4"
    first = video.read_clip(path, Preparation(5, 32, 90, 16000))
    second = video.read_clip(io.BytesIO(path.read_bytes()), Preparation(5, 32, 90, 16000))
    assert first.jpegs == second.jpegs
    assert np.array_equal(first.wave, second.wave)  # pyright: ignore


def test_probe_tells_what_was_encoded(media: Path) -> None:
    probe = video.probe(media / "long_gop.mp4")
    assert (probe.frames, probe.fps, probe.width, probe.height) == (90, 30.0, 96, 64)
    assert probe.duration == pytest.approx(3.0)
    assert (probe.has_audio, probe.sample_rate, probe.silent, probe.still) == (True, 44100, False, False)
    still = video.probe(media / "still.mp4")
    assert still.silent and still.still and still.has_audio
    mute = video.probe(media / "mute.mp4")
    assert not mute.has_audio and not mute.silent and mute.sample_rate == 0


REASONS = {
    "gone.mp4": "missing",
    "empty.mp4": "empty",
    "no_index.mp4": "unreadable",
    "truncated.mp4": "truncated",
    "damaged.mp4": "damaged",
    "sound.m4a": "no video",
    "one_frame.mp4": "too short",
}


@pytest.mark.parametrize("name", REASONS)
def test_damage_has_a_reason(media: Path, name: str) -> None:
    with pytest.raises(ClipError) as caught:
        video.probe(media / name)
    assert caught.value.reason == REASONS[name]
    assert "\n" not in caught.value.detail


@pytest.mark.parametrize("name", [name for name in REASONS if name != "one_frame.mp4"])
def test_damage_stops_decoding_too(media: Path, name: str) -> None:
    with pytest.raises(ClipError):
        video.read_clip(media / name, Preparation(90, 0, 90, 16000))


def test_thumbnails_of_what_is_left(media: Path) -> None:
    picture = video.thumbnail(media / "truncated.mp4")
    assert picture is not None and simplejpeg.decode_jpeg(picture).shape == (108, 162, 3)
    assert video.thumbnail(media / "empty.mp4") is None
    assert video.thumbnail(media / "sound.m4a") is None
