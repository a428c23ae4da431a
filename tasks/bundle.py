"""What a phase leaves: weights.safetensors, bundle.json and history.csv in one folder. The same run gives the same bytes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import models
from models.family import Facts, InputError, LoadReport, Phase
from models.weights import compute_in_int8, dequantise, frozen_digest, frozen_state, load_matching
from tasks import params, pretrained, storage

WEIGHTS, META, HISTORY = "weights.safetensors", "bundle.json", "history.csv"


@dataclass(frozen=True)
class Base:
    """The frozen weights that a slim bundle leaves out: which they are, and what makes them again."""

    sha256: str  # models.weights.frozen_digest
    seed: int  # of the random weights, into which the named ones go
    phase: Phase  # whose module had them first: the bundle's, or that of the bundle it started from
    config: Any
    facts: Facts

    def build(self) -> nn.Module:
        """The module as it was before any training, on the CPU; InputError where the named weights are not here."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            module = self.phase.build(self.config, self.facts)
        for slot, name in self.names.items():
            pretrained.fill(self.phase, module, slot, name, pretrained.load_state(name)[0])
        return module

    @property
    def names(self) -> dict[str, str]:
        """The third-party weights in it, by slot."""
        return {slot: name for slot, name in self.phase.pretrained(self.config).items() if name != "none"}

    def __str__(self) -> str:
        return " and ".join(self.names.values()) or f"random weights of seed {self.seed}"


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
    base: Base | None = None  # where the file of weights does not hold the frozen ones

    def module(self) -> nn.Module:
        """The trained module in evaluation mode, on the CPU; in int8 as far as its weights are stored so."""
        module = models.load(self.family).phases[self.phase].build(self.config, self.facts)
        self.load_into(module)
        compute_in_int8(module, self.state)
        return module.eval().requires_grad_(False)

    def load_into(self, module: nn.Module, fresh: tuple[str, ...] = ()) -> LoadReport:
        """The weights into a module, of which what starts with one of `fresh` may be new; InputError names the file."""
        state = self.whole()
        try:
            return load_matching(module, dequantise(state), fresh)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None

    def whole(self) -> dict[str, Tensor]:
        """All weights as they are stored, and the frozen ones, made again, where the file leaves them out."""
        return self.state if self.base is None else {**self.state, **self._frozen(self.base)}

    def _frozen(self, base: Base) -> dict[str, Tensor]:
        """The base's weights; InputError names bundle.json and them, where they are not here or are others."""
        path = self.path.with_name(META)
        try:
            module = base.build()
        except InputError as error:
            raise InputError(
                f"{path}: trained on {base}, which cannot be had ({error}); bring it, or write into this file where it is"
            ) from None
        if (found := frozen_digest(module)) != base.sha256:
            known = ", ".join(str(self.meta["pretrained"].get(slot, "unknown")) for slot in base.names)
            advice = (
                f"bring {known}" if known else "another torch or processor draws others: train it again on this one"
            )
            raise InputError(
                f"{path}: trained on other frozen weights (SHA-256 {base.sha256[:12]}) than {base} here ({found[:12]}); "
                f"{advice}"
            )
        return frozen_state(module)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, written by Python and not by the library, so that a full disk is an OSError."""
    path.write_bytes(to_bytes({key: value.contiguous() for key, value in tensors.items()}))


def save(folder: Path, state: Mapping[str, Tensor], meta: Mapping[str, Any], history: list[dict[str, Any]]) -> None:
    """Write a bundle atomically; `meta` is JSON-able and holds family, phase, config, facts, stores, dataset at least."""
    with storage.atomic_folder(folder) as temporary:
        write_tensors(temporary / WEIGHTS, state)
        (temporary / META).write_text(json.dumps(meta, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        pd.DataFrame(history).to_csv(temporary / HISTORY, index=False)


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
    typed, base = _typed(folder, phases[phase], config), read_base(folder, phases, meta)
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder / WEIGHTS} is missing or damaged ({reason}); bring the bundle again") from None
    return Bundle(family, phase, typed, facts, meta, state, folder / WEIGHTS, base)


def _typed(folder: Path, phase: Phase, config: Any) -> Any:
    """The phase's config out of bundle.json."""
    try:
        return params.typed(phase.Config, config, "config")
    except InputError as error:
        reason = str(error).removeprefix("params.yaml: ")
        raise InputError(f"{folder / META} is of another version: {reason}; train the phase again") from None


def read_base(folder: Path, phases: Mapping[str, Phase], meta: Mapping[str, Any]) -> Base | None:
    """What bundle.json says of the frozen weights that weights.safetensors lacks; None where it lacks none."""
    if "base" not in meta:
        return None
    try:
        told = {**meta, **meta["base"]}  # what made them is the bundle's own, unless `base` says otherwise
        phase, facts, sha256, seed = phases[told["phase"]], Facts(**told["facts"]), told["sha256"], int(told["seed"])
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError(f"{sha256} is no SHA-256")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / META}: its `base` is damaged ({error}); bring the bundle again") from None
    return Base(sha256, seed, phase, _typed(folder, phase, told["config"]), facts)


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON-able values."""
    return dataclasses.asdict(config)
