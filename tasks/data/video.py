"""Media files: probing, and the one decode pass that gives a clip's frames and its sound.

The packets of a file are read twice, and decoded once. The first round decodes the sound and notes when each picture is
shown; only then is it known which pictures are wanted. The second decodes those, from the keyframe that each needs, and
leaves out pictures that no other picture is built on. So what comes out is exactly the frame shown at that moment, and
memory holds no more than what is asked for, of long videos as JPEGs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import av
import av.error
import numpy as np
import simplejpeg
from av.stream import Disposition

from tasks.data.audio import FULL_SCALE, Resampler
from tasks.data.clip_files import STILL_LEVELS, ClipError, Probe, sound_beside
from tasks.data.sound_files import read_sound

SILENT_RMS = 1e-3  # of full scale: -60 dB
SHORTEST = 0.1  # seconds
EARLY_END = (0.5, 0.1)  # seconds, share of the duration: what may be missing at the end by rounding in the container
SKIPPABLE = ("h264", "hevc")  # decoders that heed skip_frame picture by picture
T = TypeVar("T")


@dataclass(frozen=True)
class Preparation:
    """How a clip goes into the stores; prediction prepares raw files by the same values."""

    num_frames: int  # per clip, from the first to the last at equal distances; 0 = by `frame_step`
    short_side: int  # pixels; 0 keeps the size
    quality: int  # of the JPEGs, 1 to 100
    sample_rate: int  # Hz, mono
    frame_step: int = 0  # every such frame from the first on, for videos of any length; 0 = by `num_frames`


@dataclass(frozen=True)
class StoredClip:
    """What the stores keep of a clip."""

    jpegs: list[bytes]
    width: int
    height: int
    wave: np.ndarray | None  # (N,) int16 mono; None = the file has no sound
    sample_rate: int
    duration: float  # seconds
    fps: float  # of the file


@dataclass(frozen=True)
class Track:
    """What a file says of its pictures without decoding them. Times are in units of `time_base` seconds."""

    time_base: float
    rate: float  # frames a second that the container states, 0 where it does not
    width: int
    height: int
    sample_rate: int  # of the sound, 0 without one
    coded: list[int]  # presentation times in the order of decoding
    keys: list[bool]  # whether decoding may begin there
    shown: list[int]  # presentation times in their order, without those that the container's edit list hides


def open_media(source: Path | io.BytesIO) -> Any:
    """An open container; ClipError where the file is missing, empty or no media file."""
    try:
        if isinstance(source, io.BytesIO):
            source.seek(0)
        elif source.stat().st_size == 0:
            raise ClipError("empty", "the file has no bytes")
        # Titles in broken UTF-8 are common and of no interest.
        return av.open(source if isinstance(source, io.BytesIO) else str(source), metadata_errors="ignore")
    except FileNotFoundError:
        raise ClipError("missing", "there is no such file") from None
    except (av.error.FFmpegError, OSError) as error:
        raise ClipError("unreadable", _words(error)) from None


def _words(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def _stamp(item: Any) -> int | None:
    """Presentation time of a packet or frame; formats without any, such as AVI, have decoding times at least."""
    return item.pts if item.pts is not None else item.dts


def _picture(container: Any) -> Any:
    """The first video stream that is no cover picture; its decoder set to one thread."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            stream.codec_context.thread_count = 1
            return stream
    raise ClipError("no video", "the file has no video stream")


def _sweep(source: Path | io.BytesIO, sample_rate: int) -> tuple[Track, np.ndarray | None]:
    """Read all packets: the pictures' times noted, the sound decoded to (N,) int16 or None. ClipError on damage.

    A sample rate of 0 leaves the sound alone. A file without any is heard by its sound_beside.
    """
    packets: list[tuple[int, bool, bool]] = []
    end = 0.0
    with open_media(source) as container:
        picture, sounds = _picture(container), container.streams.audio[:1]
        expected, resampler = len(picture.index_entries), Resampler(sample_rate)
        try:
            for packet in container.demux(picture, *sounds):
                if packet.is_corrupt:
                    raise ClipError("truncated", f"the file ends in the middle of a packet after {end:.2f} s")
                if packet.stream is not picture and sample_rate:
                    for frame in packet.decode():
                        resampler.add(frame)
                if packet.size and (time := _stamp(packet)) is not None:
                    end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
                    if packet.stream is picture:
                        packets.append((time, packet.is_keyframe, packet.is_discard))
        except av.error.FFmpegError as error:
            raise ClipError("damaged", f"{_words(error)} after {end:.2f} s") from None
        wave = resampler.wave()
        rate = sounds[0].rate if len(wave) else 0
        if sample_rate and not rate and isinstance(source, Path) and (beside := sound_beside(source)):
            wave, rate = read_sound(beside, sample_rate, beside.name)
        track = Track(
            float(picture.time_base), float(picture.average_rate or 0), picture.width, picture.height, rate,
            [time for time, _, _ in packets], [key for _, key, _ in packets],
            sorted({time for time, _, hidden in packets if not hidden}),
        )  # fmt: skip
        _check_whole(
            track, expected, end, (container.start_time or 0) / av.time_base, (container.duration or 0) / av.time_base
        )
    return track, wave if len(wave) else None


