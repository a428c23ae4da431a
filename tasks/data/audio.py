"""Sound: resampling while decoding, and the codecs of the audio store."""

from __future__ import annotations

import io
from typing import Any, Literal

import av
import numpy as np

Codec = Literal["pcm16", "flac", "mp3"]
FULL_SCALE = 32768.0
BLOCK = 1 << 16  # samples resampled at once


class Resampler:
    """Collects decoded audio frames as 16-bit mono at one rate."""

    def __init__(self, sample_rate: int) -> None:
        self._rate = sample_rate
        self._source: tuple[str, str, int] | None = None
        self._waiting = av.AudioFifo()  # a call of the resampler costs more than the samples of one AAC frame
        self._resampler: Any = None
        self._pieces: list[np.ndarray] = []

    def add(self, frame: Any) -> None:
        """Take one decoded frame of any format, layout and rate; they may change on the way, as in HE-AAC."""
        source = (frame.format.name, frame.layout.name, frame.sample_rate)
        if source != self._source:
            self._finish()
            self._waiting, self._source = av.AudioFifo(), source
            self._resampler = av.AudioResampler(format="s16", layout="mono", rate=self._rate)
        frame.pts = None
        self._waiting.write(frame)
        if self._waiting.samples >= BLOCK:
            self._take(self._resampler.resample(self._waiting.read()))

    def wave(self) -> np.ndarray:
        """(N,) int16 of everything added; the last call."""
        self._finish()
        return np.concatenate(self._pieces) if self._pieces else np.zeros(0, np.int16)

    def _finish(self) -> None:
        if self._resampler is not None:
            if self._waiting.samples:
                self._take(self._resampler.resample(self._waiting.read()))
            self._take(self._resampler.resample(None))
            self._resampler = None

    def _take(self, frames: list[Any]) -> None:
        self._pieces += [frame.to_ndarray().reshape(-1).copy() for frame in frames]


def encode(wave: np.ndarray, sample_rate: int, codec: Codec) -> np.ndarray:
    """(N,) int16 -> what the audio store keeps: int16 samples for pcm16, uint8 bytes of a file for flac and mp3."""
    if codec == "pcm16":
        return wave
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=codec) as container:
        stream: Any = container.add_stream("libmp3lame" if codec == "mp3" else "flac", rate=sample_rate)
        stream.layout = "mono"
        stream.format = "s16p" if codec == "mp3" else "s16"
        frame = av.AudioFrame.from_ndarray(wave.reshape(1, -1), format="s16", layout="mono")
        frame.sample_rate = sample_rate
        fitted = av.AudioResampler(format=stream.format, layout="mono", rate=sample_rate, frame_size=stream.frame_size)
        for piece in [*fitted.resample(frame), *fitted.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return np.frombuffer(buffer.getvalue(), np.uint8)


def decode(stored: np.ndarray, sample_rate: int | None) -> tuple[np.ndarray, int]:
    """What the audio store kept -> ((N,) float32 in [-1, 1], Hz). Encoded bytes tell their own rate."""
    if stored.dtype == np.int16:
        if sample_rate is None:
            raise ValueError("raw samples need the store's sample_rate attribute")
        return np.divide(stored, FULL_SCALE, dtype=np.float32), sample_rate
    with av.open(io.BytesIO(stored.tobytes()), "r") as container:
        rate = container.streams.audio[0].rate
        resampler = Resampler(rate)
        for frame in container.decode(audio=0):
            resampler.add(frame)
        return resampler.wave().astype(np.float32) / FULL_SCALE, rate
