"""Clips of which there are but features, made elsewhere: a NumPy file (T, D) of floating-point numbers, a row a frame."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from tasks.data.clip_files import ClipError, Probe, open_array


def open_features(path: Path) -> np.ndarray:
    """(T, D) floating point, mapped. ClipError for what is no such file; nothing in it is executed."""
    if os.path.isfile(path) and not os.path.getsize(path):
        raise ClipError("empty", f"{path.name} has no bytes")
    loaded = open_array(path, path.name)
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
