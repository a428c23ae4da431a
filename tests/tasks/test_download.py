"""Downloads: each source, going on after a kill, damage noticed, nothing written outside the folder, no secret shown."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from models.family import InputError
from tasks import archives, sources, storage
from tasks.datasets.demo import Demo
from tasks.download import download
from tests.tasks.toy_download import BYTES, CSV, FOLDER, fill, is_whole, locked_when_free, zipped

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    with locked_when_free(next(storage.WORK.glob("download-*"))):
        settings = replace(FOLDER, source="demo", demo=demo)
        with pytest.raises(InputError, match="in use by another run"):
            download("sounds", settings)
    assert download("sounds", settings).startswith("download sounds: 31 clips listed")
    raw = Path("data/sounds/raw")
    assert {name: (raw / "video" / name).stat().st_mtime_ns for name in early} == early
    assert not list(raw.rglob(".*"))