def _check_whole(track: Track, expected: int, end: float, start: float, duration: float) -> None:
    """ClipError where the container promises more packets, or seconds, than there are."""
    if len(track.coded) < expected:
        raise ClipError("truncated", f"{len(track.coded)} of {expected} frames are in the file")
    if start + duration - end > EARLY_END[0] + EARLY_END[1] * duration:
        raise ClipError("truncated", f"the file ends at {end:.2f} s of {start + duration:.2f} s")
    if not track.shown:
        raise ClipError("no video", "the video stream has no frames")


def choose(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` frames evenly from first to last: round(i (n - 1) / (T - 1)); repeats when short."""
    return [round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)]


def read_clip(source: Path | io.BytesIO, preparation: Preparation) -> StoredClip:
    """Decode a file once: the chosen frames as JPEGs and the whole sound as 16-bit mono. ClipError on damage."""
    track, wave = _sweep(source, preparation.sample_rate)
    duration, fps = timing(track)
    if preparation.frame_step and not fps:
        raise ClipError("too short", "a single frame without a frame rate")
    chosen = choose(len(track.shown), preparation.num_frames)
    targets = track.shown[:: preparation.frame_step] if preparation.frame_step else [track.shown[i] for i in chosen]

    def keep(frame: Any) -> tuple[bytes, tuple[int, ...]]:
        image = scale(frame, preparation.short_side)
        return encode_jpeg(image, preparation.quality), image.shape

    kept = _decode(source, track, set(targets), keep)
    jpegs, (height, width, _) = [kept[time][0] for time in targets], kept[targets[0]][1]
    return StoredClip(jpegs, width, height, wave, preparation.sample_rate, duration, fps)


def timing(track: Track) -> tuple[float, float]:
    """Duration in seconds and frames a second, 0 where a single picture tells none."""
    span = (track.shown[-1] - track.shown[0]) * track.time_base
    fps = track.rate or ((len(track.shown) - 1) / span if span else 0.0)
    return round(span + (1 / fps if fps else 0.0), 6), round(fps, 6)


def outline(source: Path | io.BytesIO) -> Track:
    """What a file says of its pictures. ClipError on damage."""
    return _sweep(source, 0)[0]


def pictures(source: Path | io.BytesIO, track: Track, numbers: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Number and (H, W, 3) uint8 RGB of the shown frames that have these numbers, one after another as they are decoded.

    That is their order, but for those that only a second attempt gives. ClipError when all others have been handed over.
    """
    places = {track.shown[number]: number for number in numbers}
    for time, frame in _stream(source, track, set(places)):
        yield places[time], scale(frame, 0)


def _decode(source: Path | io.BytesIO, track: Track, wanted: set[int], keep: Callable[[Any], T]) -> dict[int, T]:
    """Presentation time -> what `keep` makes of the frame, of all wanted ones; ClipError tells which cannot be had."""
    return {time: keep(frame) for time, frame in _stream(source, track, wanted)}


def _stream(source: Path | io.BytesIO, track: Track, wanted: set[int]) -> Iterator[tuple[int, Any]]:
    """Presentation time and frame of all wanted ones; ClipError at the end tells which cannot be had."""
    missing = set(wanted)
    for skip in (True, False):
        # Where the container's keyframes are no clean entries, the second round decodes every packet.
        needed = _needed(track, wanted) if skip else set(track.coded)
        with open_media(source) as container:
            try:
                for frame in _frames(container, track, needed, wanted, skip):
                    time = _stamp(frame)
                    if time in missing and not frame.is_corrupt:
                        missing.discard(time)
                        yield time, frame
            except av.error.FFmpegError as error:
                raise ClipError("damaged", f"decoding stops: {_words(error)}") from None
        if not missing:
            return
    at = min(missing) * track.time_base
    raise ClipError("damaged", f"{len(missing)} of {len(wanted)} frames cannot be decoded, from {at:.2f} s")


def _needed(track: Track, wanted: set[int]) -> set[int]:
    """Times of the packets to decode: from the keyframe that a wanted picture starts from to the picture itself.

    A picture shown before a keyframe but coded after it (open groups of pictures) starts from the keyframe before.
    """
    needed: set[int] = set()
    entries: list[int] = []  # positions of keyframes so far
    for position, (time, key) in enumerate(zip(track.coded, track.keys, strict=True)):
        if key:
            entries.append(position)
        if time in wanted:
            first = next((entry for entry in reversed(entries) if track.coded[entry] <= time), 0)
            needed.update(track.coded[first : position + 1])
    return needed


def _frames(container: Any, track: Track, needed: set[int], wanted: set[int], skip: bool) -> Iterator[Any]:
    """Decoded frames of the needed packets; with `skip`, pictures neither wanted nor built upon are left out."""
    picture = _picture(container)
    decoder = picture.codec_context
    skip = skip and decoder.name in SKIPPABLE
    left, running = sum(time in needed for time in track.coded), False
    for packet in container.demux(picture):
        time = _stamp(packet)
        if packet.size and time in needed:
            # One thread, so the decoder is done with a packet before the next setting.
            decoder.skip_frame = "NONREF" if skip and time not in wanted else "DEFAULT"
            yield from decoder.decode(packet)
            left, running = left - 1, True
            if left == 0:
                break
        elif running:  # a gap: what the decoder still holds comes out, and it starts anew at the next keyframe
            yield from decoder.decode(None)
            decoder.flush_buffers()
            running = False
    if running:
        yield from decoder.decode(None)


def scale(frame: Any, short_side: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright, the shorter side `short_side` pixels long (0 keeps the size), bilinear."""
    width, height = frame.width, frame.height
    if short_side:
        ratio = short_side / min(width, height)
        width, height = round(width * ratio), round(height * ratio)
    image = frame.reformat(width, height, "rgb24", interpolation="BILINEAR", threads=1).to_ndarray()
    return np.rot90(image, round(frame.rotation / 90))


def shrink(image: np.ndarray, short_side: int) -> np.ndarray:
    """The same of (H, W, 3) uint8 RGB that was decoded already."""
    return scale(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"), short_side)


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """(H, W, 3) uint8 RGB -> JPEG bytes."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420")


def probe(path: Path) -> Probe:
    """Read all packets, decode the sound and five frames from first to last. ClipError says what is wrong."""
    track, wave = _sweep(path, 16000)
    shown = track.shown
    duration, fps = timing(track)
    if len(shown) < 2 or duration < SHORTEST:
        raise ClipError("too short", f"{len(shown)} frames in {duration:.3f} s")
    images = _decode(path, track, {shown[index] for index in choose(len(shown), 5)}, lambda frame: scale(frame, 32))
    return Probe(
        duration=duration,
        fps=fps,
        frames=len(shown),
        width=track.width,
        height=track.height,
        has_audio=wave is not None,
        sample_rate=track.sample_rate,
        silent=wave is not None and is_silent(wave),
        still=_unchanging(list(images.values())),
    )


def is_silent(wave: np.ndarray) -> bool:
    """Whether the root mean square of (N,) int16 is below -60 dB of full scale."""
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))) / FULL_SCALE < SILENT_RMS


def _unchanging(images: list[np.ndarray]) -> bool:
    first = images[0].astype(np.int16)
    return all(int(np.abs(image - first).max()) < STILL_LEVELS for image in images[1:])


def thumbnail(path: Path) -> bytes | None:
    """The first frame as a small JPEG, None where there is none to be had."""
    try:
        with open_media(path) as container:
            for frame in container.decode(video=0):
                return encode_jpeg(scale(frame, 108), 80)
    except (ClipError, av.error.FFmpegError, IndexError):
        return None
    return None
