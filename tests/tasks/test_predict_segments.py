"""Segments of raw videos: thresholds that training leaves in the bundle, and the files that a person gets."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

import models
from models.family import InputError
from tasks import bundle, jobs, predict, storage, stores, train
from tasks.data import manifest, video
from tasks.engine.distributed import Place
from tests.tasks import stage_process, toy_training

STORES = {
    "num_frames": 0, "frame_step": 1, "short_side": 16, "quality": 95, "sample_rate": 16000, "codec": "pcm16",
    "shards": 1, "workers": 1, "scheduler": "processes", "max_quarantine": 0.0,
}  # fmt: skip
PLACE = Place(torch.device("cpu"))
LABELS = ["grow", "jump"]


def annotation(number: int) -> str:
    return json.dumps({"segments": [[0.1 * number, 0.7, LABELS[number % 2]]], "duration": 1.0, "frame": 10})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, write_clip: Callable[..., Path]) -> Path:
    """Six videos of a second, prepared for adatad, and its tiny model trained on four of them."""
    root, rows = tmp_path_factory.mktemp("project"), []
    for number in range(6):
        path = write_clip(root / f"data/toy/raw/v{number}.mp4", pitch=200.0 + 9 * number, sound=False)
        rows.append({
            "id": path.stem, "path": f"raw/{path.name}", "split": "train" if number < 4 else "val", "group": path.stem,
            "start": 0.0, **video.probe(path).__dict__, "has_video": True, "checksum": "", "annotation": annotation(number),
        })  # fmt: skip
    with (root / "params.yaml").open("w") as file:
        YAML().dump({"stores": {"toy": STORES}, "adatad": {"dataset": "toy"}}, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        manifest.write(pd.DataFrame(rows), manifest.manifest_path("toy"))
        stores.stores("toy", stores.Stores(**STORES))
        train.train(job(), PLACE, lambda metrics, step: None)
    return root


def job(**changes: Any) -> jobs.Job:
    phase = models.load("adatad").phases["finetune"]
    settings = toy_training.settings(epochs=2, batch_size=2)
    facts = jobs.read_facts("adatad", "toy")
    return replace(jobs.Job("adatad", "finetune", phase, phase.tiny, settings, "toy", facts), **changes)


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


# --- calibration -----------------------------------------------------------------------------------------------------------


def test_the_bundle_knows_what_to_believe(here: Path) -> None:
    trained = bundle.load(here / "artifacts/adatad/finetune")
    assert list(trained.facts.thresholds) == LABELS
    assert all(0 < score <= 1 for score in trained.facts.thresholds.values())
    assert predict.Predictor(trained).facts == trained.facts


def test_killed_while_calibrating_it_ends_with_the_same_bytes(here: Path, tmp_path: Path) -> None:
    """In a copy: all is trained when the kill comes, and nothing of it is done again."""
    project = tmp_path / "project"
    shutil.copytree(here, project, ignore=shutil.ignore_patterns("artifacts"))
    os.chdir(project)
    whole = job()

    def die(*_: Any) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(replace(whole, phase=replace(whole.phase, calibrate=die)), PLACE, lambda metrics, step: None)
    assert not whole.out.exists()
    steps: list[int] = []
    train.train(whole, PLACE, lambda metrics, step: steps.append(step))
    assert steps == []
    assert stage_process.contents(project / whole.out) == stage_process.contents(here / whole.out)
    assert not list(storage.WORK.glob("*"))


# --- files -----------------------------------------------------------------------------------------------------------------


def ask(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["predict", "adatad", *map(str, arguments)])
    predict.main()


def test_what_a_person_gets(
    here: Path, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = [here / "data/toy/raw/v0.mp4", media / "long_gop.mp4"]
    ask(monkeypatch, *clips, "--out", tmp_path, "--min-score", 0.0, "--top", 2, "--json", tmp_path / "few.json")
    names = ["results.json", *(f"{clip.stem}{end}" for clip in clips for end in (".srt", ".png"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "few.json"])
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert list(results) == ["v0", "long_gop"]
    for clip, seconds in zip(clips, (1.0, 3.0), strict=True):
        rows = results[clip.stem]
        assert len(rows) > 2 and {row["label"] for row in rows} <= set(LABELS)
        assert all(0 <= row["segment"][0] <= row["segment"][1] <= seconds for row in rows)
        assert "-->" in (tmp_path / f"{clip.stem}.srt").read_text()
        Image.open(io.BytesIO((tmp_path / f"{clip.stem}.png").read_bytes())).verify()
    few = json.loads((tmp_path / "few.json").read_text())
    assert [(answer["duration"], len(answer["segments"])) for answer in few] == [(1.0, 2), (3.0, 2)]
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{clips[0]}: duration 0:01.0, segments: 0:0") and second.count(";") == 1
    assert last == f"5 files in {tmp_path}"


def test_a_video_in_which_nothing_is_found(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = here / "data/toy/raw/v1.mp4"
    ask(monkeypatch, clip, "--out", tmp_path, "--min-score", 1)
    assert capsys.readouterr().out.splitlines()[0] == f"{clip}: duration 0:01.0, segments: none"
    assert (tmp_path / "v1.srt").read_bytes() == b""
    with Image.open(tmp_path / "v1.png") as image:
        assert np.asarray(image.convert("L")).min() < 128, "it says so"
    assert json.loads((tmp_path / "results.json").read_text())["results"]["v1"], "scorers want every detection"


def test_thresholds_are_those_of_the_bundle(here: Path) -> None:
    trained = bundle.load(here / "artifacts/adatad/finetune")
    clip = here / "data/toy/raw/v2.mp4"
    plain = predict.Predictor(trained)
    rows = plain.answers([clip])[0]["segments"]
    middle = float(np.median([row["score"] for row in rows if row["label"] == "grow"]))
    facts = replace(trained.facts, thresholds={"grow": middle, "jump": 2.0})
    shown = predict.Predictor(replace(trained, facts=facts)).predict([clip], top=100)[0]["segments"]
    assert shown == [row for row in rows if row["label"] == "grow" and row["score"] >= middle] != []


def test_a_clip_that_cannot_be_read_has_no_files(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit):
        ask(monkeypatch, tmp_path / "bad.mp4", here / "data/toy/raw/v0.mp4", "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "v0.png", "v0.srt"]


def test_names_that_cannot_be(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = here / "data/toy/raw/v0.mp4"
    twin = Path(shutil.copy(clip, tmp_path / "v0.mkv"))
    with pytest.raises(InputError, match=r"v0\.mp4 and .*v0\.mkv would write the same files"):
        ask(monkeypatch, clip, twin, "--out", tmp_path / "out")
    outside = Path(shutil.copy(clip, tmp_path / "..\\..\\x.mp4"))
    with pytest.raises(InputError, match="would be written outside the target folder"):
        ask(monkeypatch, outside, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="would be written outside"):
        predict.write_files({"../x.srt": ""}, tmp_path / "out")


def test_videos_that_a_list_names(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "few.list").write_text(f"{here / 'data/toy/raw/v0.mp4'}\n\n")
    ask(monkeypatch, tmp_path / "few.list", "--out", tmp_path / "out", "--form", "activitynet")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "v0.png", "v0.srt"]
    with pytest.raises(InputError, match="--out, form xml: adatad has activitynet"):
        ask(monkeypatch, tmp_path / "few.list", "--out", tmp_path / "out", "--form", "xml")


@pytest.mark.parametrize(("wrong", "words"), [
    (("--min-score", "1.5"), "--min-score is 1.5; scores go from 0 to 1"),
    (("--min-score", "nan"), "--min-score is nan"),
    (("--top", "0"), "--top is 0"),
])  # fmt: skip
def test_values_that_cannot_be(here: Path, monkeypatch: pytest.MonkeyPatch, wrong: tuple[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ask(monkeypatch, here / "data/toy/raw/v0.mp4", *wrong)


def test_a_family_without_files_or_thresholds(
    write_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_bundle(tmp_path / "finetune")
    for wrong, words in ((("--out", "x"), "makes no files"), (("--min-score", "0.5"), "not chosen by their score")):
        monkeypatch.setattr(sys, "argv", ["predict", "t3av", "a.mp4", "--model", str(folder), *wrong])
        with pytest.raises(InputError, match=words):
            predict.main()


def test_a_long_video_is_not_decoded_as_a_whole(here: Path, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any time there are the frames of as many windows as go through the model at once, and the next one's."""
    decode, alive, most, windows = predict.decode_jpegs, [0], [0], [0]

    def counted(jpegs: list[bytes]) -> np.ndarray:
        frames = np.array(decode(jpegs))
        alive[0] += 1
        windows[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(frames, lambda: alive.__setitem__(0, alive[0] - 1))
        return frames

    monkeypatch.setattr(predict, "decode_jpegs", counted)
    predictor = predict.load_predictor("adatad", str(here / "artifacts/adatad/finetune"))
    predictor.predict([media / "long_gop.mp4"])
    assert windows[0] > 8 and most[0] <= 2 * predict.WINDOWS
