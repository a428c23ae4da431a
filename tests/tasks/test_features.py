"""Features of raw clips: right, the same however they come to be, and all that a phase needs to learn and to answer."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import models
from models.family import InputError
from tasks import bundle, clean, features, jobs, journal, params, register, storage, stores, train
from tasks.data import manifest, raw_clip, video
from tasks.data.extraction import Extractor, Features
from tasks.data.feature_store import FeatureStore
from tasks.data.loader import open_split
from tasks.predict import Predictor, load_predictor
from tests.tasks import stage_process, toy_features
from tests.tasks.toy_features import NAME

PARAMS = f"""
download: {{clips: {{format: taglists}}}}
features: {{{NAME}: {{dtype: float32, workers: 2, device: cpu, max_quarantine: 0.2}}}}
stores: {{clips: {{num_frames: 4, frame_step: 0, short_side: 0, quality: 90, sample_rate: 16000, codec: pcm16}}}}
{NAME}: {{dataset: clips, pictures: {{}}, tags: {{}}}}
"""
CPU = torch.device("cpu")
STORES = stores.Stores(4, 0, 0, 90, 16000, "pcm16", 1, 1, "processes", 0.2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, write_clip: Callable[..., Path]) -> Path:
    """A project whose clips are cleaned and stored: seven videos, one of which is broken after that."""
    root = tmp_path_factory.mktemp("project")
    (root / "params.yaml").write_text(PARAMS)
    raw = root / "data/clips/raw"
    for k in range(7):
        write_clip(raw / f"videos/clip {k}.mp4", pitch=60.0 + 20 * k, sound=False)
    lines = [f'"videos/clip {k}.mp4" {k % 2}\n' for k in range(7)]
    for folder in (raw, root / "data/clips/subset"):
        folder.mkdir(exist_ok=True)
        (folder / "train.list").write_text("".join(lines[:4]))
        (folder / "test.list").write_text("".join(lines[4:]))
        (folder / "label.txt").write_text("cat\ncat\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        clean.clean("clips", clean.Clean(0.25, 1, False, False, False, 1, 0.1))
        stores.stores("clips", STORES)
        toy_features.write_pictures(Path("artifacts") / NAME / "pictures")
    (raw / "videos/clip 5.mp4").write_bytes(b"no video any more")
    return root


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy to work in, in which the family is known."""
    root = tmp_path / "project"
    shutil.copytree(made, root)
    monkeypatch.chdir(root)
    monkeypatch.setattr(models, "names", models.names)  # and what `install` puts there is gone after the test
    toy_features.install()
    yield root


def whole(root: Path) -> dict[str, bytes]:
    folder = root / "artifacts" / NAME / "features"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_rows_are_those_of_a_loop_that_loads_everything(project: Path) -> None:
    assert features.features(features.read_job(NAME), CPU) == (6, 1)
    store = FeatureStore(Path("artifacts") / NAME / "features")
    frame = pd.read_csv(store.folder / "quarantine.csv")
    assert frame["id"].tolist() == ["videos_clip_5"] and frame["reason"].tolist() == ["unreadable"]
    net = toy_features.PictureNet(toy_features.Pictures(6, 0), None)  # pyright: ignore[reportArgumentType]
    for name in store.ids:
        rows, times = store.read(name)
        path = project / "data/clips/raw" / f"{name.replace('videos_clip_', 'videos/clip ')}.mp4"
        with video.open_media(path) as container:
            images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        seen = torch.from_numpy(np.stack(images)[[0, 1, 2, 3, 4, 5], :8, :8]).permute(0, 3, 1, 2)
        torch.testing.assert_close(torch.from_numpy(rows), net.extract(seen).detach())
        np.testing.assert_allclose(times, np.arange(6) / 10, atol=1e-6)


def test_workers_shards_and_kills_change_no_byte(project: Path) -> None:
    job = features.read_job(NAME)
    features.features(job, CPU)
    expected = whole(project)
    shutil.rmtree(project / "artifacts" / NAME / "features")
    outcome = stage_process.run(project, "features", NAME, "--shard", "1/2", prepare=toy_features.install)
    assert outcome.code == 0 and "4 clips of shard 1/2 done, 0 failed; run it without --shard at last" in outcome.out
    features.features(job, CPU)
    assert whole(project) == expected
    for kill_at in (3, 8):  # within the clips
        shutil.rmtree(project / "artifacts" / NAME / "features", ignore_errors=True)
        outcome = stage_process.run(project, "features", NAME, prepare=partial(toy_features.install, kill_at))
        assert outcome.code == -9 and not (project / "artifacts" / NAME / "features").exists()
    assert list((project / ".duet/work").glob("features-*/notes/*.json"))
    outcome = stage_process.run(project, "features", NAME, prepare=toy_features.install)
    assert outcome.code == 0, outcome.errors
    assert "features of 6 clips, 1 failed" in outcome.out
    assert whole(project) == expected and not list((project / ".duet/work").glob("features-*"))


