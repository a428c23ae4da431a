"""Media files: probing, and the one decode pass that gives a clip's frames and its sound.

Frames are chosen by presentation time. The decoder runs from the last keyframe before a wanted frame, so what comes out is
the frame that is shown at that moment, whatever the group-of-pictures structure.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import simplejpeg

from tasks.data.audio import Resampler


class ClipError(Exception):
    """A clip cannot be used: `reason` is a short word for tables, `detail` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Preparation:
    """How a clip goes into the stores; prediction prepares raw files by the same values."""

    num_frames: int  # per clip, from the first to the last at equal distances
    short_side: int  # pixels; 0 keeps the size
    quality: int  # of the JPEGs, 1 to 100
    sample_rate: int  # Hz, mono


@dataclass(frozen=True)
class StoredClip:
    """What the stores keep of a clip."""

    jpegs: list[bytes]
    width: int
    height: int
    wave: np.ndarray | None  # (N,) int16 mono; None = the file has no sound track
    sample_rate: int


@dataclass(frozen=True)
class Probe:
    """What a media file says of itself, and whether it can be decoded from its first to its last frame."""

    duration: float  # seconds
    fps: float
    frames: int  # counted, not what the container claims
    width: int
    height: int
    has_audio: bool
    sample_rate: int  # Hz of the sound track, 0 without one
    silent: bool  # loudest sample below -60 dBFS
    still: bool  # first, middle and last frame differ by less than one grey level


def open_media(source: Path | io.BytesIO) -> Any:
    """An open container; ClipError where the file is missing, empty or no media file."""
    if isinstance(source, Path):
        if not source.exists():
            raise ClipError("missing", f"{source} is not there")
        if source.stat().st_size == 0:
            raise ClipError("empty", f"{source} has no bytes")
    try:
        return av.open(source if isinstance(source, io.BytesIO) else str(source))
    except (av.error.FFmpegError, OSError) as error:
        raise ClipError("unreadable", f"{_words(error)}") from None


