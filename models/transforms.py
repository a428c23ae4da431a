"""Sound to log-mel pictures on the device, and augmentations of pictures in the loader and on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.family import InputError

FLOOR = float(torch.finfo(torch.float32).eps)
WINDOW, SHIFT = 0.025, 0.010  # seconds
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation that published weights expect


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


def resized_crop(
    frames: np.ndarray, size: int, rng: np.random.Generator | None, min_area: float, flip: bool = True
) -> Tensor:
    """(T, H, W, 3) uint8 -> (T, 3, size, size) uint8 with channels last in memory, one crop for the whole clip.

    With `rng`: a random part of at least `min_area` of the picture, sides in the ratio 3:4 to 4:3, flipped half of the time
    (`flip`). Without: the shorter side resized to `size`, the middle cut out.
    """
    pictures = torch.from_numpy(frames).permute(0, 3, 1, 2)
    height, width = pictures.shape[-2:]
    top, left, tall, wide = _random_part(rng, height, width, min_area) if rng else _middle(height, width)
    part = pictures[..., top : top + tall, left : left + wide]  # stays uint8: six times faster than in float32
    out = functional.interpolate(part, (size, size), mode="bilinear", align_corners=False, antialias=True)
    if flip and rng is not None and rng.random() < 0.5:
        for picture in out:  # one by one: a picture stays in the processor's cache, a clip does not
            picture.copy_(picture.flip(-1))
    return out


def _middle(height: int, width: int) -> tuple[int, int, int, int]:
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def _random_part(rng: np.random.Generator, height: int, width: int, min_area: float) -> tuple[int, int, int, int]:
    area = rng.uniform(min_area, 1.0) * height * width
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    tall = min(height, max(1, round(math.sqrt(area / ratio))))
    wide = min(width, max(1, round(math.sqrt(area * ratio))))
    return int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1)), tall, wide


# --- pictures on the device, changed alike all through a clip ------------------------------------------------------------

TO_YIQ = (
    (0.299, 0.587, 0.114),
    (0.5959, -0.2746, -0.3213),
    (0.2115, -0.5227, 0.3112),
)  # of RGB: luma, and two of colour
FROM_YIQ = np.linalg.inv(TO_YIQ).tolist()
PIECE = 64  # frames that are changed at once, so that few of them are there as float32
# What RandAugment (Cubuk et al. 2020) does, at the most: degrees, shares of an edge, of a factor, of the range of levels.
OPERATIONS = {
    "rotate": 30.0, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.2, "translate_y": 0.2,
    "brightness": 0.9, "contrast": 0.9, "saturation": 0.9, "solarize": 1.0,
}  # fmt: skip


def draw_changes(rng: np.random.Generator, color: float, hue: float, num_operations: int) -> dict[str, Tensor]:
    """What `change` does to a clip: jitter of colours, and so many of OPERATIONS, each in any strength; {} = nothing.

    color (4,): factors of brightness, contrast and saturation from 1 - `color` to 1 + `color`, and turns of the hue up to
    `hue`. With operations too: affine (2, 3), and solarize (), the level from which levels are inverted.
    """
    if not (color or hue or num_operations):
        return {}
    factors = np.append(rng.uniform(1 - color, 1 + color, 3), rng.uniform(-hue, hue))
    affine, solarize = np.eye(3), 256.0
    for name in rng.choice(list(OPERATIONS), num_operations):
        strength = float(rng.uniform(-1, 1)) * OPERATIONS[name]
        if name == "solarize":
            solarize = min(solarize, 256 * (1 - abs(strength)))
        elif name in ("brightness", "contrast", "saturation"):
            factors[("brightness", "contrast", "saturation").index(name)] *= 1 + strength
        else:
            affine = _affine(name, strength) @ affine
    changes = {"color": torch.from_numpy(factors).float()}
    if num_operations:
        changes |= {"affine": torch.from_numpy(affine[:2]).float(), "solarize": torch.tensor(solarize)}
    return changes


def _affine(name: str, strength: float) -> np.ndarray:
    """(3, 3) of an operation that moves the points of a picture, whose edges are 2 long."""
    if name == "rotate":
        sine, cosine = math.sin(math.radians(strength)), math.cos(math.radians(strength))
        return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    moved = np.eye(3)
    places = {"shear_x": (0, 1), "shear_y": (1, 0), "translate_x": (0, 2), "translate_y": (1, 2)}
    moved[places[name]] = strength * (2 if name.startswith("translate") else 1)
    return moved


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def change(frames: Tensor, changes: Mapping[str, Tensor]) -> Tensor:
    """(B, T, 3, H, W) uint8 with each clip's own draw of `draw_changes`, stacked; the operations first, colours after."""
    if "color" not in changes:
        return frames
    return torch.cat([_change(piece.float(), changes) for piece in frames.split(PIECE, 1)], 1)


def _change(frames: Tensor, changes: Mapping[str, Tensor]) -> Tensor:
    if "affine" in changes:
        frames = solarized(moved(frames, changes["affine"]), changes["solarize"])
    return (recolored(frames, changes["color"]) + 0.5).clamp(0, 255).to(torch.uint8)


def moved(frames: Tensor, affine: Tensor) -> Tensor:
    """(B, T, 3, H, W) float32, each clip's points moved by its (2, 3); grey where nothing comes from."""
    clips, _, _, height, width = frames.shape
    grid = functional.affine_grid(affine, [clips, 1, height, width], align_corners=False)
    out = functional.grid_sample(frames.flatten(1, 2) - 127.5, grid, mode="bilinear", align_corners=False)
    return out.view_as(frames) + 127.5


def solarized(frames: Tensor, level: Tensor) -> Tensor:
    """(B, T, 3, H, W) in [0, 255], inverted from each clip's `level` (B,) on; 256 = not at all."""
    return torch.where(frames >= level[:, None, None, None, None], 255 - frames, frames)


def recolored(frames: Tensor, color: Tensor) -> Tensor:
    """(B, T, 3, H, W) float32 with each clip's factors of brightness, contrast and saturation, and turns of its hue, (B, 4).

    Contrast is that to a frame's mean luma; the hue turns in the plane of I and Q, which leaves the luma as it is.
    """
    brightness, contrast = (color[:, i, None, None, None, None] for i in range(2))
    to_yiq, from_yiq = torch.tensor([TO_YIQ, FROM_YIQ]).to(frames.device, non_blocking=True)
    frames = frames * brightness
    mean = torch.einsum("btchw,c->bthw", frames, to_yiq[0]).mean((-2, -1))[:, :, None, None, None]
    frames = contrast * frames + (1 - contrast) * mean
    saturation, angle = color[:, 2], 2 * math.pi * color[:, 3]
    sine, cosine = saturation * angle.sin(), saturation * angle.cos()
    one, none = torch.ones_like(sine), torch.zeros_like(sine)
    turn = torch.stack([one, none, none, none, cosine, -sine, none, sine, cosine], -1).view(-1, 3, 3)
    return torch.einsum("btchw,bdc->btdhw", frames, from_yiq @ turn @ to_yiq)
