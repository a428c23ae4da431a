"""Sources of several archives: each unpacked once, whatever kills the download, wherever a mirror keeps the clips."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from models.family import InputError
from tasks import archives, sources, storage
from tasks.download import Download, download

ROOT = Path(__file__).parents[2]
MIRROR = "scratch/shared/beegfs/hchen/train_data/VGGSound_final/video"  # in the archives that go from hand to hand
RAW = Path("data/sounds/raw")
FOLDER = Download(source="source", format="vggsound", sha256=None, endpoint=None, demo=None)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def clips(number: int) -> dict[str, bytes]:
    """Three clips of a shard."""
    return {f"{number:02d}-{k:08d}_000030.mp4": bytes([number, k]) * (500 + k) for k in range(3)}


def write_shard(path: Path, number: int, inside: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in clips(number).items():
                archive.writestr(f"{inside}/{name}" if inside else name, content)
        return
    made = path.parent / f".{path.name}" / inside
    made.mkdir(parents=True)
    for name, content in clips(number).items():
        (made / name).write_bytes(content)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        top = inside.split("/")[0]
        archive.add(path.parent / f".{path.name}" / top, top) if inside else archive.add(made, ".")
    shutil.rmtree(path.parent / f".{path.name}")


def write_csv(folder: Path, shards: int) -> None:
    """The annotations of all shards, and of one clip more that nobody has."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for number in range(shards) for name in clips(number)]
    rows = "".join(f"{name[:11]},30,rain,{'test' if k % 3 else 'train'}\n" for k, name in enumerate(names))
    (folder / "vggsound.csv").write_text(f"{rows}-dead-video,30,rain,train\n")


def assert_all_there(shards: int) -> None:
    expected = {name: content for number in range(shards) for name, content in clips(number).items()}
    assert {path.name: path.read_bytes() for path in (RAW / "video").iterdir()} == expected
    assert sorted(path.name for path in RAW.iterdir()) == ["vggsound.csv", "video"]


# --- layouts ----------------------------------------------------------------------------------------------------------------


def test_shards_of_every_layout_end_in_one_folder(project: Path) -> None:
    write_csv(project / "source", 5)
    layouts = [
        ("_00.tar.gz", MIRROR),
        ("_01.tar", "video"),
        ("_02.zip", ""),
        ("_03.zip", "vggsound_03"),
        ("_04.tar", ""),
    ]
    for number, (ending, inside) in enumerate(layouts):
        write_shard(project / f"source/vggsound{ending}", number, inside)
    line = download("sounds", FOLDER)
    assert line.startswith("download sounds: 16 clips listed (1 of the clips without a file), 16 files")
    assert_all_there(5)
    assert len(list((project / "source").iterdir())) == 6  # nothing of the user's has gone


@pytest.mark.parametrize("inside", ["", "video", "vggsound_00", MIRROR])
def test_plain_folders_of_every_layout(project: Path, inside: str) -> None:
    write_csv(project / "source", 1)
    for name, content in clips(0).items():
        (project / "source" / inside).mkdir(parents=True, exist_ok=True)
        (project / "source" / inside / name).write_bytes(content)
    download("sounds", FOLDER)
    assert_all_there(1)


def test_of_two_copies_of_a_clip_the_one_in_its_place_counts(project: Path) -> None:
    write_csv(project / "source", 1)
    for folder, more in (("a", b"?"), ("video", b""), ("z", b"!")):
        (project / "source" / folder).mkdir()
        for name, content in clips(0).items():
            (project / "source" / folder / name).write_bytes(content + more)
    download("sounds", FOLDER)
    assert {path.name: path.read_bytes() for path in (RAW / "video").iterdir()} == clips(0)
    assert (RAW / "a" / next(iter(clips(0)))).is_file()


def test_two_shards_with_other_bytes_under_one_name_are_refused(project: Path) -> None:
    write_csv(project / "source", 1)
    write_shard(project / "source/a.zip", 0, "video")
    with zipfile.ZipFile(project / "source/b.zip", "w") as archive:
        archive.writestr(f"video/{next(iter(clips(0)))}", b"something else")
    with pytest.raises(
        InputError, match=r"b\.zip: video/00-00000000_000030\.mp4 is not the video/00-.* that came before"
    ):
        download("sounds", FOLDER)


