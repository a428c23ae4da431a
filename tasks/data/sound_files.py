"""Sound that is a file of its own: decoded as a video's track is, whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path

import av
import av.error
import numpy as np

from tasks.data.audio import Resampler
from tasks.data.clip_files import ClipError


def read_sound(source: Path | io.BytesIO, sample_rate: int, called: str) -> tuple[np.ndarray, int]:
    """((N,) int16 mono at `sample_rate`, Hz of the file) of its first track; `called` is how an error names it.

    ClipError for what cannot be decoded to its end, or holds no sound.
    """
    resampler, rate = Resampler(sample_rate), 0
    file = source if isinstance(source, io.BytesIO) else str(source)
    try:
        with av.open(file, "r", metadata_errors="ignore") as container:
            for stream in container.streams.audio[:1]:
                rate = stream.rate
                for frame in container.decode(stream):
                    resampler.add(frame)
    except (av.error.FFmpegError, OSError) as error:
        words = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ClipError("damaged", f"the sound {called} cannot be decoded: {words}") from None
    wave = resampler.wave()
    if not len(wave):
        raise ClipError("damaged", f"{called} holds no sound")
    return wave, rate
