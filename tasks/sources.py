"""Sources of raw data over the network, HTTP and S3: each goes on where an interrupted run stopped."""

from __future__ import annotations

import base64
import errno
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from tqdm import tqdm

from models.family import InputError
from tasks.storage import CHUNK

RETRIES = 5
THREADS = 8  # connections to an S3 store
PART = 8 << 20  # bytes of an S3 object that one request asks for
T = TypeVar("T")


def public_url(url: str) -> str:
    """The address without user, password and query, which may hold credentials."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def fetch_http(url: str, path: Path) -> Path:
    """Download to `path`, and return it, by way of `path`.part, which a later run completes if the file is still the same."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    problem = ""
    for attempt in range(RETRIES):
        try:
            if _fetch_range(url, path):
                return path
            problem = "the connection ended early"
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code == 416:  # the .part is longer than the file: not ours
                path.with_name(path.name + ".part").unlink(missing_ok=True)
            elif error.code < 500 and error.code != 429:
                break
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        time.sleep(min(2**attempt, 30) * 0.2)
    raise InputError(f"{public_url(url)}: {problem}; check the address, then run again to go on")


def _fetch_range(url: str, path: Path) -> bool:
    """One request for what is missing; True when the file is whole. The .etag file beside .part names its version."""
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".etag")
    have = part.stat().st_size if part.exists() and tag.exists() else 0
    user, _, host = urlsplit(url).netloc.rpartition("@")
    request = urllib.request.Request(urlsplit(url)._replace(netloc=host).geturl())
    if user:  # not sent on to where the server redirects
        login = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {login}")
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag.read_text())
    with urllib.request.urlopen(request, timeout=60) as answer:
        if answer.status != 206:
            have = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise http.client.HTTPException("the server sent another part of the file than asked for")
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        if not have:  # before the first byte of another version
            tag.unlink(missing_ok=True)
        with (
            part.open("ab" if have else "wb") as handle,
            tqdm(total=total, initial=have, desc=path.name, unit="B", unit_scale=True) as bar,
        ):
            # A weak or absent validator cannot promise the same bytes: such a download starts over.
            if not have and version and not version.startswith("W/"):
                tag.write_text(version)
            while block := answer.read(CHUNK):
                handle.write(block)
                bar.update(len(block))
            os.fsync(handle.fileno())
    if total is not None and part.stat().st_size != total:
        return False
    part.replace(path)
    tag.unlink(missing_ok=True)
    return True


@dataclass(frozen=True, slots=True)
class Stored:
    """An object of a bucket; of a listing only this is kept, since there may be millions of them."""

    key: str
    etag: str
    size: int  # bytes


def list_s3(address: str, endpoint: str | None = None) -> dict[str, Stored]:
    """Every object below s3://bucket/prefix by its name relative to it, or the one object that is called like it."""
    with _answers(address):
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        pages = _client(endpoint).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        below = prefix if not prefix or prefix.endswith("/") else prefix + "/"
        found: dict[str, Stored] = {}
        for entry in (entry for page in pages for entry in page.get("Contents", [])):
            stored = Stored(entry["Key"], entry["ETag"].strip('"'), entry["Size"])
            if stored.key == prefix and not prefix.endswith("/"):
                return {prefix.rpartition("/")[2]: stored}
            if stored.key.startswith(below) and not stored.key.endswith("/"):
                found[stored.key.removeprefix(below)] = stored
    if not found:
        raise InputError(f"{address}: nothing is stored there; check bucket and prefix")
    return found


