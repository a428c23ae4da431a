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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from tqdm import tqdm

from models.family import InputError
from tasks.storage import CHUNK, inside

RETRIES = 5
THREADS = 8  # objects in flight


def public_url(url: str) -> str:
    """The address without user, password and query, which may hold credentials."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def fetch_http(url: str, path: Path) -> None:
    """Download to `path` by way of `path`.part, which a later run completes if the server's file is still the same."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    problem = ""
    for attempt in range(RETRIES):
        try:
            if _fetch_range(url, path):
                return
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


def fetch_s3(address: str, folder: Path, done: Path, endpoint: str | None = None) -> int:
    """Download every object below s3://bucket/prefix (or the one object of that name) into `folder`; their number.

    `done` lists key and ETag of what is whole, so that a later run only takes what is missing or has changed.
    Credentials come from where the AWS tools look for them and are never printed.
    """
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    retries: Any = {"max_attempts": RETRIES, "mode": "standard"}
    client = boto3.client("s3", endpoint_url=endpoint, config=Config(retries=retries, max_pool_connections=THREADS))
    try:
        objects = _list_objects(client, bucket, prefix)
        if not objects:
            raise InputError(f"{address}: nothing is stored there; check bucket and prefix")
        finished = set(done.read_text().splitlines()) if done.exists() else set()
        waiting = {}
        for name, entry in objects.items():
            path = inside(folder, name, address)
            if f"{entry['Key']}\t{entry['ETag']}" not in finished or not path.exists():
                waiting[path] = entry
        bar = tqdm(total=sum(entry["Size"] for entry in waiting.values()), desc="objects", unit="B", unit_scale=True)
        with ThreadPoolExecutor(THREADS) as pool, bar, done.open("a") as handle:
            jobs = [pool.submit(_fetch_object, client, bucket, entry, path) for path, entry in waiting.items()]
            try:
                for job in as_completed(jobs):
                    entry = job.result()
                    handle.write(f"{entry['Key']}\t{entry['ETag']}\n")
                    handle.flush()
                    bar.update(entry["Size"])
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code")
        raise InputError(f"{address}: the store answers {code}; check bucket, prefix and rights") from None
    except BotoCoreError as error:
        raise InputError(f"{address}: {' '.join(str(error).split())}") from None
    return len(objects)


def _list_objects(client: Any, bucket: str, prefix: str) -> dict[str, dict[str, Any]]:
    """Name relative to the prefix -> listing entry; an object that is called like the prefix itself stands alone."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    entries = [entry for page in pages for entry in page.get("Contents", []) if not entry["Key"].endswith("/")]
    alone = [entry for entry in entries if entry["Key"] == prefix]
    if alone:
        return {prefix.rpartition("/")[2]: alone[0]}
    below = prefix if not prefix or prefix.endswith("/") else prefix + "/"
    return {entry["Key"].removeprefix(below): entry for entry in entries if entry["Key"].startswith(below)}


def _fetch_object(client: Any, bucket: str, entry: dict[str, Any], path: Path) -> dict[str, Any]:
    """Download one object through a .part file named after its ETag; check its size, and its MD5 if the ETag is one."""
    etag = entry["ETag"].strip('"')
    part = path.with_name(f".{path.name}.{etag}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    version = {"Bucket": bucket, "Key": entry["Key"], "IfMatch": entry["ETag"]}
    if have < entry["Size"]:
        answer = client.get_object(**version, **({"Range": f"bytes={have}-"} if have else {}))
    else:
        answer = client.head_object(**version)
    with part.open("ab") as handle:
        for block in answer["Body"].iter_chunks(CHUNK) if "Body" in answer else ():
            handle.write(block)
    size = part.stat().st_size
    is_md5 = re.fullmatch(r"[0-9a-f]{32}", etag) and answer.get("ServerSideEncryption") in (None, "AES256")
    with part.open("rb") as handle:
        damaged = size != entry["Size"] or (is_md5 and hashlib.file_digest(handle, "md5").hexdigest() != etag)
    if damaged:
        part.unlink()
        raise InputError(f"s3://{bucket}/{entry['Key']}: what arrived differs from what is stored there; run again")
    part.replace(path)
    return entry
