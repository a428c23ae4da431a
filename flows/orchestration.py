"""Where the project is, and what the `orchestration:` section of its params.yaml says of each stage."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.family import InputError
from tasks import params


@dataclass(frozen=True)
class Placement:
    """How one stage is run."""

    pool: Literal["cpu", "gpu"]  # Prefect work pool
    devices: int  # GPUs it holds; more than one: torchrun with as many processes
    retries: int
    backoff: float  # seconds before the first retry, doubled each time
    timeout: float | None  # seconds


@dataclass(frozen=True)
class Orchestration:
    """The section."""

    max_parallel: int
    default: Placement
    stages: dict[str, Any]  # base name -> what differs from `default`

    def of(self, stage: str) -> Placement:
        """The placement of a stage such as `finetune@t3av`."""
        name = stage.partition("@")[0]
        return params.typed(Placement, self._merged(name), f"orchestration.stages.{name}")

    def check(self, stages: Collection[str]) -> None:
        """InputError when an entry is of a stage that does not exist, or says what is not known."""
        known = {stage.partition("@")[0] for stage in stages}
        for name in self.stages:
            if name not in known:
                raise InputError(
                    f"params.yaml: orchestration.stages.{name}: no such stage; there is {', '.join(sorted(known))}"
                )
            self.of(name)

    def _merged(self, name: str) -> dict[str, Any]:
        return {**vars(self.default), **(self.stages.get(name) or {})}


def load(folder: Path) -> Orchestration:
    """The section of a checkout's params.yaml."""
    return params.typed(Orchestration, params.section("orchestration", path=folder / "params.yaml"), "orchestration")


def project() -> Path:
    """The project's root: DUET_PROJECT, or where this package lies. A worker starts flows in a folder of its own."""
    return Path(os.environ.get("DUET_PROJECT") or Path(__file__).parents[1]).resolve()
