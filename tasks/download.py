"""Stage download: bring a dataset's raw media and annotations to data/<dataset>/raw, whole or not at all."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from models.family import InputError
from tasks import archives, command, datasets, params, sources, storage, tracking
from tasks.datasets.demo import Demo, build_demo


@dataclass(frozen=True)
class Download:
    """Section `download.<dataset>` of params.yaml."""

    source: str  # demo, a folder, an archive, https://… of an archive, s3://bucket/prefix (or an archive in a bucket)
    format: str  # module of tasks/datasets
    sha256: str | None  # of the archive
    endpoint: str | None  # of an S3 store that is not AWS
    demo: Demo | None


def fetch(settings: Download, work: Path) -> Path:
    """Bring the source to work/raw, going on with what an interrupted run left there; returns that folder."""
    raw, source = work / "raw", settings.source
    raw.mkdir(parents=True, exist_ok=True)
    is_archive = urlsplit(source).path.lower().endswith(archives.ENDINGS)
    if settings.sha256 and not is_archive:
        raise InputError(f"params.yaml: sha256 is given but {sources.public_url(source)} is no archive; set it to null")
    if source == "demo":
        if settings.demo is None:
            raise InputError("params.yaml: source is demo but its section `demo` is null; give it kind, seed, clips, …")
        build_demo(settings.demo, raw)
    elif is_archive:
        archive = _fetch_archive(settings, work)
        if settings.sha256:
            _check_digest(archive, settings.sha256)
        else:
            _check_released(archive, settings.format)
        try:
            archives.unpack(archive, raw)
        except InputError:
            _forget(archive)
            raise
        return _without_wrapper(raw)
    elif source.startswith("s3://"):
        sources.fetch_s3(source, raw, work / "objects.tsv", settings.endpoint)
    elif source.startswith(("http://", "https://")):
        endings = ", ".join(archives.ENDINGS)
        raise InputError(f"{sources.public_url(source)} is no archive; over HTTP give one of {endings}")
    elif Path(source).is_dir():
        _copy_folder(Path(source), raw)
        _unpack_released(raw, settings.format)
    else:
        raise InputError(
            f"source {source!r} is no folder, archive, https:// or s3:// address, nor demo; check params.yaml"
        )
    return raw


def _fetch_archive(settings: Download, work: Path) -> Path:
    """Where the archive lies on this machine, downloaded first where the source is elsewhere."""
    source = settings.source
    if source.startswith(("http://", "https://")):
        archive = work / Path(urlsplit(source).path).name
        sources.fetch_http(source, archive)
    elif source.startswith("s3://"):
        archive = work / source.rpartition("/")[2]
        sources.fetch_s3(source, work, work / "objects.tsv", settings.endpoint)
    else:
        archive = Path(source)
    if not archive.is_file():
        raise InputError(f"{archive} not found; check download's source in params.yaml")
    return archive


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


def _unpack_released(raw: Path, name: str) -> None:
    """Unpack the released archives at the top of a folder that was copied to `raw`, all of them checked first."""
    found = [raw / file for file in datasets.released(datasets.load_format(name)) if (raw / file).is_file()]
    for archive in found:
        _check_released(archive, name)
    for archive in found:
        archives.unpack(archive, raw)
        archive.unlink()


def _forget(archive: Path) -> None:
    """Delete a bad archive that was downloaded, so that the next run fetches it anew; leave one that is the user's."""
    if storage.WORK in archive.parents:
        archive.unlink()


def _without_wrapper(raw: Path) -> Path:
    """The only folder at the top of an archive whose annotations lie one level down, else `raw` itself."""
    entries = list(raw.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else raw


def _copy_folder(source: Path, target: Path) -> None:
    """Hard-link every file below `source` to the same place below `target`, or copy it across file systems."""
    seen: set[str] = set()
    files: list[Path] = []

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}; make the folder readable")

    for folder, subfolders, names in os.walk(source, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(folder))  # links that lead back up would never end
        subfolders[:] = [name for name in subfolders if os.path.realpath(Path(folder, name)) not in seen]
        files += [Path(folder, name) for name in names]
    wanted = {file: target / file.relative_to(source) for file in sorted(files)}
    for path in {path for path in target.rglob("*") if path.is_file()} - set(wanted.values()):
        path.unlink()  # an earlier run brought it and the source has it no more
    for file, path in tqdm(wanted.items(), desc="files", unit="file"):
        storage.link_or_copy(file, path)


def download(dataset: str, settings: Download) -> str:
    """Make data/<dataset>/raw; returns the line that tells what it holds."""
    table_format = datasets.load_format(settings.format)
    values = json.dumps(dataclasses.asdict(settings), sort_keys=True)
    work = storage.WORK / f"download-{dataset}-{hashlib.sha256(values.encode()).hexdigest()[:12]}"
    with storage.locked(work):
        made = fetch(settings, work)
        try:
            num_clips = len(table_format.read(made))
        except InputError as error:  # names the copy; what must be mended is the source
            raise InputError(str(error).replace(str(made), sources.public_url(settings.source))) from None
        for leftover in made.rglob(".*.part"):  # of runs that were killed
            leftover.unlink()
        files = [path for path in made.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        storage.install_folder(made, storage.DATA / dataset / "raw")
        shutil.rmtree(work)
    origin = sources.public_url(settings.source)
    return f"download {dataset}: {num_clips} clips listed, {len(files)} files, {size / 1e6:.1f} MB, from {origin}"


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