def fetch_s3(address: str, wanted: Mapping[Path, Stored], done: Path, endpoint: str | None = None) -> None:
    """Download the `wanted` objects of a bucket to their paths.

    `done` lists key and ETag of what is whole, so that a later run only takes what is missing or has changed. A large
    object arrives in parts of PART bytes, THREADS of them at once, of small ones that many at once: so many connections
    there are, and not much more than that many parts in memory. boto3's own transfers do the same, and start an interrupted
    object over. Credentials come from where the AWS tools look for them and are never printed.
    """
    bucket = address.removeprefix("s3://").partition("/")[0]
    finished = set(done.read_text().splitlines()) if done.exists() else set()
    waiting = [(p, o) for p, o in wanted.items() if f"{o.key}\t{o.etag}" not in finished or not p.exists()]
    size = sum(stored.size for _, stored in waiting)
    done.parent.mkdir(parents=True, exist_ok=True)
    with (
        _answers(address),
        tqdm(total=size, desc="objects", unit="B", unit_scale=True) as bar,
        done.open("a") as handle,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        store = Bucket(_client(endpoint), bucket, bar)

        def note(stored: Stored) -> None:
            handle.write(f"{stored.key}\t{stored.etag}\n")
            handle.flush()

        for stored in ahead(pool, store.fetch, ((p, o, map) for p, o in waiting if o.size <= PART)):
            note(stored)
        for path, stored in ((p, o) for p, o in waiting if o.size > PART):
            note(store.fetch(path, stored, lambda read, starts: ahead(pool, read, ((start,) for start in starts))))


def ahead(pool: Executor, call: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """Results of call(*arguments) in their order, with no more than THREADS + 2 of them begun or waiting to be taken."""
    begun: deque[Future[T]] = deque()
    try:
        for one in arguments:
            begun.append(pool.submit(call, *one))
            if len(begun) == THREADS + 2:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()


@contextmanager
def _answers(address: str) -> Iterator[None]:
    """What a store refuses, as InputError."""
    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code")
        raise InputError(f"{address}: the store answers {code}; check bucket, prefix and rights") from None
    except BotoCoreError as error:
        raise InputError(f"{address}: {' '.join(str(error).split())}") from None


def _client(endpoint: str | None) -> Any:
    retries: Any = {"max_attempts": RETRIES, "mode": "standard"}
    return boto3.client("s3", endpoint_url=endpoint, config=Config(retries=retries, max_pool_connections=THREADS))


@dataclass(frozen=True)
class Bucket:
    """A bucket that objects are fetched from."""

    client: Any
    name: str
    bar: tqdm

    def fetch(self, path: Path, stored: Stored, each: Callable[..., Iterable[bytes]]) -> Stored:
        """Download one object through a .part file named after its ETag, going on where that ends, and check it.

        `each` is map, or does the same with several parts at once.
        """
        part = path.with_name(f".{path.name}.{stored.etag}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
        self.bar.update(min(have, stored.size))

        def read(start: int) -> bytes:
            return self._read(stored, start, min(start + PART, stored.size) - 1)

        with part.open("ab") as handle:
            for block in each(read, range(have, stored.size, PART)):
                handle.write(block)
                self.bar.update(len(block))
        if part.stat().st_size != stored.size or not self._is_same(part, stored):
            part.unlink()
            raise InputError(
                f"s3://{self.name}/{stored.key}: what arrived differs from what is stored there; run again"
            )
        part.replace(path)
        return stored

    def _read(self, stored: Stored, first: int, last: int) -> bytes:
        """Bytes `first` to `last`; botocore repeats a request that fails, but not one whose answer breaks off."""
        for attempt in range(RETRIES):
            answer = self.client.get_object(
                Bucket=self.name, Key=stored.key, IfMatch=f'"{stored.etag}"', Range=f"bytes={first}-{last}"
            )
            try:
                return answer["Body"].read()
            except BotoCoreError:
                if attempt == RETRIES - 1:
                    raise
        raise AssertionError

    def _is_same(self, path: Path, stored: Stored) -> bool:
        """Whether a file has the object's checksums, as far as the store tells any.

        The ETag is the MD5 of the bytes, but where a key of a key service encrypts them. A SHA-256 is there where the uploader
        asked for it. Of an object that was uploaded in N parts both are of the parts' own digests, and the ETag ends in -N.
        """
        md5, _, num_parts = stored.etag.partition("-")
        if not num_parts and _digest(path, hashlib.md5, None).hex() == md5:
            return True
        of = {"Bucket": self.name, "Key": stored.key}
        told = self.client.head_object(**of, ChecksumMode="ENABLED")
        length = self.client.head_object(**of, PartNumber=1)["ContentLength"] if num_parts else None
        if length is not None and not length * (int(num_parts) - 1) < stored.size <= length * int(num_parts):
            return True  # the parts are not all as long as the first, so that nothing more can be told
        if sha256 := told.get("ChecksumSHA256"):
            return base64.b64encode(_digest(path, hashlib.sha256, length)).decode() == sha256.partition("-")[0]
        is_md5 = re.fullmatch("[0-9a-f]{32}", md5) and told.get("ServerSideEncryption") in (None, "AES256")
        return not is_md5 or _digest(path, hashlib.md5, length).hex() == md5


def _digest(path: Path, new: Callable[[], Any], length: int | None) -> bytes:
    """Digest of a file, or of the digests of its parts of `length` bytes."""
    with path.open("rb") as handle:
        if length is None:
            return hashlib.file_digest(handle, new).digest()
        total, size = new(), path.stat().st_size
        for start in range(0, size, length):
            part, end = new(), min(start + length, size)
            while (left := end - handle.tell()) > 0:
                part.update(handle.read(min(left, CHUNK)))
            total.update(part.digest())
        return total.digest()