def test_a_damaged_shard_is_named_and_the_others_are_kept(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(project / "source", 3)
    for number in range(3):
        write_shard(project / f"source/vggsound_{number:02d}.tar.gz", number, MIRROR)
    whole = (project / "source/vggsound_02.tar.gz").read_bytes()
    (project / "source/vggsound_02.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"vggsound_02\.tar\.gz is damaged"):
        download("sounds", FOLDER)
    assert not RAW.exists()
    read, unpack = [], archives.unpack
    monkeypatch.setattr(archives, "unpack", lambda archive, to: (read.append(archive.name), unpack(archive, to)))
    (project / "source/vggsound_02.tar.gz").write_bytes(whole)
    download("sounds", FOLDER)
    assert read == ["vggsound_02.tar.gz"]
    assert_all_there(3)


def test_a_shard_that_changed_or_went_between_two_runs(project: Path) -> None:
    write_csv(project / "source", 3)
    for number in range(3):
        write_shard(project / f"source/{number}.zip", number, "video")
    (project / "source/3.zip").write_bytes(b"no archive")
    with pytest.raises(InputError, match="damaged"):
        download("sounds", FOLDER)
    (project / "source/3.zip").unlink()
    (project / "source/0.zip").unlink()
    write_csv(project / "source", 2)
    write_shard(project / "source/2.zip", 0, "video")  # the old one's clips belong to nothing any more
    download("sounds", FOLDER)
    assert_all_there(2)


# --- S3 and kills -----------------------------------------------------------------------------------------------------------


class Counting:
    """A WSGI application around another one: counts GETs of objects and the bytes they gave."""

    def __init__(self, application: Any) -> None:
        self.application = application
        self.asked: list[tuple[str, str]] = []  # object, Range
        self.pause = 0.0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        key = environ["PATH_INFO"].strip("/").partition("/")[2]
        if environ["REQUEST_METHOD"] == "GET" and key:
            self.asked.append((key, environ.get("HTTP_RANGE", "")))
            time.sleep(self.pause)
        return self.application(environ, start_response)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Counting]]:
    for name, value in (("ACCESS_KEY_ID", "me"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    counting = Counting(server._server.app)  # pyright: ignore
    server._server.app = counting  # pyright: ignore
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}", counting
    server.stop()


def size_of(span: str) -> int:
    first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", span).groups()  # pyright: ignore
    return int(last) - int(first) + 1


def run_until(condition: Any, endpoint: str) -> None:
    """`python -m tasks.download sounds`, killed as soon as the condition holds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DUET_TRACKING": "off"}
    command = [sys.executable, "-m", "tasks.download", "sounds"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not condition():
        time.sleep(0.005)
    assert process.poll() is None, process.stderr.read().decode()  # pyright: ignore
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_twice_no_finished_shard_is_read_again(project: Path, store: tuple[str, Counting]) -> None:
    endpoint, counting = store
    bucket = boto3.resource("s3", endpoint_url=endpoint).Bucket("shards")
    bucket.create()
    write_csv(project / "up", 4)
    for number in range(4):
        write_shard(project / f"up/vggsound_{number:02d}.tar", number, MIRROR)
        with (project / f"up/vggsound_{number:02d}.tar").open("ab") as handle:
            handle.write(bytes(3 * sources.PART))  # tar reads zeros as its end: a shard of several parts
    sizes = {path.name: path.stat().st_size for path in (project / "up").iterdir()}
    for name in sizes:
        bucket.upload_file(str(project / "up" / name), f"vgg/{name}")
    (project / "params.yaml").write_text(
        "download: {sounds: {source: 's3://shards/vgg', format: vggsound, sha256: null, demo: null, youtube: null,"
        f" endpoint: '{endpoint}'}}}}\n"
    )

    def begun(number: int) -> int:
        return sum(key == f"vgg/vggsound_{number:02d}.tar" for key, _ in counting.asked)

    counting.pause = 0.1
    run_until(lambda: begun(1) >= 2, endpoint)
    first = len(counting.asked)
    run_until(lambda: begun(3) >= 2, endpoint)
    assert not RAW.exists()
    counting.pause = 0.0
    settings = replace(FOLDER, source="s3://shards/vgg", endpoint=endpoint)
    assert len(list(storage.WORK.glob("download-*/unpacked/*.json"))) == 3
    download("sounds", settings)
    assert_all_there(4)

    read = Counter[str]()
    for key, span in counting.asked:
        read[key.removeprefix("vgg/")] += size_of(span)
    assert read["vggsound.csv"] == sizes["vggsound.csv"]
    assert read["vggsound_00.tar"] == sizes["vggsound_00.tar"]  # whole before the first kill
    assert read["vggsound_02.tar"] == sizes["vggsound_02.tar"]  # between the kills
    for name in (
        "vggsound_01.tar",
        "vggsound_03.tar",
    ):  # in the midst of them: at most the parts then under way are lost
        assert sizes[name] <= read[name] <= sizes[name] + sources.THREADS * sources.PART
    assert not any(key.endswith("_00.tar") for key, _ in counting.asked[first:])
