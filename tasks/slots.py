"""Which GPUs a stage may use: each device of this machine is a lock file, held by the stage's own process tree."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import IO

from models.family import InputError

CPU = "cpu"  # the one slot of a machine without GPUs: training there takes turns


@dataclass(frozen=True)
class Slots:
    """Devices that are ours until the descriptors close, here and in whatever process inherited them."""

    devices: list[str]
    descriptors: list[int]

    def environment(self) -> dict[str, str]:
        """What the stage's command must know: its GPUs, none included, and to train in a process for each."""
        if self.devices == [CPU]:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.devices), "DUET_PROCESSES": str(max(1, len(self.devices)))}


def devices() -> list[str]:
    """The GPUs of this machine, by index; those of CUDA_VISIBLE_DEVICES where it is set; else the one CPU slot."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device.strip() for device in chosen.split(",") if device.strip()] or [CPU]
    if not shutil.which("nvidia-smi"):
        return [CPU]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split() or [CPU]


@contextmanager
def hold(count: int, stop: Event) -> Iterator[Slots]:
    """`count` devices of this machine, waited for until free or `stop` is set (then none); 0 takes none.

    All or nothing, so that two stages of several devices cannot wait for each other.
    """
    known = devices()
    count = min(count, 1) if known == [CPU] else count
    if count > len(known):
        raise InputError(f"params.yaml: a stage wants {count} devices; this machine has {len(known)}")
    with ExitStack() as stack:
        while not stop.is_set():
            taken = _take(known, count)
            if len(taken) == count:
                for file in taken.values():
                    stack.callback(file.close)
                yield Slots(list(taken), [file.fileno() for file in taken.values()])
                return
            for file in taken.values():
                file.close()
            stop.wait(0.5)
        yield Slots([], [])


def _take(known: list[str], count: int) -> dict[str, IO[str]]:
    """As many free devices as there are, at most `count`."""
    folder = Path(tempfile.gettempdir()) / f"duet-slots-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    taken: dict[str, IO[str]] = {}
    for device in known:
        if len(taken) == count:
            break
        file = (folder / f"{device.replace('/', '-')}.lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken[device] = file
        except BlockingIOError:
            file.close()
    return taken
