"""Where things lie, and how files come to lie there: atomic writes, locks, checksums."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from models.family import InputError

DATA = Path("data")  # data/<dataset>/<stage>
ARTIFACTS = Path("artifacts")  # artifacts/<family>/<stage>
WORK = Path(".duet/work")  # resume state, keyed by stage and hash; outside every DVC out
LOCKS = Path(".duet/locks")  # unlike resume state, of this checkout alone
CHUNK = 1 << 20  # bytes of a large file read at once
_held: set[IO[str]] = set()


@contextmanager
def atomic_file(path: Path, sync: bool = True) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well and disappears when it does not.

    Without `sync` it outlives the process but not yet the machine: for many files, of which the caller syncs all at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if sync:
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Like atomic_file for a whole folder; an older folder at `path` is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _take_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(made: Path, path: Path) -> None:
    """Rename a folder to `path`; an older one there goes at once, so that a kill never leaves a part of it."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.replace(old)
    made.replace(path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; InputError when another process has it.

    What a killed process was just writing there is removed, at the beginning and at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is in use by another run; wait for it or stop it") from None
        _held.add(handle)
        try:
            remove_unfinished(folder)
            yield
        finally:
            remove_unfinished(folder)
            _held.discard(handle)


def leave_locks() -> None:
    """In a forked process that writes nothing: let its parent's locks end with its parent."""
    for handle in _held:
        handle.close()
    _held.clear()


def remove_unfinished(folder: Path) -> None:
    """Take away what atomic_file and atomic_folder left below `folder` in processes that were killed."""
    for path in list(folder.rglob(".*.tmp")):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def alone(stage: str) -> AbstractContextManager[None]:
    """Run `stage` of this checkout, such as clean@sounds, in no other process as long as the block lasts."""
    return locked(LOCKS / stage)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 over the relative names and contents of all files below `folder`."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        total.update(f"{path.relative_to(folder).as_posix()}\0{file_digest(path)}\n".encode())
    return total.hexdigest()


def install_folder(made: Path, path: Path) -> None:
    """Put a finished folder at `path` in one step, in place of an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if made.stat().st_dev != path.parent.stat().st_dev:  # a rename cannot cross file systems
        with atomic_folder(path) as temporary:
            shutil.copytree(made, temporary, dirs_exist_ok=True, symlinks=True)
        shutil.rmtree(made)
        return
    _take_place(made, path)


def inside(folder: Path, name: str, origin: str) -> Path:
    """folder / name, refused when `name` (a member of `origin`) would lead out of the folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise InputError(f"{origin}: member {name!r} would be written outside the target folder")
    return folder.joinpath(*parts)


def link_or_copy(source: Path, target: Path, link: bool = True) -> bool:
    """One file, by hard link where asked and possible; False when `target` is there already, as old and as large."""
    try:
        stat = source.stat()  # names the file itself, not what a broken link points to
        source = source.resolve()
        if target.exists() and _age_and_size(target.stat()) == _age_and_size(stat):
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        if link and stat.st_dev == target.parent.stat().st_dev:
            target.unlink(missing_ok=True)
            target.hardlink_to(source)  # whole at once, with nothing to write to the disk
            return True
        with atomic_file(target) as temporary:
            shutil.copyfile(source, temporary)
            os.utime(temporary, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    except (PermissionError, FileNotFoundError) as error:
        raise InputError(f"{error.filename}: {error.strerror}; make the file readable or remove it") from None
    return True


def _age_and_size(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_mtime_ns, stat.st_size
