"""Zip and tar files from outside, unpacked so that nothing is ever written beside the target folder."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import IO

from tqdm import tqdm

from models.family import InputError
from tasks.storage import CHUNK, atomic_file, inside

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar into `folder`; members already there stay, names and links that lead out are refused.

    Where the archive turns out to be damaged, nothing that came out of it can be trusted and `folder` is emptied.
    """
    try:
        if archive.name.lower().endswith(".zip"):
            _unpack_zip(archive, folder)
        else:
            _unpack_tar(archive, folder)
        os.sync()  # once for all members: waiting for each takes several times as long as writing it
    except (zipfile.BadZipFile, tarfile.ReadError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(f"{archive} is damaged or no archive of its kind: {error}; fetch it again") from None


def _unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        members = opened.infolist()
        for member in members:  # all of them before the first byte is written
            inside(folder, member.orig_filename, str(archive))
            if stat.S_ISLNK(member.external_attr >> 16):
                raise InputError(f"{archive}: member {member.filename!r} is a link; pack the file itself")
            if member.flag_bits & 1:
                raise InputError(f"{archive}: member {member.filename!r} is encrypted; unpack it and give the folder")
        for member in tqdm(members, desc="unpacking", unit="file"):
            if not member.is_dir():
                with opened.open(member) as handle:
                    _write_member(handle, member.file_size, inside(folder, member.filename, str(archive)))


def _unpack_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as opened:
        for member in tqdm(opened, desc="unpacking", unit="file"):
            path = inside(folder, member.name, str(archive)) if member.name != "." else folder
            if member.isdir():
                continue
            try:
                # Of a link, the member that it points to is read: no link ever reaches the disk, none leads out of it.
                handle = opened.extractfile(member)
            except (KeyError, RecursionError):
                raise InputError(
                    f"{archive}: member {member.name!r} links to {member.linkname!r}, which is no file of the archive; "
                    "pack the file itself"
                ) from None
            if handle is None:
                raise InputError(f"{archive}: member {member.name!r} is neither a file nor a link to one; leave it out")
            size = handle.seek(0, os.SEEK_END)
            handle.seek(0)
            _write_member(handle, size, path)
        while opened.fileobj and opened.fileobj.read(CHUNK):  # to the checksum that ends a compressed file
            pass


def _write_member(source: IO[bytes], size: int, target: Path) -> None:
    if not (target.is_file() and target.stat().st_size == size):
        with atomic_file(target, sync=False) as temporary, temporary.open("wb") as handle:
            shutil.copyfileobj(source, handle, CHUNK)
