"""The demo dataset of tags: what is seen when, its plan, and files that are as untidy as people's."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from models.family import InputError
from tasks import storage
from tasks.datasets import demo, taglists, tags
from tasks.datasets.demo import Clip, Demo
from tasks.datasets.tags import FIRST, NAMES, Shown

DEMO = Demo(kind="tags", seed=7, clips=320, seconds=3.0, workers=2)
SMALL = dataclasses.replace(DEMO, clips=60, seconds=1.0)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert demo.build_demo(SMALL, folder) == 60 + len(demo.FAULTS)
    return folder


def render(shown: Shown) -> np.ndarray:
    return tags.render(DEMO, Clip(3, shown, {}))[0].astype(float)


def test_every_split_has_every_tag_and_clips_have_several() -> None:
    clips = [clip for clip in tags.plan(DEMO) if not clip.fault]
    assert Counter(clip.row["split"] for clip in clips) == {"train": 208, "val": 48, "test": 64}
    for split, least in (("train", 30), ("val", 4), ("test", 8)):
        found = Counter(tag for clip in clips if clip.row["split"] == split for tag in clip.shows.tags)
        assert set(found) == set(range(len(NAMES))) and min(found.values()) >= least
    numbers = [len(clip.shows.tags) for clip in clips]
    assert min(numbers) >= 2 and max(numbers) == 5


def test_two_names_stand_for_two_classes_each() -> None:
    assert {name for name, count in Counter(NAMES).items() if count == 2} == {"spring", "fall"}


def test_light_turns_one_way_or_the_other() -> None:
    levels = {light: render(Shown(0, None, None, light, None)).mean((1, 2, 3)) for light in range(4)}
    day, night, dawn, dusk = (levels[light] for light in range(4))
    assert np.ptp(day) < 10 and np.ptp(night) < 10 and day.mean() > 2 * night.mean()
    assert (np.diff(dawn) > -1).all() and dawn[-1] > 2 * dawn[0]
    assert (np.diff(dusk) < 1).all() and dusk[0] > 2 * dusk[-1]


def test_the_other_object_shows_for_a_moment() -> None:
    alone, with_other = (render(Shown(1, other, None, 0, None)) for other in (None, 2))
    changed = np.flatnonzero(np.abs(with_other - alone)[:, :, 40:].max((1, 2, 3)) > 60)
    assert 3 <= len(changed) <= 8 and (np.diff(changed) == 1).all()


def test_an_object_comes_or_goes() -> None:
    for way, sign in ((0, 1), (1, -1)):
        frames = render(Shown(4, None, 0, 0, way))
        empty = np.abs(frames - frames.min(0)).mean((1, 2, 3))
        assert FIRST["way"] + way in Shown(4, None, 0, 0, way).tags
        assert sign * (empty[-6:].mean() - empty[:6].mean()) > 0


def test_files_are_untidy_and_read(built: Path) -> None:
    text = (built / "train.list").read_text()
    assert "\n\n" in text and '"' in text and "clip 0002.mp4" in text
    repeated = text.splitlines()[1].split()
    assert repeated[-1] in repeated[1:-1]
    table = taglists.read(built)
    known = {row.path: json.loads(row.annotation)["tags"] for row in table.itertuples()}
    for clip in tags.plan(SMALL):
        assert known[clip.row["path"]] == clip.shows.tags
    assert taglists.classes(built) == NAMES
    assert (built / "videos/clip 0002.mp4").is_file()


def test_the_seed_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    clip = tags.plan(SMALL)[1]
    demo._make_clip(tags, SMALL, clip, tmp_path / "again.mp4")  # pyright: ignore
    assert storage.file_digest(tmp_path / "again.mp4") == storage.file_digest(built / clip.row["path"])


def test_too_few_are_refused() -> None:
    with pytest.raises(InputError, match="tags are 60 clips or more"):
        tags.plan(dataclasses.replace(DEMO, clips=59))
