"""Two versions made by the real stages, compared: what the tables say, what the page shows, what MLflow keeps."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import models
from models.family import InputError
from tasks import bundle, compare, evaluate, journal, register, tracking, versions
from tests.tasks.toy_evaluation import TEST, clip_ids, write_project

OUT = Path("artifacts/t3av/compare/1-2")
STORES = {"num_frames": 8, "short_side": 24, "quality": 95, "sample_rate": 16000, "codec": "pcm16"}


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, migrated: Path, write_clip: Callable[..., Path]
) -> Iterator[Path]:
    """The current folder: two versions of one test split, and a comparison of them."""
    root = tmp_path_factory.mktemp("project")
    write_project(root)
    shutil.copyfile(migrated, root / "mlflow.db")
    with (root / "params.yaml").open("a") as file:
        file.write("promote: {min_gain: 0.0, num_bootstrap: 300, seed: 1}\n")
    for clip in clip_ids("test"):
        write_clip(root / f"data/sounds/raw/{clip}.mp4")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("DUET_TRACKING")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        patch.setattr(journal, "_start_delivery", lambda: None)
        patch.setattr(sys, "argv", ["x", "t3av"])
        folder = Path("artifacts/t3av/finetune")
        first = bundle.load(folder)
        for lr, noise in ((0.02, 0.0), (0.05, 0.3)):  # the second: the first's weights, shaken
            torch.manual_seed(1)
            state = {key: v + noise * v.std() * torch.randn_like(v) for key, v in first.state.items() if v.numel() > 1}
            meta = {**first.meta, "stores": STORES, "training": {"lr": lr}}
            bundle.save(folder, first.state | state, meta, [{"epoch": 0, "train_loss": 1.0, "lr": 1}])
            evaluate.main()
            register.main()
        patch.setattr(sys, "argv", ["compare", "t3av", "1", "2"])
        compare.main()
        yield root


def predictions(number: int) -> pd.DataFrame:
    return versions.predictions(versions.find(f"models:/duet-t3av/{number}"))


def test_metrics_stand_side_by_side(project: Path) -> None:
    table = pd.read_csv(OUT / "plots/metrics.csv").set_index("metric")
    for number in (1, 2):
        version = versions.find(f"models:/duet-t3av/{number}")
        top1 = float(table.loc["Top-1 accuracy", f"version {number}"].split()[0])  # type: ignore[union-attr]
        assert top1 == pytest.approx(float(version.tags["test.top1"]), abs=1e-4)
    first, second = (table.loc["Top-1 accuracy", f"version {number}"].split()[0] for number in (1, 2))  # type: ignore[union-attr]
    assert float(table.loc["Top-1 accuracy", "difference"]) == pytest.approx(float(second) - float(first), abs=2e-4)  # type: ignore[arg-type]


def test_clips_on_which_they_differ(project: Path) -> None:
    table = pd.read_csv(OUT / "plots/clips.csv")
    first, second = predictions(1), predictions(2)
    differ = first["clip"][first["prediction_1"] != second["prediction_1"]]
    assert 0 < len(differ) < TEST
    assert sorted(table["clip"]) == sorted(differ)
    right = [(t["prediction_1"] == t["truth"]).set_axis(t["clip"]).astype(float) for t in (first, second)]
    expected = (right[1] - right[0])[table["clip"]].to_numpy()
    assert np.array_equal(table["top1 gained"], expected)
    assert (np.diff(expected) >= 0).all()
    assert table.columns.tolist() == ["clip", "truth", "version 1", "version 2", "top1 gained"]


def test_classes_params_and_data(project: Path) -> None:
    classes = pd.read_csv(OUT / "plots/classes.csv").set_index("class")
    assert len(classes) == 4
    right = [t[t["prediction_1"] == t["truth"]]["truth"].value_counts() for t in (predictions(1), predictions(2))]
    support = predictions(1)["truth"].value_counts()
    for name in classes.index:
        gained = (right[1].get(name, 0) - right[0].get(name, 0)) / support[name]
        assert classes.loc[name, "recall"] == pytest.approx(gained, abs=1e-5)
    params = pd.read_csv(OUT / "plots/params.csv").set_index("name")
    assert params.loc["training.lr"].tolist() == [0.02, 0.05]
    assert params.index.tolist() == ["training.lr"]
    data = pd.read_csv(OUT / "plots/data.csv").set_index("name")
    assert data.index.tolist() == ["duet.sha256"]


def test_speed_and_size(project: Path) -> None:
    table = pd.read_csv(OUT / "plots/speed.csv").set_index("Unnamed: 0")
    trained = bundle.load(Path("artifacts/t3av/finetune"))
    module = models.load("t3av").phases["finetune"].build(trained.config, trained.facts)
    numel = sum(tensor.numel() for tensor in module.state_dict().values())
    assert table.loc["parameters"].tolist() == [f"{numel:,}"] * 2
    assert (table.loc["clips/s"].astype(float) > 0).all()


def test_page_and_run_hold_everything(project: Path) -> None:
    page = (OUT / "compare.html").read_text()
    assert not re.search(r"<script|https?:|url\(", page)
    assert page.count("data:image/png;base64") == 2
    assert "dog &lt;b&gt;barking&lt;/b&gt;" in page
    for picture in OUT.rglob("*.png"):
        with Image.open(picture) as image:
            assert image.width > 300
    tracking.flush()
    store = tracking.client()
    (run,) = store.search_runs([tracking.experiment(store, "t3av")], "tags.`stage` = 'compare@t3av'")
    assert run.data.params == {"first": "1", "second": "2"}
    kept = Path(store.download_artifacts(run.info.run_id, "compare.html"))
    assert kept.read_text() == page


def test_without_raw_clips_and_the_same_data(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is there all the same, and says what it lacks."""
    monkeypatch.setattr(compare, "timed_clips", lambda dataset: [])
    store = tracking.client()
    store.set_model_version_tag("duet-t3av", "1", "duet.evaluation_data", "another")
    gate = compare.promote.Promote(0.0, 100, 1)
    told = "\n".join(compare.compare("t3av", (2, 1), gate, Path("out")))
    assert "scored on other evaluation data" in told
    assert "clips/s" not in told
    page = Path("out/compare.html").read_text()
    assert "Speed was not measured" in page
    assert "Left out: duet-t3av 1 was scored on other evaluation data" in page


def test_mistakes_are_one_line(project: Path) -> None:
    gate = compare.promote.Promote(0.0, 100, 1)
    with pytest.raises(InputError, match="version 1 twice"):
        compare.compare("t3av", (1, 1), gate, Path("out"))
    with pytest.raises(InputError, match="no such version; there is 1, 2"):
        compare.compare("t3av", (1, 7), gate, Path("out"))
