"""Stage download: bring a dataset's raw media and annotations to data/<dataset>/raw, whole or not at all."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from models.family import InputError
from tasks import archives, command, datasets, params, sources, storage, tracking, youtube
from tasks.data import clip_files
from tasks.datasets.demo import Demo, build_demo
from tasks.youtube import YouTube


@dataclass(frozen=True)
class Download:
    """Section `download.<dataset>` of params.yaml."""

    source: str  # demo, youtube, a folder, an archive, https://… of an archive, s3://bucket/prefix (or an archive in a bucket)
    format: str  # module of tasks/datasets
    sha256: str | None  # of the archive
    endpoint: str | None  # of an S3 store that is not AWS
    demo: Demo | None
    youtube: YouTube | None = None


@dataclass(frozen=True)
class Shard:
    """An archive of a source, which may have several."""

    name: str
    version: str  # another one once the archive is another
    bring: Callable[[], Path]  # where it lies on this machine, downloaded first where it lies elsewhere


def fetch(settings: Download, work: Path) -> Path:
    """Bring the source to work/raw, going on with what an interrupted run left there; returns that folder."""
    raw, source = work / "raw", settings.source
    raw.mkdir(parents=True, exist_ok=True)
    is_archive = _is_archive(urlsplit(source).path)
    if settings.sha256 and not is_archive:
        raise InputError(f"params.yaml: sha256 is given but {sources.public_url(source)} is no archive; set it to null")
    if source == "demo":
        if settings.demo is None:
            raise InputError("params.yaml: source is demo but its section `demo` is null; give it kind, seed, clips, …")
        build_demo(settings.demo, raw)
        return raw
    if source == "youtube":
        return _bring_youtube(settings, work)
    if source.startswith(("http://", "https://")):
        if not is_archive:
            endings = ", ".join(archives.ENDINGS)
            raise InputError(f"{sources.public_url(source)} is no archive; over HTTP give one of {endings}")
        archive = work / Path(urlsplit(source).path).name
        shards = [Shard(archive.name, "", lambda: sources.fetch_http(source, archive))]
        _bring(settings, work, [], lambda wanted: None, shards)
    elif source.startswith("s3://"):
        _bring_s3(settings, work)
    elif is_archive:
        if not Path(source).is_file():
            raise InputError(f"{source} not found; check download's source in params.yaml")
        _bring(settings, work, [], lambda wanted: None, [_local_shard(Path(source))])
    elif Path(source).is_dir():
        _bring_folder(settings, work)
    else:
        raise InputError(
            f"source {source!r} is no folder, archive, https:// or s3:// address, demo nor youtube; check params.yaml"
        )
    return _without_wrapper(raw) if is_archive else raw


def _is_archive(name: str) -> bool:
    return name.lower().endswith(archives.ENDINGS)


def _local_shard(path: Path) -> Shard:
    stat = path.stat()
    return Shard(path.name, f"{stat.st_size} {stat.st_mtime_ns}", lambda: path)


def _bring_folder(settings: Download, work: Path) -> None:
    """Hard-link the files below a folder, or copy them across file systems, and unpack the archives at its top."""
    source = Path(settings.source)
    files = {file.relative_to(source).as_posix(): file for file in _files_below(source)}
    tops = [name for name in files if "/" not in name and _is_archive(name)]

    def link(wanted: dict[Path, str]) -> None:
        for path, name in tqdm(wanted.items(), desc="files", unit="file"):
            storage.link_or_copy(files[name], path)

    _bring(settings, work, files.keys() - tops, link, [_local_shard(files[name]) for name in tops])


def _bring_s3(settings: Download, work: Path) -> None:
    """Download the objects of a prefix, and one by one the archives at its top, or the archive that the address names."""
    source, endpoint, done = settings.source, settings.endpoint, work / "objects.tsv"
    objects = sources.list_s3(source, endpoint)
    tops = [name for name in objects if "/" not in name and _is_archive(name)]

    def get(wanted: dict[Path, str]) -> None:
        sources.fetch_s3(source, {path: objects[name] for path, name in wanted.items()}, done, endpoint)

    def shard(name: str) -> Shard:
        archive = storage.inside(work / "archives", name, source)

        def bring() -> Path:
            sources.fetch_s3(source, {archive: objects[name]}, done, endpoint)
            return archive

        return Shard(name, objects[name].etag, bring)

    _bring(settings, work, objects.keys() - tops, get, [shard(name) for name in tops])


def _bring_youtube(settings: Download, work: Path) -> Path:
    """Bring the annotations, and each clip they list that is not beside them from YouTube."""
    own, form = settings.youtube, datasets.load_format(settings.format)
    segment = datasets.segment(form)
    if own is None or segment is None:
        raise InputError(
            "params.yaml: source is youtube but its section `youtube` is null; give it annotations, height, …"
            if own is None
            else f"source is youtube but clips of format {settings.format} name no video there; take vggsound or favd"
        )
    if not Path(own.annotations).is_dir():
        raise InputError(f"params.yaml: youtube.annotations: {own.annotations} is no folder; put the annotations there")
    _bring_folder(dataclasses.replace(settings, source=own.annotations), work)
    youtube.bring(own, form.read(work / "raw"), segment, work / "raw")
    return work / "raw"


def _bring(
    settings: Download,
    work: Path,
    names: Iterable[str],
    fill: Callable[[dict[Path, str]], None],
    shards: Sequence[Shard],
) -> None:
    """Fill work/raw: `fill` brings the files called `names` to the paths they are given, then come the shards in order.

    Each shard is unpacked beside raw, listed once it is whole, and only then moved there: a run that comes after a kill
    reads no archive again that stands listed.
    """
    raw, form = work / "raw", datasets.load_format(settings.format)
    wanted: dict[Path, str] = {}
    # A file that lies where it belongs goes before one that would be moved there: the other then stays where it is.
    for name in sorted(names, key=lambda name: (datasets.place(form, name) != name, name)):
        target = storage.inside(raw, datasets.place(form, name), settings.source)
        wanted[storage.inside(raw, name, settings.source) if target in wanted else target] = name
    lists = {shard: work / "unpacked" / f"{_key(shard)}.json" for shard in sorted(shards, key=lambda shard: shard.name)}
    listed = [Path(path) for file in lists.values() if file.exists() for path in json.loads(file.read_text()).values()]
    for path in {path for path in raw.rglob("*") if path.is_file()} - wanted.keys() - set(listed):
        if path.suffix != ".part":  # an earlier run brought it and the source has it no more
            path.unlink()
    fill(wanted)
    for shard, file in lists.items():
        unpacked = work / "unpacking" / _key(shard)
        if not file.exists():
            archive = shard.bring()
            _unpack(archive, settings, unpacked)
            moves = _moves(unpacked, raw, form, shard.name)
            with storage.atomic_file(file) as temporary:
                temporary.write_text(json.dumps({name: str(path) for name, path in moves.items()}))
            _forget(archive)
        if unpacked.exists():
            for name, path in json.loads(file.read_text()).items():
                if (unpacked / name).exists():
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
                    (unpacked / name).replace(path)
            shutil.rmtree(unpacked)


def _key(shard: Shard) -> str:
    return hashlib.sha256(f"{shard.name}\0{shard.version}".encode()).hexdigest()[:16]


def _unpack(archive: Path, settings: Download, folder: Path) -> None:
    """Unpack an archive into `folder` once its checksum has been compared."""
    if settings.sha256:
        _check_digest(archive, settings.sha256)
    else:
        _check_released(archive, settings.format)
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run unpacked may not have reached the disk
    folder.mkdir(parents=True)
    try:
        archives.unpack(archive, folder)
    except InputError:
        _forget(archive)
        raise


def _moves(unpacked: Path, raw: Path, form: datasets.Format, archive: str) -> dict[str, Path]:
    """Where each file of an unpacked archive goes; one that lies there already, as large as this, is left out."""
    moves: dict[str, Path] = {}
    names = [path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()]
    taken = set[Path]()
    for name in sorted(names, key=lambda name: (datasets.place(form, name) != name, name)):
        target = raw / datasets.place(form, name)
        if target in taken:
            target = raw / name
        if not target.exists():
            moves[name] = target
            taken.add(target)
        elif target.stat().st_size != (unpacked / name).stat().st_size:
            raise InputError(
                f"{archive}: {name} is not the {target.relative_to(raw)} that came before; keep one of them"
            )
    return moves


def _files_below(source: Path) -> list[Path]:
    """Every file below a folder, sorted."""
    seen: set[str] = set()
    files: list[Path] = []

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}; make the folder readable")

    for folder, subfolders, names in os.walk(source, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(folder))  # links that lead back up would never end
        subfolders[:] = [name for name in subfolders if os.path.realpath(Path(folder, name)) not in seen]
        files += [Path(folder, name) for name in names]
    return sorted(files)


def _check_digest(archive: Path, sha256: str) -> None:
    if (found := storage.file_digest(archive)) != sha256.lower():
        _forget(archive)
        raise InputError(f"{archive.name}: sha256 is {found}, params.yaml expects {sha256}; nothing was unpacked")


def _check_released(archive: Path, name: str) -> None:
    """InputError for an archive that is called like one that the format's authors have released, and is another."""
    expected = datasets.released(datasets.load_format(name)).get(archive.name)
    if expected is None:
        return
    with archive.open("rb") as handle:
        found = hashlib.file_digest(handle, "md5").hexdigest()
    if found != expected:
        _forget(archive)
        raise InputError(
            f"{archive.name}: md5 is {found}, the released one has {expected}; fetch it again, or rename it where it is "
            "your own; nothing was unpacked"
        )


