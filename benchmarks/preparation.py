"""What it costs to bring one clip of 10 s to 16 frames of 224 pixels and 16 kHz sound, and into the stores.

    python benchmarks/preparation.py [decoding] [storing]

decoding: `tasks.data.video`'s pass, its JPEG left out, against one ffmpeg process that picks the frames by number and scales
them, and against OpenCV seeking each frame and ffmpeg extracting the sound, as T3-AV's authors do. Before that, ours must give
the very pixels of decoding everything and taking the frames by their presentation times.

storing: the same pass with its JPEGs and both stores written, against the sum of what each part costs at least: the needed
pictures and the sound decoded and thrown away, frames in memory scaled, these made JPEGs, the sound resampled, their bytes
written to files, the statistics of the log-mel.

H.264 and AAC, one thread, medians by the CPU time of the process and its children, ways in turns; files in the page cache.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import cv2
import numpy as np
import torch

from benchmarks import table
from benchmarks.table import Row, costs
from models.transforms import LogMel
from tasks import stores
from tasks.data import video
from tasks.data.audio import Resampler
from tasks.data.video import Preparation
from tasks.datasets.demo import ffmpeg_binary

SECONDS, FPS, FRAMES, SIZE, RATE = 10, 25, 16, 224, 16000
PREPARATION = Preparation(FRAMES, SIZE, 90, RATE)
STORES = stores.Stores(FRAMES, 0, SIZE, 90, RATE, "pcm16", 1, 1, "processes", 0.0)


@dataclass(frozen=True)
class Kind:
    """A sort of clip."""

    name: str
    width: int
    height: int
    gop: int  # frames from one keyframe to the next
    kbits: int  # of the pictures, a second


KINDS = (
    Kind("340 × 256, GOP 250", 340, 256, 250, 400),
    Kind("340 × 256, GOP 50", 340, 256, 50, 400),
    Kind("1280 × 720, GOP 250", 1280, 720, 250, 2000),
)


def write_clip(path: Path, kind: Kind, seed: int = 0) -> None:
    """An MP4 of a moving pattern, a tone, noise in both; times as some cameras' have them, from above 0."""
    picture = (
        f"testsrc2=s={kind.width}x{kind.height}:r={FPS}:d={SECONDS},scroll=h=0.004,noise=alls=6:allf=t:all_seed={seed}"
    )
    sound = f"aevalsrc=0.3*sin({440 + seed}*2*PI*t)+0.05*random({seed}):s=44100:d={SECONDS}"
    inputs = ["-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", sound]
    codecs = ["-c:v", "libx264", "-g", str(kind.gop), "-b:v", f"{kind.kbits}k", "-pix_fmt", "yuv420p", "-c:a", "aac"]
    subprocess.run([ffmpeg_binary(), "-v", "error", "-y", *inputs, *codecs, str(path)], check=True)


def cpu_seconds() -> float:
    """Used so far by this process and the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed(call: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    began = cpu_seconds()
    call()
    return cpu_seconds() - began


def in_turns(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each way; a first round that loads libraries is left out."""
    rounds = [{name: timed(way) for name, way in ways.items()} for _ in range(repeats + 1)][1:]
    return {name: statistics.median(each[name] for each in rounds) for name in ways}


# --- the ways ------------------------------------------------------------------------------------------------------------


