"""Downloads: each source, going on after a kill, damage noticed, nothing written outside the folder, no secret shown."""

from __future__ import annotations

import hashlib
import io
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import boto3
import pytest
from boto3.s3.transfer import TransferConfig
from botocore.response import StreamingBody
from moto.server import ThreadedMotoServer
from tqdm import tqdm

from models.family import InputError
from tasks import archives, sources, storage
from tasks.datasets.demo import Demo
from tasks.download import Download, download

ROOT = Path(__file__).parents[2]
CSV = "abc,1,rain,train\n"
BYTES = os.urandom(300_000)
FOLDER = Download(source="", format="vggsound", sha256=None, endpoint=None, demo=None)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fill(folder: Path) -> Path:
    (folder / "video").mkdir(parents=True)
    (folder / "vggsound.csv").write_text(CSV)
    (folder / "video/abc_000001.mp4").write_bytes(BYTES)
    return folder


def is_whole(raw: Path = Path("data/sounds/raw")) -> bool:
    names = sorted(path.relative_to(raw).as_posix() for path in raw.rglob("*") if path.is_file())
    same = (raw / "video/abc_000001.mp4").read_bytes() == BYTES
    return same and names == ["vggsound.csv", "video/abc_000001.mp4"]


# --- folders -------------------------------------------------------------------------------------------------------------


def test_a_folder_is_hard_linked(project: Path) -> None:
    source = fill(project / "source")
    (source / "up").symlink_to(source)  # would never end
    line = download("sounds", replace(FOLDER, source=str(source)))
    assert line == "download sounds: 1 clips listed, 2 files, 0.3 MB, from " + str(source)
    assert is_whole()
    assert Path("data/sounds/raw/video/abc_000001.mp4").samefile(source / "video/abc_000001.mp4")
    assert not list(storage.WORK.iterdir())


def test_an_older_download_is_replaced(project: Path) -> None:
    fill(project / "source")
    stale = project / "data/sounds/raw/stale"
    stale.mkdir(parents=True)
    download("sounds", replace(FOLDER, source="source"))
    assert is_whole()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "nowhere"}, "source 'nowhere' is no folder"),
        ({"source": "nowhere.zip"}, r"nowhere\.zip not found"),
        ({"source": "demo"}, "demo"),
        ({"source": "https://example.org/page"}, "is no archive"),
        ({"source": "source", "sha256": "0" * 64}, "sha256 is given"),
        ({"source": "source", "format": "vgg"}, "format 'vgg' is unknown"),
        ({"source": "source"}, r"vggsound\.csv not found"),
        ({"source": "broken"}, r"video/gone\.mp4"),
    ],
)
def test_a_wrong_source_leaves_no_raw_folder(project: Path, change: dict, message: str) -> None:
    (project / "source").mkdir()
    (fill(project / "broken") / "video/gone.mp4").symlink_to("elsewhere")
    with pytest.raises(InputError, match=message):
        download("sounds", replace(FOLDER, **change))
    assert not Path("data/sounds/raw").exists()


# --- archives ------------------------------------------------------------------------------------------------------------


def zipped(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def tarred(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def tar_link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
@pytest.mark.parametrize("wrapper", ["", "VGGSound_final/"])
def test_an_archive_is_checked_and_unpacked(project: Path, name: str, wrapper: str) -> None:
    members = [(f"{wrapper}vggsound.csv", CSV.encode()), (f"{wrapper}video/abc_000001.mp4", BYTES)]
    if name == "x.zip":
        zipped(project / name, *members)
    else:
        tarred(project / name, *((tarfile.TarInfo(path), content) for path, content in members))
    settings = replace(FOLDER, source=name, sha256=storage.file_digest(project / name))
    with pytest.raises(InputError, match=f"{name}: sha256 is {settings.sha256}, params.yaml expects 00"):
        download("sounds", replace(settings, sha256="0" * 64))
    assert not Path("data").exists()
    download("sounds", settings)
    assert is_whole()


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "C:\\evil", "..\\evil"])
def test_members_that_lead_out_are_refused(project: Path, name: str) -> None:
    zipped(project / "x.zip", ("good", b"1"), (name, b"2"))
    tarred(project / "x.tar", (tarfile.TarInfo(name), b"2"))
    for archive in ("x.zip", "x.tar"):
        with pytest.raises(InputError, match="outside the target folder") as raised:
            archives.unpack(project / archive, project / "deep/target")
        assert repr(name) in str(raised.value)
    assert not (project / "deep").exists()
    assert not Path("/tmp/evil").exists()


