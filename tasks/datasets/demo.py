"""The demo dataset: real MP4 files of seeded scenes in VGGSound's layout, a few of them broken for `clean` to find."""

from __future__ import annotations

import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import ffmpeg
import imageio_ffmpeg
import numpy as np
import pandas as pd
from tqdm import tqdm

from models.family import InputError
from tasks import storage
from tasks.datasets import vggsound
from tasks.datasets.scenes import CLASSES, FPS, HEIGHT, SAMPLE_RATE, WIDTH, draw_scene, render_frames, render_wave

ALPHABET = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))
FAULTS = ("cut short", "index lost", "empty", "no audio", "missing", "duplicate", "still and silent")


@dataclass(frozen=True)
class Demo:
    """Section `download.<dataset>.demo` of params.yaml."""

    seed: int
    clips: int  # good ones, a multiple of the number of classes; four fifths of each class are for training
    seconds: float  # length of a clip
    workers: int  # clips rendered at once


@dataclass(frozen=True)
class Clip:
    """One row of the demo's vggsound.csv and how its file comes to be."""

    index: int  # seeds the scene
    ytid: str
    start: int
    label: str
    split: str
    fault: str = ""  # of FAULTS

    @property
    def file_name(self) -> str:
        """Name of the clip's file."""
        return f"{vggsound.clip_id(self.ytid, self.start)}.mp4"


def plan(demo: Demo) -> list[Clip]:
    """The good clips class by class, then one clip of each fault."""
    per_class, rest = divmod(demo.clips, len(CLASSES))
    if rest or per_class < 2:
        raise InputError(
            f"params.yaml: demo.clips is {demo.clips}; take a multiple of {len(CLASSES)}, twice it or more"
        )
    if demo.seconds < 1 or demo.workers < 1:
        raise InputError("params.yaml: demo.seconds and demo.workers must be 1 or more")
    rng = np.random.default_rng(demo.seed)
    num_train = per_class * 4 // 5
    clips = [
        _place(rng, index, label, "train" if index % per_class < num_train else "test")
        for index, label in enumerate(label for label in CLASSES for _ in range(per_class))
    ]
    labels = list(CLASSES)
    for k, fault in enumerate(FAULTS):
        split = "test" if fault == "duplicate" else "train"
        clip = _place(rng, len(clips), labels[k % len(labels)], split)
        # A duplicate is the first training clip of its class once more, in the other split.
        source = clips[(k % len(labels)) * per_class].index if fault == "duplicate" else clip.index
        clips.append(replace(clip, index=source, fault=fault))
    return clips


def _place(rng: np.random.Generator, index: int, label: str, split: str) -> Clip:
    """A clip with an id as YouTube gives them: 11 characters, now and then a leading hyphen."""
    ytid = "".join(rng.choice(ALPHABET, 11))
    return Clip(index, "-" + ytid[1:] if index % 40 == 5 else ytid, int(rng.integers(0, 600)), label, split)


def build_demo(demo: Demo, folder: Path) -> str:
    """Fill `folder` with vggsound.csv and video/; clips that an interrupted run left there stay. Returns a summary."""
    clips = plan(demo)
    video = folder / "video"
    video.mkdir(parents=True, exist_ok=True)
    missing = [clip for clip in clips if clip.fault != "missing" and not (video / clip.file_name).exists()]
    # Threads do: numpy's work and the encoder's process both run outside the interpreter lock.
    with ThreadPoolExecutor(demo.workers) as pool:
        made = pool.map(lambda clip: _make_clip(demo, clip, video / clip.file_name), missing)
        for _ in tqdm(made, total=len(missing), desc="demo clips", unit="clip"):
            pass
    rows = [vggsound.row(clip.ytid, clip.start, clip.label, clip.split) for clip in clips]
    vggsound.write(pd.DataFrame(rows), folder)
    return f"{len(clips)} clips of {len(CLASSES)} classes, {len(FAULTS)} of them broken on purpose"


def _make_clip(demo: Demo, clip: Clip, path: Path) -> None:
    """Render, encode, and break where the clip's fault says so."""
    scene = draw_scene(*CLASSES[clip.label], demo.seconds, np.random.default_rng([demo.seed, clip.index]))
    frames, wave = render_frames(scene), render_wave(scene)
    if clip.fault == "still and silent":
        frames, wave = np.repeat(frames[:1], len(frames), axis=0), np.zeros_like(wave)
    with storage.atomic_file(path) as temporary:
        encode(frames, None if clip.fault == "no audio" else wave, temporary, index_first=clip.fault == "cut short")
        if clip.fault in ("cut short", "index lost", "empty"):
            os.truncate(temporary, 0 if clip.fault == "empty" else temporary.stat().st_size * 3 // 5)


def ffmpeg_binary() -> str:
    """The system's ffmpeg, or else the one that imageio_ffmpeg brings."""
    return shutil.which("ffmpeg") or imageio_ffmpeg.get_ffmpeg_exe()


def encode(frames: np.ndarray, wave: np.ndarray | None, path: Path, index_first: bool = False) -> None:
    """Write (T, H, W, 3) uint8 at FPS and (N,) float32 at SAMPLE_RATE as H.264 + AAC; same input, same bytes."""
    streams = [ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{WIDTH}x{HEIGHT}", r=FPS).video]
    with tempfile.NamedTemporaryFile(suffix=".f32") as sound:
        if wave is not None:
            sound.write(wave.tobytes())
            sound.flush()
            streams.append(ffmpeg.input(sound.name, format="f32le", ar=SAMPLE_RATE, ac=1).audio)
        settings = {
            "vcodec": "libx264", "preset": "ultrafast", "crf": 20, "pix_fmt": "yuv420p", "g": 12,
            "acodec": "aac", "aac_coder": "fast", "b:a": "48k", "threads": 1, "format": "mp4",
            "fflags": "+bitexact", "flags": "+bitexact", "map_metadata": -1,
        }  # fmt: skip
        if index_first:
            settings["movflags"] = "+faststart"
        command = ffmpeg.output(*streams, str(path), **settings).overwrite_output()
        try:
            command.run(cmd=ffmpeg_binary(), input=frames.tobytes(), capture_stdout=True, capture_stderr=True)
        except ffmpeg.Error as error:
            raise OSError(f"ffmpeg could not write {path}: {error.stderr.decode(errors='replace')[-500:]}") from error