def _words(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def frame_times(container: Any) -> tuple[Any, list[int], list[bool]]:
    """The video stream, presentation times of its packets in order of display (in its time base), and keyframe flags.

    Reads packets without decoding them: cheap, and exact where the container's own frame count is not.
    """
    if not container.streams.video:
        raise ClipError("no video", "the file has no video stream")
    stream = container.streams.video[0]
    try:
        shown = sorted((p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None and p.size)
    except av.error.FFmpegError as error:
        raise ClipError("truncated", f"the packets end early: {_words(error)}") from None
    if not shown:
        raise ClipError("no video", "the video stream has no frames")
    return stream, [pts for pts, _ in shown], [key for _, key in shown]


def choose(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` frames from first to last at equal distances: round(i (n - 1) / (T - 1)); repeats when short."""
    return [round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)]


def read_clip(source: Path | io.BytesIO, preparation: Preparation) -> StoredClip:
    """Decode a file once: `num_frames` JPEGs and the whole sound as 16-bit mono. ClipError on damage."""
    with open_media(source) as container:
        _, times, keys = frame_times(container)
        targets = [times[index] for index in choose(len(times), preparation.num_frames)]
        images, resampler = _decode(container, set(targets), times, keys, preparation)
    lost = [pts for pts in targets if pts not in images]
    if lost:
        raise ClipError("truncated", f"{len(lost)} of the {len(targets)} wanted frames cannot be decoded")
    jpegs = {pts: encode_jpeg(image, preparation.quality) for pts, image in images.items()}
    height, width = next(iter(images.values())).shape[:2]
    wave = resampler.wave() if resampler else None
    return StoredClip([jpegs[pts] for pts in targets], width, height, wave, preparation.sample_rate)


def _decode(
    container: Any, wanted: set[int], times: Sequence[int], keys: Sequence[bool], preparation: Preparation
) -> tuple[dict[int, np.ndarray], Resampler | None]:
    """One pass over the packets of picture and sound; pictures between a wanted frame's keyframes only are decoded."""
    picture = container.streams.video[0]
    picture.codec_context.thread_count = 1
    streams = [picture, *container.streams.audio[:1]]
    resampler = Resampler(preparation.sample_rate) if len(streams) == 2 else None
    groups = _groups(wanted, times, keys)
    images: dict[int, np.ndarray] = {}
    container.seek(0, backward=True, any_frame=False)
    try:
        for packet in container.demux(streams):
            if packet.stream is not picture:
                for frame in packet.decode():
                    resampler.add(frame)  # pyright: ignore[reportOptionalMemberAccess]
                continue
            if packet.pts is not None and not _in_groups(packet.pts, groups):
                continue
            for frame in packet.decode():
                if frame.pts in wanted and frame.pts not in images:
                    images[frame.pts] = scale(frame, preparation.short_side)
    except av.error.FFmpegError as error:
        raise ClipError("truncated", f"decoding stops: {_words(error)}") from None
    return images, resampler


def _groups(wanted: set[int], times: Sequence[int], keys: Sequence[bool]) -> list[tuple[int, int]]:
    """Spans [first, last] of presentation times to decode: whole groups of pictures with a wanted frame in them.

    The group before is kept too: frames shown before a keyframe may be coded after it (open groups).
    """
    starts = [pts for pts, key in zip(times, keys, strict=True) if key] or [times[0]]
    spans: list[tuple[int, int]] = []
    for pts in sorted(wanted):
        k = max(bisect_right(starts, pts) - 1, 0)
        spans.append((starts[k - 1] if k else times[0], starts[k + 1] if k + 1 < len(starts) else times[-1]))
    return spans


def _in_groups(pts: int, groups: list[tuple[int, int]]) -> bool:
    return any(first <= pts <= last for first, last in groups)


def scale(frame: Any, short_side: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB with the shorter side at `short_side` pixels, aspect kept, bilinear; 0 keeps the size."""
    width, height = frame.width, frame.height
    if short_side:
        ratio = short_side / min(width, height)
        width, height = round(width * ratio), round(height * ratio)
    return frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BILINEAR")


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """(H, W, 3) uint8 RGB -> JPEG bytes."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420")


def probe(path: Path) -> Probe:
    """Read all packets, decode the first, middle and last frame and the sound. ClipError says what is wrong."""
    with open_media(path) as container:
        stream, times, keys = frame_times(container)
        base = float(stream.time_base)
        fps = float(stream.average_rate or 0) or (len(times) - 1) / max((times[-1] - times[0]) * base, 1e-9)
        duration = (times[-1] - times[0]) * base + 1 / max(fps, 1e-9)
        ends = [times[0], times[len(times) // 2], times[-1]]
        rate = container.streams.audio[0].rate if container.streams.audio else 0
        width, height = stream.width, stream.height
        images, resampler = _decode(container, set(ends), times, keys, Preparation(3, 32, 90, rate or 16000))
    for name, pts in zip(("first", "middle", "last"), ends, strict=True):
        if pts not in images:
            raise ClipError("truncated", f"the {name} frame cannot be decoded")
    wave = resampler.wave() if resampler else np.zeros(0, np.int16)
    return Probe(
        duration=round(duration, 6),
        fps=round(fps, 6),
        frames=len(times),
        width=width,
        height=height,
        has_audio=resampler is not None and len(wave) > 0,
        sample_rate=rate,
        silent=resampler is not None and (len(wave) == 0 or int(np.abs(wave.astype(np.int32)).max()) < 33),
        still=len(times) > 1 and all(_difference(images[ends[0]], images[pts]) < 1.0 for pts in ends[1:]),
    )


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(np.int16) - second.astype(np.int16)).mean())


def thumbnail(path: Path) -> bytes | None:
    """The first frame as a small JPEG, None where there is none to be had."""
    try:
        with open_media(path) as container:
            for frame in container.decode(video=0):
                return encode_jpeg(scale(frame, 72), 80)
    except (ClipError, av.error.FFmpegError, IndexError):
        return None
    return None
