"""Bundles and checkpoints without what is frozen: the base is made again to the byte, or loading ends with one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEModel

import models
from models.family import InputError
from models.weights import frozen_digest, frozen_state
from tasks import bundle, compact, jobs, journal, storage, stores, train
from tasks.data import manifest, video
from tasks.engine import checkpoint, distributed, profiling
from tasks.predict import Predictor
from tests.tasks import toy_training as toy
from tests.tasks.stage_process import contents

HERE = distributed.Place(torch.device("cpu"))
PHASE = models.load("adatad").phases["finetune"]
OUT = Path("artifacts/adatad/finetune")
STORES = stores.Stores(0, 1, 32, 95, 16000, "pcm16", 1, 1, "processes", 0.0)
SPLITS = {"a": "train", "b": "train", "c": "train", "d": "val"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, write_clip: Callable[..., Path]) -> Path:
    """A project with four videos of ten frames, an action in each, as the data stages leave them."""
    root = tmp_path_factory.mktemp("videos")
    rows = []
    for number, (name, split) in enumerate(SPLITS.items()):
        path = write_clip(root / f"data/actions/raw/{name}.mp4", pitch=200.0 + 37 * number)
        annotation = {"segments": [[0.1, 0.2 * (number + 2), "jump" if number % 2 else "run"]], "duration": 1.0}
        rows.append({
            "id": name, "path": f"raw/{name}.mp4", "split": split, "group": name, "start": 0.0,
            **video.probe(path).__dict__, "has_video": True, "checksum": "", "annotation": json.dumps(annotation),
        })  # fmt: skip
    before = Path.cwd()
    os.chdir(root)
    try:
        manifest.write(pd.DataFrame(rows), manifest.manifest_path("actions"))
        stores.stores("actions", STORES)
        with Path("params.yaml").open("w") as file:
            YAML().dump({"stores": {"actions": asdict(STORES)}}, file)
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def project(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(videos, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(name: str = "none", slim: bool = True, mode: str = "adapter", **changes: Any) -> jobs.Job:
    """The tiny phase with a base of that name."""
    model = PHASE.tiny.model
    backbone = replace(model.backbone, model_name=name, mode=mode)
    config = replace(PHASE.tiny, model=replace(model, backbone=backbone))
    settings = toy.settings(**{"epochs": 2, "batch_size": 1, "ema_decay": 0.9} | changes)
    facts = jobs.read_facts("adatad", "actions")
    return jobs.Job("adatad", "finetune", replace(PHASE, slim=slim), config, settings, "actions", facts)


@pytest.fixture(scope="module")
def made(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with a slim bundle in it."""
    root = tmp_path_factory.mktemp("made") / "project"
    shutil.copytree(videos, root)
    before = Path.cwd()
    os.chdir(root)
    try:
        trained(job(epochs=1))
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def slim(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bundle.Bundle:
    """That bundle, to be spoilt."""
    shutil.copytree(made / OUT, tmp_path / OUT)
    monkeypatch.chdir(tmp_path)
    return bundle.load(OUT)


def unheard(metrics: dict[str, float], step: int) -> None:
    pass


def trained(given: jobs.Job) -> bundle.Bundle:
    torch.rand(7)  # whatever was drawn before changes nothing
    train.train(given, HERE, unheard)
    return bundle.load(given.out)


def whole_and_slim(**given: Any) -> tuple[bundle.Bundle, bundle.Bundle]:
    """The same run with all weights in its bundle, in the folder `whole`, and without the frozen ones."""
    trained(job(slim=False, **given))
    shutil.move(OUT, "whole")
    return bundle.load(Path("whole")), trained(job(**given))


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def write_base(folder: str, seed: int) -> None:
    """VideoMAE of the tiny phase's sizes, as transformers writes it."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    shape: dict[str, Any] = {"image_size": 16, "patch_size": 8, "num_frames": 4, "tubelet_size": 2}
    VideoMAEModel(VideoMAEConfig(use_mean_pooling=True, **sizes, **shape)).save_pretrained(folder)


def edit(folder: Path, **changes: Any) -> None:
    """Other values in `base` of bundle.json."""
    path = folder / bundle.META
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"base": meta["base"] | changes}))


def failure(folder: Path = OUT) -> str:
    """The one line with which loading the module ends."""
    with pytest.raises(InputError) as error:
        bundle.load(folder).module()
    assert "\n" not in str(error.value) and str(error.value).startswith(str(folder / bundle.META))
    return str(error.value)


# --- what a bundle holds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["adapter", "frozen", "side"])
def test_it_lacks_the_base_and_answers_the_same(project: Path, mode: str) -> None:
    whole, slim = whole_and_slim(mode=mode)
    frozen = frozen_state(PHASE.build(slim.config, slim.facts))
    assert frozen and not frozen.keys() & slim.state.keys()
    assert frozen.keys() | slim.state.keys() == whole.state.keys()
    assert "normalizer" in slim.state, "training moves it"
    assert slim.path.stat().st_size < whole.path.stat().st_size - sum(value.nbytes for value in frozen.values()) / 2
    assert slim.meta["base"] == {"sha256": digest_of(whole), "seed": 5}
    assert {**slim.meta, "base": None} == {**whole.meta, "base": None}
    assert (OUT / bundle.HISTORY).read_bytes() == Path("whole", bundle.HISTORY).read_bytes()
    assert_equal(slim.module().state_dict(), whole.state)
    assert_equal(slim.whole(), whole.state)
    clips = sorted((project / "data/actions/raw").iterdir())
    assert Predictor(slim).predict(clips) == Predictor(whole).predict(clips)


def digest_of(whole: bundle.Bundle) -> str:
    module = PHASE.build(whole.config, whole.facts)
    module.load_state_dict(whole.state)
    return frozen_digest(module)


def test_making_the_base_disturbs_no_random_numbers(slim: bundle.Bundle) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    slim.whole()
    assert torch.equal(torch.rand(4), expected)


def test_in_8_bits_it_holds_everything(project: Path) -> None:
    whole = whole_and_slim()[0]
    for source, target in ((whole.path.parent, Path("a")), (OUT, Path("b"))):
        compact.write_int8(source, target)
    assert (Path("a") / bundle.WEIGHTS).read_bytes() == (Path("b") / bundle.WEIGHTS).read_bytes()
    assert_equal(bundle.load(Path("b")).module().state_dict(), bundle.load(Path("a")).module().state_dict())


# --- which base it is ------------------------------------------------------------------------------------------------------


def test_another_seed_is_an_error(slim: bundle.Bundle) -> None:
    edit(OUT, seed=6)
    assert "other frozen weights" in failure() and "random weights of seed 6 here" in failure()


@pytest.mark.parametrize(
    "changes",
    [{"sha256": "abc"}, {"sha256": None}, {"sha256": "A" * 64}, {"seed": "x"}, {"seed": None}, {"phase": "sing"},
     {"facts": {"label": []}}, {"config": {"model": 3}}],
)  # fmt: skip
def test_a_damaged_base_is_one_line(slim: bundle.Bundle, changes: dict[str, Any]) -> None:
    edit(OUT, **changes)
    failure()
    (OUT / bundle.META).write_text(json.dumps(json.loads((OUT / bundle.META).read_text()) | {"base": "abc"}))
    assert "`base` is damaged" in failure()


def test_a_bundle_that_forgot_its_base_is_one_line(slim: bundle.Bundle) -> None:
    meta = json.loads((OUT / bundle.META).read_text())
    del meta["base"]
    (OUT / bundle.META).write_text(json.dumps(meta))
    with pytest.raises(
        InputError, match=r"weights\.safetensors: checkpoint of another architecture: it lacks backbone"
    ):
        bundle.load(OUT).module()


def test_a_named_base_must_be_there_and_the_same(project: Path) -> None:
    write_base("weights/vit", 1)
    whole, slim = whole_and_slim(name="weights/vit", epochs=1)
    kind = slim.meta["pretrained"]["backbone"]
    assert_equal(slim.whole(), whole.state)
    write_base("weights/vit", 2)
    assert "trained on other frozen weights" in failure() and "than weights/vit here" in failure() and kind in failure()
    shutil.rmtree("weights/vit")
    assert "trained on weights/vit, which cannot be had" in failure() and "no such folder" in failure()
    write_base("elsewhere", 1)
    config = json.loads((OUT / bundle.META).read_text())["config"]
    config["model"]["backbone"]["model_name"] = "elsewhere"
    edit(OUT, config=config)
    assert_equal(bundle.load(OUT).whole(), whole.state)


# --- started from another bundle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "weights/vit"])
def test_a_bundle_that_started_from_a_slim_one_knows_the_base(project: Path, name: str) -> None:
    """Without adapters, random weights are drawn otherwise, and the seed is another: only the first run's make the base."""
    write_base("weights/vit", 1)
    first = trained(job(name, epochs=1))
    for number, mode in enumerate(("adapter", "frozen")):
        shutil.move(OUT, f"earlier{number}")
        slim = trained(job("none", mode=mode, seed=8 + number, epochs=1, start_from=f"earlier{number}"))
        shutil.rmtree(f"earlier{number}")
        assert slim.meta["base"] == {**first.meta["base"], **{k: first.meta[k] for k in ("phase", "config", "facts")}}
        frozen = frozen_state(PHASE.build(slim.config, slim.facts))
        assert not frozen.keys() & slim.state.keys()
        loaded, base = slim.module().state_dict(), first.whole()
        assert all(torch.equal(loaded[key], base[key]) for key in frozen)


def test_a_base_that_was_trained_itself_is_kept(project: Path) -> None:
    """Where nothing is frozen a bundle holds everything, and so does one whose frozen weights are of such a one."""
    first = trained(job(mode="full", epochs=1))
    assert first.base is None and first.state.keys() == first.module().state_dict().keys()
    shutil.move(OUT, "earlier")
    later = trained(job(mode="frozen", epochs=1, start_from="earlier"))
    assert "base" not in later.meta
    assert_equal(later.module().state_dict(), later.state)


# --- work checkpoints ------------------------------------------------------------------------------------------------------


class Died(Exception):
    pass


def die_at(number: int) -> Callable[[dict[str, float], int], None]:
    def log(metrics: dict[str, float], step: int) -> None:
        if step >= number:
            raise Died

    return log


def test_a_run_that_died_ends_with_the_same_bytes(project: Path) -> None:
    given = job("weights/vit", epochs=3, log_interval=1, checkpoint_interval=1)
    write_base("weights/vit", 1)
    trained(given)
    expected = {path.name: path.read_bytes() for path in OUT.iterdir()}
    shutil.rmtree(OUT)
    for step in (3, 5):
        with pytest.raises(Died):
            train.train(given, HERE, die_at(step))
        work = next(storage.WORK.glob("finetune@adatad-*"))
        frozen = frozen_state(PHASE.build(given.config, given.facts)).keys()
        for name in ("last", "best") if step > 3 else ("last",):
            kept = checkpoint.read(work, name)  # pyright: ignore
            assert kept is not None and not frozen & kept[0].keys()
            assert not frozen & kept[1].get("average", {}).keys()
    train.train(given, HERE, unheard)
    assert {path.name: path.read_bytes() for path in OUT.iterdir()} == expected


def test_resume_on_another_base_starts_over(project: Path) -> None:
    given = job("weights/vit", log_interval=1, checkpoint_interval=1)
    write_base("weights/vit", 1)
    with pytest.raises(Died):
        train.train(given, HERE, die_at(2))
    write_base("weights/vit", 2)
    trained(given)
    assert len(list(storage.WORK.glob("finetune@adatad-*"))) == 1, "the first attempt's, for when its base comes back"


# --- a profile ----------------------------------------------------------------------------------------------------------


def test_a_profile_stays_beside_the_bundle_and_with_the_run(project: Path) -> None:
    given = job(epochs=2, profile=2)
    expected = trained(job(epochs=2)).path.read_bytes(), contents(OUT)
    shutil.rmtree(OUT)
    assert (trained(given).path.read_bytes(), contents(OUT)) == expected
    run = journal.Run(project / "run")
    train.track_profile(run, given)
    for number, name in enumerate((profiling.SUMMARY, profiling.TRACE), 1):
        left = project / ".duet/work/finetune@adatad-profile" / name
        assert left.read_bytes() == (project / f"run/{number}" / name).read_bytes() != b""
    assert "- 2 steps on CPU" in (project / "run/1" / profiling.SUMMARY).read_text()
    train.track_profile(run, job(epochs=2))
    assert not (project / "run/3").exists()