def test_links_that_lead_out_are_refused(project: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(InputError, match="'link' is a link"):
        archives.unpack(zipped(project / "x.zip", (link, b"/etc/passwd")), project / "target")
    for info in (
        tar_link("link", "/etc/passwd"),
        tar_link("link", "../../outside"),
        tar_link("link", "../outside", tarfile.LNKTYPE),
        tar_link("link", "absent"),
        tar_link("link", "link"),
        tar_link("link", "", tarfile.FIFOTYPE),
    ):
        with pytest.raises(InputError, match="'link'"):
            archives.unpack(tarred(project / "x.tar", (info, b"")), project / "target")
    assert not (project / "target").exists()


def test_links_inside_a_tar_become_files(project: Path) -> None:
    members = [(tarfile.TarInfo("a/file"), b"text"), (tar_link("a/soft", "file"), b"")]
    members.append((tar_link("hard", "a/file", tarfile.LNKTYPE), b""))
    archives.unpack(tarred(project / "x.tar", *members), project / "target")
    for name in ("a/file", "a/soft", "hard"):
        assert (project / "target" / name).read_bytes() == b"text"
        assert not (project / "target" / name).is_symlink()


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_a_damaged_archive_is_named(project: Path, name: str) -> None:
    if name == "x.zip":
        whole = zipped(project / name, ("video", BYTES)).read_bytes()
    else:
        whole = tarred(project / name, (tarfile.TarInfo("video"), BYTES)).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no archive", whole[:1000] + b"\0" * 1000 + whole[2000:]):
        (project / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name} is damaged"):
            archives.unpack(project / name, project / "target")
        assert not (project / "target").exists()


# --- HTTP ----------------------------------------------------------------------------------------------------------------


class RangeServer(ThreadingHTTPServer):
    """Serves `content` with Range and If-Range; closes the connection after `cut` bytes of each answer."""

    content, etag, cut = b"", '"1"', 1 << 40

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RangeHandler)
        self.asked: list[tuple[str, str]] = []  # path, Range


class RangeHandler(BaseHTTPRequestHandler):
    server: RangeServer

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range", "")))
        if "missing" in self.path:
            self.send_error(404)
            return
        start = 0
        if "Range" in self.headers and self.headers.get("If-Range") == self.server.etag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", self.server.etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(self.server.content)}")
        self.end_headers()
        self.wfile.write(body[: self.server.cut])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[RangeServer]:
    with RangeServer() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_connection_that_ends_early_is_taken_up_again(server: RangeServer, project: Path) -> None:
    server.content, server.cut = BYTES, 100_000
    sources.fetch_http(f"http://127.0.0.1:{server.server_port}/x.bin", project / "x.bin")
    assert (project / "x.bin").read_bytes() == BYTES
    assert [span for _, span in server.asked] == ["", "bytes=100000-", "bytes=200000-"]
    assert [path.name for path in project.iterdir()] == ["x.bin"]


def test_a_later_run_goes_on_unless_the_file_has_changed(
    server: RangeServer, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    url = f"http://127.0.0.1:{server.server_port}/x.bin"
    server.content, server.cut = BYTES, 10_000  # five attempts are not enough
    with pytest.raises(InputError, match="ended early"):
        sources.fetch_http(url, project / "x.bin")
    assert not (project / "x.bin").exists()
    server.cut, before = 1 << 40, len(server.asked)
    sources.fetch_http(url, project / "x.bin")
    assert [span for _, span in server.asked[before:]] == ["bytes=50000-"]
    assert (project / "x.bin").read_bytes() == BYTES

    (project / "x.bin").rename(project / "x.bin.part")
    os.truncate(project / "x.bin.part", 1000)
    (project / "x.bin.etag").write_text('"1"')
    server.content, server.etag = BYTES[::-1], '"2"'
    sources.fetch_http(url, project / "x.bin")
    assert (project / "x.bin").read_bytes() == BYTES[::-1]


def test_an_archive_over_http_shows_no_secret(server: RangeServer, project: Path) -> None:
    content = zipped(project / "x.zip", ("vggsound.csv", CSV.encode()), ("video/abc_000001.mp4", BYTES)).read_bytes()
    server.content = content
    host = f"127.0.0.1:{server.server_port}"
    settings = replace(FOLDER, sha256=hashlib.sha256(content).hexdigest())
    line = download("sounds", replace(settings, source=f"http://me:secret@{host}/x.zip?token=hidden"))
    assert line.endswith(f"from http://{host}/x.zip")
    assert server.asked == [("/x.zip?token=hidden", "")]
    assert is_whole()
    with pytest.raises(InputError, match="HTTP 404") as raised:
        download("sounds", replace(FOLDER, source=f"http://me:secret@{host}/missing.zip?token=hidden"))
    assert "secret" not in str(raised.value)
    assert "hidden" not in str(raised.value)
    assert Path("data/sounds/raw/vggsound.csv").exists()


def test_no_server_is_an_input_error(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(InputError, match="refused"):
        sources.fetch_http("http://127.0.0.1:9/x.zip", project / "x.zip")


# --- S3 ------------------------------------------------------------------------------------------------------------------


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


# --- interruptions -------------------------------------------------------------------------------------------------------


def test_killed_and_run_again(project: Path) -> None:
    demo = Demo(kind="sounds", seed=3, clips=24, seconds=1.0, workers=1)
    (project / "params.yaml").write_text(
        "download: {sounds: {source: demo, format: vggsound, sha256: null, endpoint: null, youtube: null,"
        " demo: {kind: sounds, seed: 3, clips: 24, seconds: 1.0, workers: 1}}}\n"
    )
    command = [sys.executable, "-m", "tasks.download", "sounds"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(storage.WORK.glob("*/raw/video/[!.]*.mp4"))) < 5:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("data").exists()
    early = {path.name: path.stat().st_mtime_ns for path in storage.WORK.glob("*/raw/video/[!.]*.mp4")}
    assert early
    with storage.locked(next(storage.WORK.glob("download-*"))):
        settings = replace(FOLDER, source="demo", demo=demo)
        with pytest.raises(InputError, match="in use by another run"):
            download("sounds", settings)
    assert download("sounds", settings).startswith("download sounds: 31 clips listed")
    raw = Path("data/sounds/raw")
    assert {name: (raw / "video" / name).stat().st_mtime_ns for name in early} == early
    assert not list(raw.rglob(".*"))