def _forget(archive: Path) -> None:
    """Delete a bad archive that was downloaded, so that the next run fetches it anew; leave one that is the user's."""
    if storage.WORK in archive.parents:
        archive.unlink()


def _without_wrapper(raw: Path) -> Path:
    """The only folder at the top of an archive whose annotations lie one level down, else `raw` itself."""
    entries = list(raw.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else raw


def download(dataset: str, settings: Download) -> str:
    """Make data/<dataset>/raw; returns the line that tells what it holds."""
    table_format = datasets.load_format(settings.format)
    values = json.dumps(dataclasses.asdict(settings), sort_keys=True)
    work = storage.WORK / f"download-{dataset}-{hashlib.sha256(values.encode()).hexdigest()[:12]}"
    origin = sources.public_url(settings.source)
    with storage.locked(work):
        made = fetch(settings, work)
        try:
            clips = table_format.read(made)["path"]
        except InputError as error:  # names the copy; what must be mended is the source
            raise InputError(str(error).replace(str(made), origin)) from None
        for leftover in made.rglob(".*.part"):  # of runs that were killed
            leftover.unlink()
        files = [path for path in made.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        num_lost = sum(not clip_files.is_there(made / path) for path in clips)
        storage.install_folder(made, storage.DATA / dataset / "raw")
        shutil.rmtree(work)
    lost = f" ({num_lost} of the clips without a file)" if num_lost else ""
    return (
        f"download {dataset}: {len(clips)} clips listed{lost}, {len(files)} files, {size / 1e6:.1f} MB, from {origin}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", help="an entry of params.yaml's download section")
    dataset = parser.parse_args().dataset
    settings = params.stage(Download, "download", dataset)
    public = dataclasses.replace(settings, source=sources.public_url(settings.source))
    stage = f"download@{dataset}"
    with storage.alone(stage), tracking.run(stage, dataclasses.asdict(public)):
        line = download(dataset, settings)
    command.say(line)


if __name__ == "__main__":
    command.run(main)
