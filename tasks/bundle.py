"""What a phase leaves: weights.safetensors, bundle.json and history.csv in one folder. The same run gives the same bytes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import models
from models.family import Facts, InputError, LoadReport
from models.weights import compute_in_int8, dequantise, load_matching
from tasks import params, storage

WEIGHTS, META, HISTORY = "weights.safetensors", "bundle.json", "history.csv"
FEATURES = "features"  # within: the bundle of the phase that makes the features this one takes


@dataclass(frozen=True)
class Bundle:
    """A trained phase: its config as the dataclass it was, its weights, and what else bundle.json tells."""

    family: str
    phase: str
    config: Any
    facts: Facts
    meta: Mapping[str, Any]
    state: dict[str, Tensor]
    path: Path  # of the weights, for messages

    def module(self) -> nn.Module:
        """The trained module in evaluation mode, on the CPU; in int8 as far as its weights are stored so."""
        module = models.load(self.family).phases[self.phase].build(self.config, self.facts)
        self.load_into(module)
        compute_in_int8(module, self.state)
        return module.eval().requires_grad_(False)

    def load_into(self, module: nn.Module, fresh: tuple[str, ...] = ()) -> LoadReport:
        """The weights into a module, of which what starts with one of `fresh` may be new; InputError names the file."""
        try:
            return load_matching(module, dequantise(self.state), fresh)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, written by Python and not by the library, so that a full disk is an OSError."""
    path.write_bytes(to_bytes({key: value.contiguous() for key, value in tensors.items()}))


def save(
    folder: Path,
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    history: list[dict[str, Any]],
    features: Path | None = None,
) -> None:
    """Write a bundle atomically; `meta` is JSON-able and holds family, phase, config, facts, stores, dataset at least.

    A copy of the bundle `features` goes along.
    """
    with storage.atomic_folder(folder) as temporary:
        write_tensors(temporary / WEIGHTS, state)
        (temporary / META).write_text(json.dumps(meta, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        pd.DataFrame(history).to_csv(temporary / HISTORY, index=False)
        if features:
            shutil.copytree(features, temporary / FEATURES)


def load(folder: Path) -> Bundle:
    """Read a bundle; InputError names the file that is missing, damaged or foreign."""
    if not (folder / META).is_file():
        raise InputError(f"{folder / META} not found; {folder} is no bundle: train the phase or name another folder")
    try:
        meta = json.loads((folder / META).read_text())
        family, phase, config, facts = meta["family"], meta["phase"], meta["config"], Facts(**meta["facts"])
        phases = models.load(family).phases
    except (ValueError, KeyError, TypeError) as error:  # a JSON error and an unknown family are ValueErrors
        raise InputError(f"{folder / META} is damaged or foreign ({error}); bring the bundle again") from None
    if phase not in phases:
        raise InputError(f"{folder / META}: {family} has no phase {phase!r}; it has {', '.join(phases)}")
    try:
        typed = params.typed(phases[phase].Config, config, "config")
    except InputError as error:
        reason = str(error).removeprefix("params.yaml: ")
        raise InputError(f"{folder / META} is of another version: {reason}; train the phase again") from None
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder / WEIGHTS} is missing or damaged ({reason}); bring the bundle again") from None
    return Bundle(family, phase, typed, facts, meta, state, folder / WEIGHTS)


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON-able values."""
    return dataclasses.asdict(config)