def test_finished_clips_are_not_made_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = features.read_job(NAME)
    features.share(job, CPU, 1, 1)
    asked: list[int] = []
    extract = Extractor.extract

    def counted(self: Extractor, sources: list[Path], workers: int = 0) -> Iterator[tuple[int, object]]:
        asked.append(len(sources))
        return extract(self, sources, workers)

    monkeypatch.setattr(Extractor, "extract", counted)
    features.features(job, CPU)
    assert asked == [1]  # the one that failed


def test_frames_that_repeat_and_half_precision(project: Path) -> None:
    toy_features.write_pictures(Path("artifacts") / NAME / "pictures", most=10, wrap=3)
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("float32", "float16"))
    features.features(features.read_job(NAME), CPU)
    store = FeatureStore(Path("artifacts") / NAME / "features")
    rows, times = store.read("videos_clip_0")
    assert np.load(store.folder / "videos_clip_0.npy").dtype == np.float16
    assert len(rows) == len(times) == 13 and np.array_equal(rows[:3], rows[10:]) and times[10] == 0


def test_too_many_failures_end_the_stage(project: Path) -> None:
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("max_quarantine: 0.2", "max_quarantine: 0.1"))
    with pytest.raises(InputError, match=r"1 of 7 clips are unusable \(1 unreadable\), more than features.toytags"):
        features.features(features.read_job(NAME), CPU)


def save_tags() -> Path:
    """The bundle that training would leave, with what it says of its features."""
    job = jobs.Job(
        NAME, "tags", toy_features.FAMILY.phases["tags"], toy_features.Tags(4), None, "clips",  # pyright: ignore
        jobs.read_facts(NAME, "clips"),
    )  # fmt: skip
    torch.manual_seed(1)
    module = job.phase.build(job.config, job.facts)
    meta = {
        "family": NAME, "phase": "tags", "config": bundle.plain(job.config), "dataset": "clips", "pretrained": {},
        "facts": {**job.facts.__dict__}, "stores": params.section("stores", "clips"), **train.feature_origin(job),
    }  # fmt: skip
    bundle.save(job.out, module.state_dict(), meta, [], train.feature_maker(job))
    return job.out


def test_training_data_and_prediction_see_the_same(project: Path, tmp_path: Path) -> None:
    features.features(features.read_job(NAME), CPU)
    facts = jobs.read_facts(NAME, "clips")
    assert facts.labels == {"tag": ["cat #0", "cat #1"]} and sum(facts.counts["tag"]) == 3  # one clip went to val
    phase, folder = toy_features.FAMILY.phases["tags"], Path("artifacts") / NAME / "features"
    config = toy_features.Tags(4)
    clips = open_split("clips", "test", phase.clip(config), phase.transform(config, facts, False), 0, features=folder)
    seen = [clips[0, row]["features"] for row in range(len(clips))]
    assert len(seen) == 2  # the third is broken
    shutil.copytree(save_tags(), tmp_path / "alone")
    shutil.rmtree("artifacts")  # a bundle needs nothing else
    predictor = Predictor(bundle.load(tmp_path / "alone"))
    table = manifest.read("clips", None)
    paths = [Path("data/clips") / path for path in table.loc[table["split"] == "test", "path"]]
    answers = predictor.predict([*paths, paths[0].read_bytes()])
    assert answers[1]["error"].startswith("unreadable") and answers[3] == answers[0]
    net = predictor.module.cpu()
    for features_of_clip, answer in zip(seen, (answers[0], answers[2]), strict=True):
        expected = net({"features": features_of_clip[None]})["logits"][0].tolist()
        assert answer["scores"] == pytest.approx(expected, abs=1e-6)


