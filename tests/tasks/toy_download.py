"""A small download and whether it came whole, for the tests of its sources."""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from models.family import InputError
from tasks import storage
from tasks.download import Download

CSV = "abc,1,rain,train\n"
BYTES = os.urandom(300_000)
FOLDER = Download(source="", format="vggsound", sha256=None, endpoint=None, demo=None)


def fill(folder: Path) -> Path:
    (folder / "video").mkdir(parents=True)
    (folder / "vggsound.csv").write_text(CSV)
    (folder / "video/abc_000001.mp4").write_bytes(BYTES)
    return folder


def is_whole(raw: Path = Path("data/sounds/raw")) -> bool:
    names = sorted(path.relative_to(raw).as_posix() for path in raw.rglob("*") if path.is_file())
    same = (raw / "video/abc_000001.mp4").read_bytes() == BYTES
    return same and names == ["vggsound.csv", "video/abc_000001.mp4"]


@contextmanager
def locked_when_free(folder: Path) -> Iterator[None]:
    """As storage.locked, when the workers of a killed run, which hold on for a moment, have gone."""
    deadline = time.monotonic() + 30
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(storage.locked(folder))
                break
            except InputError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield


def zipped(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path
