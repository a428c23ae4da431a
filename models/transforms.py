"""Sound to log-mel pictures on the device, and augmentations of pictures in the loader."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.family import InputError

FLOOR = float(torch.finfo(torch.float32).eps)
WINDOW, SHIFT = 0.025, 0.010  # seconds


class LogMel(nn.Module):
    """Kaldi's log-mel filter bank (as in AST, Gong et al. 2021): 25 ms Hann windows every 10 ms, no padding at the edges.

    Each window loses its mean, is pre-emphasised by 0.97 and goes through an FFT of the next power of two; triangular
    filters stand at equal distances on the mel scale 1127 ln(1 + f / 700) from 20 Hz to half the sample rate.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, sample_rate: int, num_mel_bins: int) -> None:
        super().__init__()
        self.length, self.shift = round(sample_rate * WINDOW), round(sample_rate * SHIFT)
        self.size = 1 << (self.length - 1).bit_length()
        self.register_buffer("window", torch.hann_window(self.length, periodic=False), persistent=False)
        self.register_buffer("filters", mel_filters(sample_rate, self.size, num_mel_bins), persistent=False)

    def num_frames(self, num_samples: int) -> int:
        """Windows that fit into a waveform."""
        return max(0, (num_samples - self.length) // self.shift + 1)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, wave: Tensor) -> Tensor:
        """(B, N) waveform in [-1, 1] -> (B, frames, mel) natural logarithm of the filters' power."""
        frames = wave.float().unfold(-1, self.length, self.shift)  # (B, frames, length)
        frames = frames - frames.mean(-1, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], -1)
        frames = (frames - 0.97 * before) * self.window
        power = torch.view_as_real(torch.fft.rfft(frames, n=self.size)).square().sum(-1)
        return (power @ self.filters).clamp(min=FLOOR).log()


def mel_filters(sample_rate: int, size: int, num_mel_bins: int) -> Tensor:
    """(size / 2 + 1, mel) weights of the triangular filters; the highest frequency belongs to none, as in Kaldi."""

    def to_mel(frequency: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(frequency / 700.0)

    ends = to_mel(torch.tensor([20.0, sample_rate / 2], dtype=torch.float64))
    edges = torch.linspace(float(ends[0]), float(ends[1]), num_mel_bins + 2, dtype=torch.float64)
    at = to_mel(torch.arange(size // 2, dtype=torch.float64) * sample_rate / size)[:, None]
    rise, fall = (at - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - at) / (edges[2:] - edges[1:-1])
    filters = torch.minimum(rise, fall).clamp(min=0).float()
    return torch.cat([filters, torch.zeros(1, num_mel_bins)])


def standardise(mel: Tensor, num_frames: Tensor, mean: float, deviation: float) -> Tensor:
    """(x - mean) / deviation of (B, frames, mel); frames past `num_frames` (B,) become 0, which is the average sound."""
    inside = torch.arange(mel.shape[1], device=mel.device) < num_frames[:, None]
    return (mel - mean) / deviation * inside[:, :, None]


def fit_mel(mel: np.ndarray, num_frames: int, num_mel_bins: int, where: str) -> tuple[Tensor, Tensor]:
    """(frames, mel) made elsewhere -> (num_frames, mel) float32 filled up with zeros, and its true length as int64.

    InputError, naming the clip by `where`, for another number of bins and for more frames than the model takes.
    """
    if mel.shape[1] != num_mel_bins or len(mel) > num_frames:
        raise InputError(
            f"{where}: the spectrogram has {len(mel)} frames of {mel.shape[1]} mel bins, the model takes up to {num_frames} "
            f"of {num_mel_bins}; set num_mel_bins to {mel.shape[1]} and audio_duration (10 ms a frame) to what holds them"
        )
    fitted = torch.zeros(num_frames, num_mel_bins)
    fitted[: len(mel)] = torch.from_numpy(mel)
    return fitted, torch.tensor(len(mel))


def hide_bands(mel: Tensor, bands: Tensor) -> Tensor:
    """SpecAugment (Park et al. 2019) on standardised (B, frames, mel): bands (B, 4) = first, width in time and in mel."""
    time = torch.arange(mel.shape[1], device=mel.device)
    bins = torch.arange(mel.shape[2], device=mel.device)
    start, width, low, height = (bands[:, i, None] for i in range(4))
    hidden_time = (time >= start) & (time < start + width)
    hidden_bins = (bins >= low) & (bins < low + height)
    return mel * ~hidden_time[:, :, None] * ~hidden_bins[:, None, :]


def draw_bands(rng: np.random.Generator, num_frames: int, num_mel_bins: int, time_mask: int, freq_mask: int) -> Tensor:
    """(4,) int64 for `hide_bands`, widths uniform from 0 to the given greatest ones."""
    width, height = int(rng.integers(0, time_mask + 1)), int(rng.integers(0, freq_mask + 1))
    start = int(rng.integers(0, max(num_frames - width, 0) + 1))
    low = int(rng.integers(0, max(num_mel_bins - height, 0) + 1))
    return torch.tensor([start, width, low, height])


def resized_crop(frames: np.ndarray, size: int, rng: np.random.Generator | None, min_area: float) -> Tensor:
    """(T, H, W, 3) uint8 -> (T, 3, size, size) uint8, one crop for the whole clip.

    With `rng`: a random part of at least `min_area` of the picture, sides in the ratio 3:4 to 4:3, flipped half of the time.
    Without: the shorter side resized to `size`, the middle cut out.
    """
    pictures = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    height, width = pictures.shape[-2:]
    top, left, tall, wide = _random_part(rng, height, width, min_area) if rng else _middle(height, width)
    part = pictures[..., top : top + tall, left : left + wide]  # stays uint8: six times faster than in float32
    out = functional.interpolate(part, (size, size), mode="bilinear", align_corners=False, antialias=True)
    if rng is not None and rng.random() < 0.5:
        out = out.flip(-1)
    return out.contiguous()


def _middle(height: int, width: int) -> tuple[int, int, int, int]:
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def _random_part(rng: np.random.Generator, height: int, width: int, min_area: float) -> tuple[int, int, int, int]:
    area = rng.uniform(min_area, 1.0) * height * width
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    tall = min(height, max(1, round(math.sqrt(area / ratio))))
    wide = min(width, max(1, round(math.sqrt(area * ratio))))
    return int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1)), tall, wide