def decode_ours(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(T, H, W, 3) uint8 and (N,) int16."""
    with patch.object(video, "encode_jpeg", lambda image, quality: image):
        clip = video.read_clip(path, PREPARATION)
    assert clip.wave is not None
    return np.stack(clip.jpegs), clip.wave


def decode_ffmpeg(path: Path, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """The same by one process, the pictures through its pipe and the sound through a file."""
    height, width = SIZE, round(kind.width * SIZE / kind.height)
    chosen = "+".join(f"eq(n,{number})" for number in video.choose(SECONDS * FPS, FRAMES))
    scale = f"select='{chosen}',scale={width}:{height}:flags=bilinear"
    sound = path.with_suffix(".pcm")
    command = [ffmpeg_binary(), "-v", "error", "-y", "-threads", "1", "-filter_threads", "1", "-i", str(path)]
    command += [
        "-map",
        "0:v",
        "-vf",
        scale,
        "-fps_mode",
        "passthrough",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "pipe:1",
    ]
    command += ["-map", "0:a", "-ac", "1", "-ar", str(RATE), "-f", "s16le", str(sound)]
    raw = subprocess.run(command, check=True, capture_output=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(FRAMES, height, width, 3), np.fromfile(sound, np.int16)


def decode_opencv(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every frame sought and resized to a square by OpenCV, then the sound out of an ffmpeg process."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames = []
    for number in np.linspace(0, capture.get(cv2.CAP_PROP_FRAME_COUNT) - 1, FRAMES).round():
        capture.set(cv2.CAP_PROP_POS_FRAMES, number)
        picture = cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB)
        frames.append(cv2.resize(picture, (SIZE, SIZE)))
    command = [ffmpeg_binary(), "-v", "error", "-threads", "1", "-i", str(path), "-vn"]
    command += ["-ac", "1", "-ar", str(RATE), "-f", "s16le", "-"]
    sound = np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.int16)
    return np.stack(frames), sound


def check(path: Path) -> None:
    """Ours must be the frames shown at these moments, found by decoding all of them, to the pixel."""
    with av.open(path) as container:
        frames = sorted(container.decode(video=0), key=lambda frame: frame.pts or 0)
    assert len(frames) == SECONDS * FPS
    expected = [video.scale(frames[number], SIZE) for number in video.choose(len(frames), FRAMES)]
    assert np.array_equal(decode_ours(path)[0], np.stack(expected)), f"{path.name}: other frames than asked for"


# --- the floors ----------------------------------------------------------------------------------------------------------


def decode_only(path: Path) -> None:
    """The least that has to be decoded: the sound, and no picture that is neither wanted nor built upon."""
    wanted = set(video.choose(SECONDS * FPS, FRAMES))
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream, container.streams.audio[0]):
            if packet.stream is stream and packet.pts is not None:
                assert stream.time_base is not None
                number = round((packet.pts - (stream.start_time or 0)) * stream.time_base * FPS)
                stream.codec_context.skip_frame = "DEFAULT" if number in wanted else "NONREF"
            packet.decode()


def write_plainly(folder: Path, jpegs: list[bytes], wave: np.ndarray) -> None:
    """The bytes of both stores, nothing else."""
    (folder / "frames").write_bytes(b"".join(jpegs))
    (folder / "sound").write_bytes(wave.tobytes())


def resample(frames: list[Any]) -> None:
    """What becomes of decoded sound."""
    resampler = Resampler(RATE)
    for frame in frames:
        resampler.add(frame)
    resampler.wave()


def floors(path: Path) -> dict[str, Callable[[], Any]]:
    """What each part costs by itself, from what the parts before it give."""
    with av.open(path) as container:
        frames = list(container.decode(video=0))
        frames = [frames[number] for number in video.choose(len(frames), FRAMES)]
    with av.open(path) as container:
        heard = list(container.decode(audio=0))
    images, wave = decode_ours(path)
    jpegs = [video.encode_jpeg(image, PREPARATION.quality) for image in images]
    mel = LogMel(RATE, stores.MEL_BINS)
    return {
        "decoding": partial(decode_only, path),
        "scaling": lambda: [video.scale(frame, SIZE) for frame in frames],
        "resampling": partial(resample, heard),
        "JPEG": lambda: [video.encode_jpeg(image, PREPARATION.quality) for image in images],
        "log-mel": partial(stores.mel_sums, wave, mel),
        "writing": partial(write_plainly, path.parent, jpegs, wave),
    }


# --- the parts -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def clips(quick: bool) -> Iterator[list[tuple[Kind, Path]]]:
    """One of each kind."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = [(kind, Path(folder) / f"{number}.mp4") for number, kind in enumerate(KINDS[: 1 if quick else None])]
        for kind, path in found:
            write_clip(path, kind)
            check(path)
        yield found


def decoding(quick: bool) -> Iterator[Row]:
    """Without JPEG."""
    with clips(quick) as found:
        for kind, path in found:
            ways = {
                "ours": partial(decode_ours, path),
                "ffmpeg": partial(decode_ffmpeg, path, kind),
                "OpenCV": partial(decode_opencv, path),
                "floor": partial(decode_only, path),
            }
            took = in_turns(ways, 1 if quick else 7)
            title = f"MP4 to 16 frames at 224 px + 16 kHz sound, {kind.name}"
            yield costs(title, "CPU s a clip", took["ours"], took["ffmpeg"], "an ffmpeg pipe", ">= 1.5")
            yield costs(title, "CPU s a clip", took["ours"], took["OpenCV"], "OpenCV seeks + ffmpeg", ">= 3")
            yield costs(title, "CPU s a clip", took["ours"], took["floor"], "decoding alone", ">= 0.6")


def storing(quick: bool) -> Iterator[Row]:
    """With JPEGs and the stores."""
    with clips(quick) as found:
        for kind, path in found:
            clip = {"id": path.stem, "path": path.name, "split": "train", "has_audio": True}

            def build(path: Path = path, clip: dict[str, Any] = clip) -> None:
                with tempfile.TemporaryDirectory(dir=path.parent) as work:
                    (Path(work) / "stores").mkdir()
                    stores.build_shard(path.parent, [clip], 0, STORES, Path(work))

            took = in_turns({"ours": build, **floors(path)}, 1 if quick else 25)
            ours = took.pop("ours")
            parts = ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in took.items())
            title = f"MP4 into the stores, {kind.name}"
            note = f"ms: {parts}"
            yield costs(title, "CPU s a clip", ours, sum(took.values()), "the sum of its parts", ">= 0.8", note)


PARTS = {"decoding": decoding, "storing": storing}

if __name__ == "__main__":
    table.main(__doc__, PARTS)
