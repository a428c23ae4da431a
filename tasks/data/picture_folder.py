"""Clips that are a folder of pictures, img_00001.jpg and so on, as UCF-101's helper of PaddleVideo lays them out.

Such a folder has no clock and no sound: its pictures count as RATE a second.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import simplejpeg

from tasks.data import video
from tasks.data.clip_files import PICTURE, STILL_LEVELS, ClipError, Probe, files_of

FIRST = f"img_00001{PICTURE}"
RATE = 25.0


def pictures_of(path: Path) -> list[Path]:
    """The pictures of the clip whose first one `path` names, in order; ClipError where one is missing."""
    files = files_of(path)
    for number, file in enumerate(files, 1):
        if file.name != f"img_{number:05d}{PICTURE}" or not file.is_file():
            raise ClipError("missing", f"there is no {path.parent.name}/img_{number:05d}{PICTURE}")
    return files


def read_picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB."""
    try:
        return simplejpeg.decode_jpeg(path.read_bytes(), "RGB", strict=True)
    except (ValueError, OSError) as error:
        raise ClipError("damaged", f"{path.name}: {' '.join(str(error).split())}") from None


def probe(path: Path) -> Probe:
    """What the folder holds, every picture decoded. ClipError says what is wrong."""
    files = pictures_of(path)
    if len(files) < 2:
        raise ClipError("too short", "1 picture")
    first, change = read_picture(files[0]), 0
    for file in files[1:]:
        image = read_picture(file)
        if image.shape != first.shape:
            raise ClipError("wrong shape", f"{file.name} has another size than {files[0].name}")
        change = max(change, int(np.abs(image.astype(np.int16) - first).max()))
    height, width, _ = first.shape
    return Probe(
        duration=round(len(files) / RATE, 6), fps=RATE, frames=len(files), width=width, height=height, has_audio=False,
        sample_rate=0, silent=False, still=change < STILL_LEVELS,
    )  # fmt: skip


def read_clip(path: Path, preparation: video.Preparation) -> video.StoredClip:
    """The chosen pictures as the stores keep them. ClipError on damage."""
    files = pictures_of(path)
    step = preparation.frame_step
    chosen = files[::step] if step else [files[i] for i in video.choose(len(files), preparation.num_frames)]
    images = {file: video.shrink(read_picture(file), preparation.short_side) for file in dict.fromkeys(chosen)}
    height, width, _ = images[chosen[0]].shape
    jpegs = [video.encode_jpeg(images[file], preparation.quality) for file in chosen]
    return video.StoredClip(jpegs, width, height, None, preparation.sample_rate, len(files) / RATE, RATE)
