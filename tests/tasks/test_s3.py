"""Objects of S3 stores: what is missing or changed is fetched again, whole, in parts, and checked."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import boto3
import pytest
from boto3.s3.transfer import TransferConfig
from botocore.response import StreamingBody
from moto.server import ThreadedMotoServer
from tqdm import tqdm

from models.family import InputError
from tasks import sources, storage
from tasks.download import download
from tests.tasks.toy_download import BYTES, CSV, FOLDER, is_whole, zipped


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def bucket(store: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """An empty bucket of the test's own, as boto3's resource."""
    for name, value in (("ACCESS_KEY_ID", "me"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    made = boto3.resource("s3", endpoint_url=store).Bucket(
        re.sub("[^a-z0-9]+", "-", request.node.name.lower())[-60:].strip("-")
    )
    made.create()
    return made


def fetch_s3(address: str, folder: Path, done: Path, store: str) -> None:
    """All objects of a prefix, below a folder."""
    objects = sources.list_s3(address, store)
    sources.fetch_s3(
        address, {storage.inside(folder, name, address): one for name, one in objects.items()}, done, store
    )


def test_a_prefix_of_a_bucket(bucket, store: str) -> None:
    bucket.put_object(Key="sets/vgg/vggsound.csv", Body=CSV.encode())
    bucket.put_object(Key="sets/vgg/video/", Body=b"")  # as consoles make folders
    bucket.put_object(Key="sets/vgg/video/abc_000001.mp4", Body=BYTES)
    bucket.put_object(Key="sets/vgg2/other", Body=b"no part of it")
    download("sounds", replace(FOLDER, source=f"s3://{bucket.name}/sets/vgg", endpoint=store))
    assert is_whole()


def test_an_archive_in_a_bucket(bucket, store: str, project: Path) -> None:
    zipped(project / "x.zip", ("vggsound.csv", CSV.encode()), ("video/abc_000001.mp4", BYTES))
    bucket.upload_file(str(project / "x.zip"), "sets/x.zip")
    download("sounds", replace(FOLDER, source=f"s3://{bucket.name}/sets/x.zip", endpoint=store))
    assert is_whole()


def test_only_what_is_missing_or_changed_is_fetched_again(bucket, store: str, project: Path) -> None:
    for name in ("same", "lost", "changed"):
        bucket.put_object(Key=f"p/{name}", Body=name.encode())
    folder, done = project / "got", project / "done.tsv"
    fetch_s3(f"s3://{bucket.name}/p/", folder, done, store)
    (folder / "lost").unlink()
    (folder / "same").write_bytes(b"touched")  # stays, since it counts as whole
    bucket.put_object(Key="p/changed", Body=b"new")
    fetch_s3(f"s3://{bucket.name}/p/", folder, done, store)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "same": b"touched",
        "lost": b"lost",
        "changed": b"new",
    }


def test_a_partial_object_is_completed_and_a_damaged_one_noticed(bucket, store: str, project: Path) -> None:
    etag = bucket.put_object(Key="big", Body=BYTES).e_tag.strip('"')
    part = project / f"got/.big.{etag}.part"
    for start in (BYTES[:100_000], BYTES, b""):
        part.parent.mkdir(exist_ok=True)
        part.write_bytes(start)
        fetch_s3(f"s3://{bucket.name}", project / "got", project / "done.tsv", store)
        assert (project / "got/big").read_bytes() == BYTES
        assert not part.exists()
        (project / "got/big").unlink()
    part.write_bytes(b"x" * 100_000)
    with pytest.raises(InputError, match="big: what arrived differs"):
        fetch_s3(f"s3://{bucket.name}", project / "got", project / "done.tsv", store)
    assert not (project / "got/big").exists()
    assert not part.exists()


@pytest.mark.parametrize("how", [{}, {"ChecksumAlgorithm": "SHA256"}])
def test_damage_in_an_object_of_several_parts_is_noticed(bucket, store: str, project: Path, how: dict) -> None:
    content = os.urandom((20 << 20) + 1)
    bucket.upload_fileobj(io.BytesIO(content), "big", ExtraArgs=how, Config=TransferConfig(multipart_chunksize=6 << 20))
    (stored,) = sources.list_s3(f"s3://{bucket.name}", store).values()
    assert stored.etag.endswith("-4")
    part = project / f"got/.big.{stored.etag}.part"
    part.parent.mkdir()
    part.write_bytes(content[: sources.PART - 7])  # as a kill leaves it: what follows is asked for
    fetch_s3(f"s3://{bucket.name}", project / "got", project / "done.tsv", store)
    assert (project / "got/big").read_bytes() == content
    (project / "got/big").unlink()
    part.write_bytes(content[:4_000_000] + b"?" + content[4_000_001 : sources.PART])
    with pytest.raises(InputError, match="big: what arrived differs"):
        fetch_s3(f"s3://{bucket.name}", project / "got", project / "done.tsv", store)


@pytest.mark.parametrize("how", [{}, {"ChecksumAlgorithm": "SHA256"}])
def test_an_etag_that_is_no_md5_is_not_taken_for_one(bucket, store: str, project: Path, how: dict) -> None:
    body = {"Body": BYTES, "ServerSideEncryption": "aws:kms"}
    bucket.put_object(Key="secret", **body, **how)
    client = boto3.client("s3", endpoint_url=store)
    stored = replace(sources.list_s3(f"s3://{bucket.name}", store)["secret"], etag="0" * 32)
    (project / "file").write_bytes(BYTES)
    own = sources.Bucket(client, bucket.name, tqdm(disable=True))
    assert own._is_same(project / "file", stored)
    (project / "file").write_bytes(BYTES[::-1])
    assert own._is_same(project / "file", stored) is not bool(how)


def test_an_answer_that_breaks_off_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        asked: ClassVar[list[str]] = []

        def get_object(self, Range: str, **_: str) -> dict[str, StreamingBody]:
            self.asked.append(Range)
            return {"Body": StreamingBody(io.BytesIO(BYTES[: 9 if len(self.asked) == 3 else 5]), 9)}  # pyright: ignore

    own = sources.Bucket(Broken(), "b", tqdm(disable=True))
    assert own._read(sources.Stored("k", "e", 9), 0, 8) == BYTES[:9]
    assert Broken.asked == ["bytes=0-8"] * 3


def test_no_more_is_begun_than_can_be_held() -> None:
    begun, taken = 0, 0

    def work(number: int) -> int:
        nonlocal begun
        begun += 1
        time.sleep(0.001)
        return number

    with ThreadPoolExecutor(sources.THREADS) as pool:
        for expected, got in enumerate(sources.ahead(pool, work, ((k,) for k in range(200)))):
            assert got == expected
            taken += 1
            assert begun - taken <= sources.THREADS + 2
    assert begun == taken == 200


def test_what_a_store_refuses(bucket, store: str, project: Path) -> None:
    for address, message in (
        ("s3://no-such-bucket/x", "NoSuchBucket"),
        (f"s3://{bucket.name}/nothing", "nothing is stored there"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            fetch_s3(address, project / "got", project / "done.tsv", store)
        assert "secret" not in str(raised.value)
    bucket.put_object(Key="p/../../evil", Body=b"x")
    with pytest.raises(InputError, match="outside the target folder"):
        fetch_s3(f"s3://{bucket.name}/p", project / "got", project / "done.tsv", store)
    assert not (project / "evil").exists()
