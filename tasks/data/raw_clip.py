"""A clip's frames straight from its file, one at a time, however long it is."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tasks.data import picture_folder, video
from tasks.data.clip_files import is_pictures


@dataclass(frozen=True)
class RawClip:
    """What is known of a clip before a frame of it is decoded."""

    num_frames: int
    fps: float
    seconds: Callable[[int], float]  # from the first frame to the one of this number
    # read(numbers) -> number and (H, W, 3) uint8 RGB of each of these frames; ClipError where some cannot be had
    read: Callable[[Iterable[int]], Iterator[tuple[int, np.ndarray]]]


def open_clip(source: Path | io.BytesIO) -> RawClip:
    """A video, or a folder of pictures that its first one names. ClipError says what is wrong with it."""
    if isinstance(source, Path) and is_pictures(source):
        files = picture_folder.pictures_of(source)
        return RawClip(
            len(files),
            picture_folder.RATE,
            lambda number: number / picture_folder.RATE,
            lambda numbers: ((number, picture_folder.read_picture(files[number])) for number in numbers),
        )
    track = video.outline(source)
    _, fps = video.timing(track)
    return RawClip(
        len(track.shown),
        fps,
        lambda number: (track.shown[number] - track.shown[0]) * track.time_base,
        partial(video.pictures, source, track),
    )