def test_a_registered_version_makes_its_own_features(
    project: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DUET_TRACKING")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    monkeypatch.setattr(journal, "_start_delivery", lambda: None)
    shutil.copyfile(migrated, project / "mlflow.db")
    features.features(features.read_job(NAME), CPU)
    trained, evaluated = save_tags(), Path("artifacts") / NAME / "evaluate"
    (evaluated / "plots").mkdir(parents=True)
    (evaluated / "report.html").write_text("<h1>report</h1>")
    (evaluated / "predictions.csv").write_text("clip,group\n")
    (evaluated / "metrics.json").write_text(
        json.dumps({"loss": 1.0, "loss_low": 0.5, "loss_high": 2.0, "num_clips": 2.0})
    )
    clip = Path("data/clips/raw/videos/clip 0.mp4")
    expected = load_predictor(NAME, str(trained)).predict([clip])
    register.register(NAME, trained, evaluated, Path("artifacts") / NAME / "register")
    shutil.rmtree("artifacts")
    assert load_predictor(NAME, f"models:/duet-{NAME}@champion").predict([clip]) == expected


def test_features_of_another_checkpoint_are_refused(project: Path) -> None:
    features.features(features.read_job(NAME), CPU)
    toy_features.write_pictures(Path("artifacts") / NAME / "pictures", scale=2.0)
    with pytest.raises(InputError, match=r"features is not of artifacts/toytags/pictures as it is now"):
        save_tags()


def test_features_of_another_manifest_are_refused(project: Path) -> None:
    features.features(features.read_job(NAME), CPU)
    table = manifest.read_clean("clips")
    manifest.write(table.assign(annotation=table["annotation"].iloc[::-1].tolist()), manifest.manifest_path("clips"))
    stores.stores("clips", STORES)
    spec, folder = toy_features.FAMILY.phases["tags"].clip(toy_features.Tags(4)), Path("artifacts") / NAME / "features"
    with pytest.raises(
        InputError, match=r"features was made of another manifest than .*; run the features stage again"
    ):
        open_split("clips", "train", spec, lambda sample: {}, 0, features=folder)


def test_pictures_and_features_made_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "names", models.names)
    toy_features.install()
    Path("params.yaml").write_text(PARAMS)
    raw, rng = Path("data/clips/raw"), np.random.default_rng(0)
    (raw / "made").mkdir(parents=True)
    for name in "abc":
        np.save(raw / f"made/{name}.npy", rng.standard_normal((5, 12)).astype(np.float32))
    np.save(raw / "made/d.npy", np.array([{}]), allow_pickle=True)
    shutil.copytree(raw, "data/clips/subset")
    for folder in (raw, Path("data/clips/subset")):
        (folder / "label.txt").write_text("cat\ndog\n")
        (folder / "train.list").write_text("made/a.npy 1\nmade/b.npy 0 1\nmade/d.npy 0\n")
        (folder / "test.list").write_text("made/c.npy 0\n")
    clean.clean("clips", clean.Clean(0.0, 1, False, False, False, 1, 0.3))
    stores.stores("clips", STORES)
    assert json.loads(Path("data/clips/clean/classes.json").read_text()) == ["cat", "dog"]
    assert features.features(features.read_job(NAME), CPU) == (3, 0)
    rows, times = FeatureStore(Path("artifacts") / NAME / "features").read("made_a")
    assert np.array_equal(rows, np.load(raw / "made/a.npy")) and times.tolist() == [0, 1, 2, 3, 4]
    predictor = Predictor(bundle.load(save_tags()))
    answers = predictor.predict([raw / "made/c.npy", raw / "made/d.npy", Path("params.yaml")])
    assert len(answers[0]["scores"]) == 2 and answers[1]["error"].startswith("foreign")
    assert "made elsewhere" in answers[2]["error"]


def test_folders_of_pictures(tmp_path: Path, media: Path) -> None:
    with video.open_media(media / "short_gop.mp4") as container:
        images = [
            frame.to_ndarray(format="rgb24") for _, frame in zip(range(6), container.decode(video=0), strict=False)
        ]
    for k, image in enumerate(images, 1):
        (tmp_path / f"img_{k:05d}.jpg").write_bytes(video.encode_jpeg(image, 100))
    probe = clean.probe_clip(tmp_path / "img_00001.jpg")
    assert (probe["frames"], probe["width"], probe["height"], probe["reason"]) == (6, 96, 64, "")
    raw = raw_clip.open_clip(tmp_path / "img_00001.jpg")
    found = dict(raw.read([0, 4]))
    assert raw.num_frames == 6 and abs(found[4].astype(int) - images[4]).mean() < 10  # of colours by halves
    (tmp_path / "img_00003.jpg").unlink()
    assert clean.probe_clip(tmp_path / "img_00001.jpg")["reason"] == "missing"


def peak(path: Path) -> None:
    """Extract a clip in a process of its own; leave its greatest memory in MB beside it."""
    torch.set_num_threads(1)
    spec = toy_features.spec(toy_features.Pictures(300, 0))
    ((_, found),) = Extractor(toy_features.PictureNet(None, None), spec, CPU).extract([path])  # pyright: ignore
    assert isinstance(found, Features)
    path.with_suffix(".txt").write_text(
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024} {len(found.rows)}"
    )


@pytest.mark.slow
def test_memory_does_not_grow_with_a_videos_length(tmp_path: Path) -> None:
    """10 s and 10 min at 30 frames a second; both give 300 rows."""
    import subprocess
    import sys

    import imageio_ffmpeg

    peaks = {}
    for seconds in (10, 600):
        path = tmp_path / f"{seconds}.mp4"
        source = ["-f", "lavfi", "-i", f"testsrc2=size=640x360:rate=30:duration={seconds}"]
        codec = ["-c:v", "libx264", "-preset", "ultrafast", "-g", "60", str(path)]
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, *codec], check=True)
        code = f"from pathlib import Path; from tests.tasks.test_features import peak; peak(Path({str(path)!r}))"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=storage.__file__.rsplit("/", 2)[0])
        peaks[seconds], rows = map(float, path.with_suffix(".txt").read_text().split())
        assert rows == 300
    assert peaks[600] < 1.05 * peaks[10], peaks
