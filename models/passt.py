"""PaSST (Koutini et al. 2022): its spectrum of a waveform, and the ViT that reads some patches of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.attention import Block, initialise
from models.family import InputError
from models.transforms import SHIFT, WINDOW
from models.weights import Found, Rules, State, rename

PATCH = 16  # mel bins and frames of a patch
TOP = 15_000.0  # Hz, where PaSST's mel bank ends
NAMES: Rules = ((r"^net\.", ""), (r"^patch_embed\.proj\.", "patch."), (r"\.mlp\.fc", ".fc"))  # published ones, and ours
CLASSIFIERS = r"^(net\.)?head(_dist)?\."


class Spectrum(nn.Module):
    """PaSST's log-mel: 25 ms Hann windows in the middle of each 10 ms step, edges reflected, an FFT of the next power of two.

    The waveform is pre-emphasised by 0.97, as a whole. Kaldi's triangular filters stand at equal distances on the mel
    scale 1127 ln(1 + f / 700) from 0 Hz to 15 kHz, or to 1 kHz below half the sample rate where that is less.
    """

    window: Tensor
    ends: Tensor
    filters: Tensor

    def __init__(self, sample_rate: int, num_mel_bins: int) -> None:
        super().__init__()
        self.sample_rate, self.num_mel_bins = sample_rate, num_mel_bins
        self.length, self.shift = round(sample_rate * WINDOW), round(sample_rate * SHIFT)
        self.size = 1 << (self.length - 1).bit_length()
        ends = torch.tensor([0.0, top(sample_rate)])
        filters = mel_bank(ends.double(), sample_rate, self.size, num_mel_bins).float()
        self.register_buffer("window", torch.hann_window(self.length, periodic=False), persistent=False)
        self.register_buffer("ends", ends, persistent=False)  # (2,) Hz
        self.register_buffer("filters", filters, persistent=False)  # (size / 2 + 1, mel)

    def num_frames(self, num_samples: Tensor) -> Tensor:
        """Frames whose middle lies in so many samples: of (B,) int64 the same."""
        return (num_samples + self.shift - 1) // self.shift

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, wave: Tensor, ends: Tensor | None = None) -> Tensor:
        """(B, N) waveform in [-1, 1] -> (B, mel, N / 10 ms), about in [-1, 1]: (log(power + 1e-5) + 4.5) / 5.

        `ends` (2,) or (B, 2): lowest and highest pitch of the mel bank in Hz where training moves them. N is at least 25 ms.
        """
        num_frames = wave.shape[-1] // self.shift
        wave = wave.float()
        wave = wave[:, 1:] - 0.97 * wave[:, :-1]
        frames = functional.pad(wave, (self.length // 2, self.length // 2), mode="reflect")
        frames = frames.unfold(-1, self.length, self.shift)[:, :num_frames] * self.window  # (B, frames, length)
        power = torch.view_as_real(torch.fft.rfft(frames, n=self.size)).square().sum(-1)
        filters = (
            self.filters if ends is None else mel_bank(ends.float(), self.sample_rate, self.size, self.num_mel_bins)
        )
        return ((power @ filters + 1e-5).log().transpose(1, 2) + 4.5) / 5


def top(sample_rate: int) -> float:
    """Hz at which the mel bank ends."""
    return min(TOP, sample_rate / 2 - 1000)


def mel_bank(ends: Tensor, sample_rate: int, size: int, num_mel_bins: int) -> Tensor:
    """(…, size / 2 + 1, mel) triangular filters between `ends` (…, 2) in Hz; the highest frequency is in none, as in Kaldi."""
    low, high = (1127.0 * torch.log1p(ends / 700.0))[..., None, None].unbind(-3)  # (…, 1, 1)
    place = torch.arange(size // 2 + 1, device=ends.device, dtype=ends.dtype)[:, None]
    at = 1127.0 * torch.log1p(place * (sample_rate / size) / 700.0)
    steps = (at - low) / (high - low) * (num_mel_bins + 1)  # in units of half a filter's foot
    centre = torch.arange(1, num_mel_bins + 1, device=ends.device, dtype=ends.dtype)
    return (1 - (steps - centre).abs()).clamp(min=0) * (place < size // 2)


class PaSST(nn.Module):
    """A ViT over overlapping patches of a spectrum, with a position in pitch and one in time, that reads only some of them."""

    def __init__(
        self, num_mel_bins: int, num_frames: int, hidden_size: int, num_layers: int, num_heads: int, stride: int
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.stride = hidden_size, num_heads, stride
        self.grid = (
            (num_mel_bins - PATCH) // stride + 1,
            (num_frames - PATCH) // stride + 1,
        )  # patches in pitch and time
        self.patch = nn.Linear(PATCH**2, hidden_size)
        self.pitch = nn.Parameter(torch.empty(self.grid[0], hidden_size))
        self.time = nn.Parameter(torch.empty(self.grid[1], hidden_size))
        self.tokens = nn.Parameter(torch.empty(2, hidden_size))  # class and distillation
        self.places = nn.Parameter(torch.empty(2, hidden_size))  # their positions
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size, 1e-6)
        initialise(self)
        for parameter in (self.pitch, self.time, self.tokens, self.places):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, spectrum: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(B, mel, frames) -> (B, 1 + Kf * Kt, D): the distillation token, then a token a patch, by pitch and then by time.

        Patches are read where a row of `rows` (Kf,) or (B, Kf) int64 meets a column of `columns` (Kt,) or (B, Kt).
        """
        batch = len(spectrum)
        rows, columns = rows.expand(batch, -1), columns.expand(batch, -1)
        patches = spectrum.unfold(1, PATCH, self.stride).unfold(2, PATCH, self.stride)  # (B, F, T, 16, 16)
        clips = torch.arange(batch, device=spectrum.device)[:, None, None]
        patches = patches[clips, rows[:, :, None], columns[:, None, :]].flatten(3)  # (B, Kf, Kt, 256)
        x = self.patch(patches) + self.pitch[rows][:, :, None] + self.time[columns][:, None]
        special = (self.tokens + self.places).to(x.dtype).expand(batch, -1, -1)
        x = torch.cat([special, x.flatten(1, 2)], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 1:])

    def heard(self, num_frames: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(B, Kf * Kt) bool: which of the patches begin within the first `num_frames` (B,) frames, before silence does."""
        inside = columns * self.stride < num_frames[:, None]  # (B, Kt)
        return inside[:, None].expand(-1, rows.shape[-1], -1).flatten(1)


def read_published(module: PaSST, state: State) -> tuple[Found, list[str]]:
    """The tensors of PaSST as published, and the keys of its classifiers, which have no place here.

    Positions in time behind the last of ours are cut off, as PaSST does. InputError where the state is none of PaSST's.
    """
    found, dropped = rename(state, NAMES, CLASSIFIERS)
    parts = ("cls_token", "dist_token", "new_pos_embed", "time_new_pos_embed", "freq_new_pos_embed", "patch.weight")
    lost = [key for key in parts if key not in found]
    if lost:
        raise InputError(f"the checkpoint is no PaSST with a distillation token: it lacks {lost[0]}")
    kernel = found["patch.weight"]
    first, second, places, time, pitch = (found.pop(key) for key in parts[:5])
    found["patch.weight"] = kernel[0], kernel[1].flatten(1)
    found["tokens"] = first[0], torch.cat([first[1], second[1]], 1)[0]
    found["places"] = places[0], places[1][0]
    found["time"] = time[0], time[1][0].flatten(1).T[: module.grid[1]]
    found["pitch"] = pitch[0], pitch[1][0].flatten(1).T
    return found, dropped


def kept(number: int, left_out: int, rng: np.random.Generator | None) -> Tensor:
    """(number - left_out,) int64, ascending: rows or columns to read, drawn by `rng`, or evenly spread without one."""
    count = number - left_out
    if rng is not None:
        return torch.from_numpy(np.sort(rng.permutation(number)[:count]))
    return (2 * torch.arange(count) + 1) * number // (2 * count)
