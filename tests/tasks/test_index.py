"""The index of a stores folder: how its rows are found, and what is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.family import ClipSpec, InputError
from tasks import storage
from tasks.data import index, manifest
from tasks.data.index import INDEX, Places
from tasks.data.loader import ClipDataset, open_split
from tests.tasks.test_manifest import table as manifest_table


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), unique=True), st.text())
def test_places_are_those_of_a_dict(ids: list[str], other: str) -> None:
    splits = [manifest.SPLITS[k % 3] for k in range(len(ids))]
    ordered = sorted(zip(splits, ids, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        index.write(pd.DataFrame(ordered, columns=["split", "id"], dtype="str"), Path(folder), "")
        rows = index.read(Path(folder))
    places = Places(rows)
    assert dict(places) == {clip: row for row, (_, clip) in enumerate(ordered)}
    assert list(places) == [clip for _, clip in ordered] and (other in places) == (other in ids)
    for split in (*manifest.SPLITS, "other"):
        assert index.of_split(rows, split)["id"].to_pylist() == [clip for own, clip in ordered if own == split]


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stores of a manifest, with an index alone."""
    monkeypatch.setattr(storage, "DATA", tmp_path)
    manifest.write(manifest_table("a", "b", "c"), manifest.manifest_path("toy"))
    folder = tmp_path / "toy" / "stores"
    folder.mkdir()
    rows = manifest.read("toy").assign(shard=0, row=0, num_frames=1, audio_row=-1)
    index.write(rows, folder, manifest.digest("toy"))
    assert len(open_toy()) == 1
    return folder


def open_toy() -> list[str]:
    clips = open_split("toy", "train", ClipSpec(0, 16000, 0.0), lambda sample: {}, 0)
    assert isinstance(clips, ClipDataset)
    return list(clips.ids)


def test_stores_of_another_manifest_are_refused(stores: Path) -> None:
    changed = manifest.read("toy").assign(annotation='{"label": "cat, barking"}')
    manifest.write(changed, manifest.manifest_path("toy"))
    with pytest.raises(InputError, match=r"another manifest than .*; run `python -m tasks.stores toy` again") as error:
        open_toy()
    assert "\n" not in str(error.value)


def test_a_manifest_without_a_digest_is_of_another_version(stores: Path) -> None:
    manifest.read("toy").to_parquet(manifest.manifest_path("toy"))
    with pytest.raises(InputError, match="older version of Duet; run the clean stage again"):
        open_toy()


def test_an_index_of_another_form_is_refused(stores: Path) -> None:
    whole = (stores / INDEX).read_bytes()
    for bad in (whole[: len(whole) // 2], b"", b"PAR1"):
        (stores / INDEX).write_bytes(bad)
        with pytest.raises(InputError, match=r"index.arrow is no readable Arrow file \(.*run the stores stage again"):
            open_toy()
    (stores / INDEX).rename(stores / "index.parquet")  # where it stood once
    with pytest.raises(InputError, match=r"index.arrow not found; run the stores stage again"):
        open_toy()
