"""Clips that another system has prepared: video_frames/ID.pt and mel_spectrograms/ID.npy, read as they are.

ID.pt is a tensor (C, T, H, W) of RGB in [0, 1]; ID.npy is an array (mel, frames) in units of its own, without a word of how it
was made. So these clips go through `clean` and `stores` like others, but a phase is given the spectrogram and no waveform.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.data.clip_files import STILL_LEVELS, ClipError, Probe, files_of, open_array

if TYPE_CHECKING:
    from torch import Tensor


def open_pictures(path: Path) -> Tensor:
    """(3, T, H, W), mapped where the file allows it. ClipError for what is no such file; nothing in it is executed."""
    import torch

    try:
        if path.stat().st_size == 0:
            raise ClipError("empty", f"{path.name} has no bytes")
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise ClipError("missing", f"there is no {path.parent.name}/{path.name}") from None
    except pickle.UnpicklingError:
        raise ClipError("foreign", f"{path.name} holds more than tensors, or is no PyTorch file") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ClipError("unreadable", f"{path.name}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(loaded, torch.Tensor) or not loaded.is_floating_point() or loaded.ndim != 4:
        what = f"a {loaded.dtype} {tuple(loaded.shape)}" if isinstance(loaded, torch.Tensor) else type(loaded).__name__
        raise ClipError("wrong shape", f"{path.name} is {what}, not a floating-point tensor (3, T, H, W)")
    if loaded.shape[0] != 3 or 0 in loaded.shape:
        raise ClipError("wrong shape", f"{path.name} is {tuple(loaded.shape)}, not (3, T, H, W)")
    return loaded


def open_sound(path: Path) -> np.ndarray:
    """(mel, frames) floating point, mapped. ClipError for what is no such file; nothing in it is executed."""
    loaded = open_array(path, f"{path.parent.name}/{path.name}")
    if loaded.ndim == 3 and len(loaded) == 1:
        loaded = loaded[0]
    if loaded.ndim != 2 or 0 in loaded.shape:
        raise ClipError("wrong shape", f"{path.name} is {loaded.shape}, not (mel, frames)")
    return loaded


def probe(path: Path) -> Probe:
    """What the two files say, every value looked at; duration, rates and what else nobody noted are 0."""
    pictures, mel = open_pictures(path), open_sound(files_of(path)[1])
    low, high = float(pictures.min()), float(pictures.max())
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise ClipError("wrong range", f"{path.name} goes from {low:g} to {high:g}, not from 0 to 1")
    if not np.isfinite(mel).all():
        raise ClipError("wrong range", f"{path.stem}.npy holds values that are no numbers")
    change = float((pictures - pictures[:, :1]).abs().max()) * 255
    _, frames, height, width = pictures.shape
    return Probe(
        duration=0.0, fps=0.0, frames=frames, width=width, height=height, has_audio=True, sample_rate=0,
        silent=bool(mel.max() - mel.min() < 1e-6), still=change < STILL_LEVELS,
    )  # fmt: skip


def decode(path: Path, columns: Sequence[int]) -> np.ndarray:
    """(T, H, W, 3) uint8 RGB of the chosen frames: each value to the nearest of 256 levels."""
    chosen = open_pictures(path)[:, list(columns)].float()
    return (chosen.clamp(0, 1) * 255).round().byte().permute(1, 2, 3, 0).contiguous().numpy()


def decode_sound(path: Path) -> np.ndarray:
    """(frames, mel) float32, as models.transforms.LogMel lays it out."""
    return np.array(open_sound(path), np.float32).T.copy()
