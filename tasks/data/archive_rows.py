"""Clips that are rows of FAVDBench's archives, of which no video need be there: frame_tsv/{split}_32frames.img.tsv/ID.row.

Such a path names the archive as if it were a folder, and the row by the last part of its key, without a video's ending. The
pictures are taken as they are, the sound from audio_hdf/{split}_mp3.hdf beside frame_tsv/, or from audio_mp3/{split}/ID.mp3.
An id like -05wY41ht1s_123000_133000 tells the duration, milliseconds from and to; of others it is the sound's.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import simplejpeg

from models.family import InputError
from tasks import storage
from tasks.data import clip_files, video
from tasks.data.audio_store import AudioShard
from tasks.data.clip_files import STILL_LEVELS, ClipError, Probe
from tasks.data.frame_store import FrameShard
from tasks.data.sound_files import read_sound

TIMES = re.compile(r".+_(\d+)_(\d+)", re.ASCII)
BLANK = 64  # bytes: a longer line is not empty, and not copied to see it
SPAN = 16000  # Hz at which a probe hears


def probe(path: Path) -> Probe:
    """What a row says, every picture and the whole sound decoded. ClipError says what is wrong with it."""
    images = [_decode(jpeg, number) for number, jpeg in enumerate(_jpegs(path))]
    if len(images) < 2:
        raise ClipError("too short", f"{len(images)} pictures")
    if any(image.shape != images[0].shape for image in images):
        raise ClipError("wrong shape", "its pictures are of several sizes")
    if not any(image.any() for image in images):
        raise ClipError("no video", "all pictures are black, as the original writes them for a video that it lacks")
    found = _sound(path, SPAN)
    wave, rate = found or (np.zeros(0, np.int16), 0)
    duration = _duration(path, len(wave) / SPAN)
    height, width, _ = images[0].shape
    first = images[0].astype(np.int16)
    return Probe(
        duration=duration, fps=_rate(len(images), duration), frames=len(images), width=width, height=height,
        has_audio=found is not None, sample_rate=rate, silent=found is not None and video.is_silent(wave),
        still=all(int(np.abs(image - first).max()) < STILL_LEVELS for image in images[1:]),
    )  # fmt: skip


def read_clip(path: Path, preparation: video.Preparation) -> video.StoredClip:
    """The chosen pictures, as they are or, where they are larger than asked, made smaller; and the sound. ClipError on damage."""
    jpegs, step = _jpegs(path), preparation.frame_step
    if not jpegs:
        raise ClipError("too short", "0 pictures")
    chosen = jpegs[::step] if step else [jpegs[k] for k in video.choose(len(jpegs), preparation.num_frames)]
    found = _sound(path, preparation.sample_rate)
    wave = None if found is None else found[0]
    duration = _duration(path, 0.0 if wave is None else len(wave) / preparation.sample_rate)
    fps = _rate(len(jpegs), duration)
    if step and not fps:
        raise ClipError("too short", "pictures of which neither id nor sound tells the time")
    height, width, _ = _decode(jpegs[0], 0).shape
    if 0 < preparation.short_side < min(height, width):
        small = {
            jpeg: video.shrink(_decode(jpeg, k), preparation.short_side)
            for k, jpeg in enumerate(dict.fromkeys(chosen))
        }
        height, width, _ = small[chosen[0]].shape
        coded = {jpeg: video.encode_jpeg(image, preparation.quality) for jpeg, image in small.items()}
        chosen = [coded[jpeg] for jpeg in chosen]
    return video.StoredClip(chosen, width, height, wave, preparation.sample_rate, duration, fps)


def checksum(path: Path) -> str:
    """SHA-256 of a row: of its pictures' bytes and its sound's, wherever in the archives they lie."""
    total = hashlib.sha256()
    for jpeg in _jpegs(path):
        total.update(hashlib.sha256(jpeg).digest())
    coded = _coded_sound(path)
    total.update(coded if isinstance(coded, bytes) else storage.file_digest(coded).encode() if coded else b"")
    return total.hexdigest()


def _duration(path: Path, heard: float) -> float:
    match = TIMES.fullmatch(path.stem)
    told = (int(match[2]) - int(match[1])) / 1000 if match else 0.0
    return round(told if told > 0 else heard, 6)


def _rate(frames: int, duration: float) -> float:
    return round(frames / duration, 6) if duration else 0.0


# --- pictures --------------------------------------------------------------------------------------------------------------


def _jpegs(path: Path) -> list[bytes]:
    if not path.parent.is_file():
        raise ClipError("missing", f"there is no {path.parent.name}")
    shard, rows = _frames(path.parent, path.parent.stat().st_mtime_ns)
    if path.stem not in rows:
        raise ClipError("missing", f"{path.parent.name} has no row of that id")
    number = rows[path.stem]
    try:
        return shard.jpegs(number, range(max(shard.num_frames(number), 0)))
    except InputError:
        raise ClipError("damaged", f"row {number + 1} of {path.parent.name} is no base64") from None


def _decode(jpeg: bytes, number: int) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(jpeg, "RGB", strict=True)
    except ValueError as error:
        raise ClipError("damaged", f"picture {number + 1}: {' '.join(str(error).split())}") from None


@lru_cache(maxsize=8)
def _frames(path: Path, _time: int) -> tuple[FrameShard, dict[str, int]]:
    """An archive and its rows by id, opened once a process as long as the file stays the same."""
    shard = open_frames(path)
    rows: dict[str, int] = {}
    for number in range(len(shard)):
        try:
            name = clip_files.row_id(shard.key(number))
        except ValueError:  # no tab, or no UTF-8
            raise InputError(f"{path} row {number + 1} has no key and pictures, parted by tabs; fetch it again") from None
        if name in rows:
            raise InputError(f"{path} row {number + 1}: {name} stands in row {rows[name] + 1} already; keep one")
        rows[name] = number
    return shard, rows


def open_frames(path: Path) -> FrameShard:
    """An archive of frames by its index, which is counted anew where there is none. InputError for an index of another file."""
    indices = [index for ending in (".lineidx.8b", ".lineidx") if (index := path.with_suffix(ending)).is_file()]
    if not path.stat().st_size:
        return FrameShard(path, np.empty(0, "<u8"))
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if not indices:
            return FrameShard(path, line_offsets(data))
        try:
            shard = FrameShard(path)
        except ValueError:
            raise InputError(f"{indices[0]} is no list of offsets; delete it, it is not needed") from None
        if not _fits(shard.offsets, data):
            raise InputError(
                f"{indices[0].name} is not the index of {path}, or that file is cut short; fetch it again, or delete "
                "its .lineidx and .lineidx.8b, which are not needed"
            )
        return shard


def line_offsets(data: mmap.mmap | bytes) -> np.ndarray:
    """(rows,) where each line begins that is not empty."""
    offsets, at = [], 0
    while at < len(data):
        end = data.find(b"\n", at)
        end = len(data) if end < 0 else end
        if end - at > BLANK or data[at:end].strip():
            offsets.append(at)
        at = end + 1
    return np.array(offsets, "<u8")


def _fits(offsets: np.ndarray, data: mmap.mmap) -> bool:
    """Whether every row begins after a line break, and the last one ends the file."""
    if not len(offsets) or int(offsets[0]) or (np.diff(offsets.astype(np.int64)) <= 0).any():
        return False
    if int(offsets[-1]) >= len(data) or any(data[int(at) - 1] != 10 for at in offsets[1:]):
        return False
    return data.find(b"\n", int(offsets[-1])) in (-1, len(data) - 1)


# --- sound -----------------------------------------------------------------------------------------------------------------


def _sound(path: Path, sample_rate: int) -> tuple[np.ndarray, int] | None:
    """(N,) int16 and the file's own Hz; None where nobody has recorded any."""
    coded = _coded_sound(path)
    if coded is None:
        return None
    return read_sound(io.BytesIO(coded) if isinstance(coded, bytes) else coded, sample_rate, f"{path.stem}.mp3")


def _coded_sound(path: Path) -> bytes | Path | None:
    """The bytes of the row's sound in the HDF5 file, else its file, else None."""
    archive, single = clip_files.row_sounds(path)
    if archive is not None:
        shard, rows = _sounds(archive, archive.stat().st_mtime_ns)
        if path.stem in rows:
            stored, _ = shard.stored(rows[path.stem])
            if stored.dtype != np.uint8:
                raise ClipError("foreign", f"{archive.name} holds samples and no mp3")
            return stored.tobytes()
    return single


@lru_cache(maxsize=8)
def _sounds(path: Path, _time: int) -> tuple[AudioShard, dict[str, int]]:
    shard = AudioShard(path)
    try:
        return shard, {clip_files.row_id(name): row for row, name in enumerate(shard.names())}
    except (InputError, KeyError):
        raise InputError(f"{path} is no HDF5 file with audio_name and mp3; fetch it again, or move it away") from None
