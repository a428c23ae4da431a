"""Clips of which there are but features, made elsewhere: a NumPy file (T, D) of floating-point numbers, a row a frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tasks.data.clip_files import ClipError, Probe


def open_features(path: Path) -> np.ndarray:
    """(T, D) floating point, mapped. ClipError for what is no such file; nothing in it is executed."""
    try:
        if path.stat().st_size == 0:
            raise ClipError("empty", f"{path.name} has no bytes")
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ClipError("missing", f"there is no {path.name}") from None
    except (ValueError, EOFError, OSError) as error:
        raise ClipError("foreign", f"{path.name} is no plain NumPy array: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, np.ndarray) or loaded.dtype.kind != "f":
        raise ClipError("wrong shape", f"{path.name} is no single array of floating-point numbers")
    if loaded.ndim != 2 or 0 in loaded.shape:
        raise ClipError("wrong shape", f"{path.name} is {loaded.shape}, not (frames, features)")
    return loaded


def probe(path: Path) -> Probe:
    """What the file holds, every value looked at; what nobody noted is 0."""
    features = open_features(path)
    if not np.isfinite(features).all():
        raise ClipError("wrong range", f"{path.name} holds values that are no numbers")
    return Probe(
        duration=0.0, fps=0.0, frames=len(features), width=0, height=0, has_audio=False, sample_rate=0, silent=False,
        still=False,
    )  # fmt: skip
