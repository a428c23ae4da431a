"""The evaluate stage on real stores and checkpoints: each number against one computed from the clips in another way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML
from sklearn.metrics import confusion_matrix, f1_score
from torch import nn

import models
from models.family import InputError, Results, Sample
from tasks import bundle, evaluate, params, storage
from tasks.bundle import Bundle
from tasks.data.audio_store import AudioStore
from tasks.data.frame_store import FrameStore
from tasks.evaluate import Evaluate, Scored, write_tables
from tests.tasks.toy_evaluation import EVALUATE, FACTS, LABELS, TEST, TRAIN, clip_ids, write_project

OUT = Path("artifacts/t3av/evaluate")
SILENT, BLIND = "test_03", "test_07"
# Seven equal clips: their embeddings tie exactly. At best they rank 7th of the gallery's ten, at worst 4th if ties were won.
TWINS = dict.fromkeys([f"test_{i:02d}" for i in (5, 6, 8, 9, 10, 11)], "test_04")


def score() -> tuple[dict[str, float], Results]:
    """metrics.json, and the results it was written from: the stage without its pictures, which take seconds."""
    scored = Scored("t3av", params.typed(Evaluate, EVALUATE, "evaluate"), torch.device("cpu"))
    results = scored.family.evaluate(scored)
    with storage.atomic_folder(OUT) as folder:
        write_tables(results, folder)
    return json.loads((OUT / "metrics.json").read_text()), results


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """project(silent=…, blind=…) writes a project with these clips; it is the current folder."""
    monkeypatch.chdir(tmp_path)
    return partial(write_project, tmp_path)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, float]]:
    """metrics.json of a project, which is the current folder meanwhile, with a silent clip, a blind one, and twins."""
    root = tmp_path_factory.mktemp("evaluated")
    write_project(root, silent=[SILENT, "train_01"], blind=[BLIND, "train_02"], twins=TWINS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "argv", ["evaluate", "t3av"])
        evaluate.main()
        yield json.loads((OUT / "metrics.json").read_text())


@cache
def opened(phase: str) -> tuple[Bundle, nn.Module, FrameStore, AudioStore]:
    """What `alone` needs, once for `evaluated`."""
    trained, stores = bundle.load(Path("artifacts/t3av") / phase), Path("data/sounds/stores")
    return trained, trained.module(), FrameStore(stores), AudioStore(stores)


def alone(phase: str, clip: str, hide: str = "") -> dict[str, np.ndarray]:
    """A phase's predictions for one clip read straight from the stores, in a batch of one."""
    trained, module, frames, sounds = opened(phase)
    has_video, has_audio = frames.num_frames(clip) and hide != "video", clip in sounds and hide != "audio"
    picture = frames.decode(clip, [0, frames.num_frames(clip) - 1]) if has_video else None
    wave = sounds.read(clip)[0] if has_audio else None
    sample = Sample(clip, picture, wave, {"label": LABELS[0]}, np.random.default_rng(0))
    batch = models.load("t3av").phases[phase].transform(trained.config, FACTS, False)(sample)
    with torch.no_grad():
        found = module({name: value[None] for name, value in batch.items()})
    return {name: value[0].double().numpy() for name, value in found.items()}


def truths() -> list[str]:
    first = TRAIN + 2
    return [LABELS[(first + i) % len(LABELS)] for i in range(TEST)]


def hits(hide: str = "") -> list[bool]:
    names = FACTS.labels["label"]
    return [
        names[int(alone("finetune", clip, hide)["logits"].argmax())] == truth
        for clip, truth in zip(clip_ids("test"), truths(), strict=True)
    ]


def test_predictions_are_those_of_each_clip_alone(evaluated: dict[str, float]) -> None:
    table = pd.read_csv(OUT / "predictions.csv")
    assert table["clip"].tolist() == clip_ids("test")
    assert table["truth"].tolist() == truths()
    names = FACTS.labels["label"]
    for row in table.to_dict("records"):
        logits = alone("finetune", row["clip"])["logits"]
        shares = np.exp(logits) / np.exp(logits).sum()
        for rank, place in enumerate(np.argsort(-shares), start=1):
            assert row[f"prediction_{rank}"] == names[place]
            assert row[f"score_{rank}"] == pytest.approx(shares[place], abs=1e-5)


def test_scores_are_those_of_the_listed_predictions(evaluated: dict[str, float]) -> None:
    table, names = pd.read_csv(OUT / "predictions.csv"), FACTS.labels["label"]
    truth, answer = table["truth"], table["prediction_1"]
    assert 0 < evaluated["top1"] < 1  # else the comparisons below say little
    assert evaluated["top1"] == pytest.approx((truth == answer).mean(), abs=1e-6)
    expected = f1_score(truth, answer, labels=names, average="macro", zero_division=0)  # pyright: ignore[reportArgumentType]
    assert evaluated["macro_f1"] == pytest.approx(expected, abs=1e-6)
    counts = pd.read_csv(OUT / "plots/confusion.csv", index_col="truth")
    assert counts.index.tolist() == counts.columns.tolist() == names
    assert np.array_equal(counts.to_numpy(), confusion_matrix(truth, answer, labels=names))
    each = pd.read_csv(OUT / "plots/per_class.csv")
    assert each["class"].tolist() == names
    assert each["support"].tolist() == [truth.tolist().count(name) for name in names]


def test_the_headline_is_told_by_the_predictions(evaluated: dict[str, float]) -> None:
    name, statistic = models.load("t3av").headline
    table = pd.read_csv(OUT / "predictions.csv")
    assert table.columns[:2].tolist() == ["clip", "group"]
    assert statistic(table)(np.ones((1, TEST)))[0] == pytest.approx(evaluated[name], abs=1e-6)
    alone = statistic(table)(np.eye(TEST))
    assert statistic(table)(np.array([[3.0, 1.0, *[0.0] * (TEST - 2)]]))[0] == (3 * alone[0] + alone[1]) / 4


def test_a_hidden_modality_is_a_missing_one(evaluated: dict[str, float]) -> None:
    """Hiding sound in the batch equals a clip without sound; and so for pictures."""
    assert evaluated["audio_top1"] == pytest.approx(np.mean(hits(hide="video")), abs=1e-6)
    assert evaluated["video_top1"] == pytest.approx(np.mean(hits(hide="audio")), abs=1e-6)
    assert len({evaluated["top1"], evaluated["audio_top1"], evaluated["video_top1"]}) > 1


def test_shapley_shares_add_up_to_both_minus_none(evaluated: dict[str, float]) -> None:
    both, none = np.mean(hits()), evaluated["majority_top1"]
    heard, seen = np.mean(hits(hide="video")), np.mean(hits(hide="audio"))
    assert none == pytest.approx(truths().count(sorted(LABELS)[0]) / TEST)  # all are as frequent: the first of them
    assert evaluated["shapley_audio"] + evaluated["shapley_video"] == pytest.approx(both - none, abs=2e-6)
    orders = [heard - none, both - seen]  # what sound adds when it comes first, and when it comes second
    assert evaluated["shapley_audio"] == pytest.approx(np.mean(orders), abs=2e-6)
    parts = pd.read_csv(OUT / "plots/shapley.csv")["top-1 accuracy"]
    assert parts[:3].sum() == pytest.approx(parts[3], abs=1e-5)


def test_retrieval_counts_pairs_and_ties_against_the_model(evaluated: dict[str, float]) -> None:
    pairs = [clip for clip in clip_ids("test") if clip not in (SILENT, BLIND)]
    assert evaluated["gallery"] == len(pairs) == TEST - 2
    found = {clip: alone("contrastive", TWINS.get(clip, clip)) for clip in pairs}
    for name, asks, answers in (("v2a", "video", "audio"), ("a2v", "audio", "video")):
        ranks = []
        for clip in pairs:
            scores = {c: found[clip][f"{asks}_embedding"] @ found[c][f"{answers}_embedding"] for c in pairs}
            # Itself and whatever is as good, but for rounding.
            ranks.append(sum(score >= scores[clip] - 1e-6 for score in scores.values()))
        for k in (1, 5, 10):
            assert evaluated[f"r{k}_{name}"] == pytest.approx(np.mean(np.array(ranks) <= k), abs=1e-6)
        assert evaluated[f"median_rank_{name}"] == np.median(ranks)
        assert evaluated[f"r5_{name}"] <= 0.3


def test_intervals_draw_clips_of_a_group_together(project: Callable[..., None]) -> None:
    project()
    apart, _ = score()
    assert 0 < apart["top1"] < 1
    assert apart["top1_low"] < apart["top1"] < apart["top1_high"]
    project(groups=dict.fromkeys(clip_ids("test"), "video"))  # drawn always whole: nothing varies
    one, _ = score()
    assert one["top1_low"] == one["top1_high"] == one["top1"] == apart["top1"]


def test_numbers_are_finite_and_the_same_again(evaluated: dict[str, float]) -> None:
    assert all(isinstance(value, float) and np.isfinite(value) for value in evaluated.values())
    assert list(evaluated) == sorted(evaluated)
    tables = {path: path.read_bytes() for path in OUT.rglob("*.csv")}
    assert score()[0] == evaluated
    assert {path: path.read_bytes() for path in OUT.rglob("*.csv")} == tables


@pytest.mark.parametrize("lacking", ["silent", "blind"])
def test_a_modality_that_no_clip_has(project: Callable[..., None], lacking: str) -> None:
    project(**{lacking: [clip for split in ("train", "val", "test") for clip in clip_ids(split)]})
    m, results = score()
    gone, left = ("a", "v") if lacking == "silent" else ("v", "a")
    assert all(np.isfinite(value) for value in m.values())
    assert m["gallery"] == 0
    assert {f"probe_{left}", f"knn_{left}"} <= set(m)
    assert not {f"probe_{gone}", "probe_av", "probe_gain", "r1_v2a"} & set(m)
    assert m["top1"] == m["video_top1" if lacking == "silent" else "audio_top1"]  # nothing was there to hide
    assert "no test clip has both" in results.tables["retrieval"].note
    probes = pd.read_csv(OUT / "plots/probes.csv", index_col="features")
    assert probes.loc[["kNN, both", "linear probe, both"]].isna().all(axis=None)


def test_train_clips_lack_what_test_clips_have(project: Callable[..., None]) -> None:
    project(silent=clip_ids("train"))
    m, _ = score()
    assert m["gallery"] == TEST
    assert "probe_v" in m
    assert not {"probe_a", "knn_av", "probe_gain"} & set(m)


def test_a_diverged_checkpoint_is_named(project: Callable[..., None]) -> None:
    project()
    folder = Path("artifacts/t3av/finetune")
    trained = bundle.load(folder)
    state = trained.state | {"classifier.0.weight": trained.state["classifier.0.weight"] * float("nan")}
    bundle.save(folder, state, trained.meta, [])
    with pytest.raises(InputError, match="clip test_00 with NaN: it diverged"):
        score()


def test_a_number_that_is_none_stops_the_stage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nan"):
        write_tables(Results({"top1": float("nan")}, {}, []), tmp_path)


def test_a_split_without_clips_is_named(project: Callable[..., None]) -> None:
    project()
    Path("data/sounds/stores/quarantine.csv").write_text("id,reason\n" + "".join(f"{c},x\n" for c in clip_ids("test")))
    with pytest.raises(InputError, match="no clip in the test split"):
        score()


def test_dvc_reads_the_plots(evaluated: dict[str, float]) -> None:
    """dvc.yaml's own list of the family's plots, drawn by DVC from the tables the stage left."""
    root, dvc = Path(__file__).parents[2], Path(sys.executable).with_name("dvc")
    plots = [plot for plot in YAML(typ="safe").load(root / "dvc.yaml")["plots"] if next(iter(plot)).startswith("t3av:")]
    Path("dvc.yaml").write_text(json.dumps({"plots": plots}))
    Path(".dvc").mkdir()
    Path(".dvc/config").write_text("[core]\n    no_scm = True\n")
    shown = subprocess.run([dvc, "plots", "show", "--json"], capture_output=True, text=True, check=True)
    drawn = json.loads(shown.stdout)
    assert "errors" not in drawn
    points = {title: plots[0]["content"]["data"]["values"] for title, plots in drawn["data"].items()}
    classes = pd.DataFrame(points["t3av: classes"])
    assert classes["truth"].tolist() == truths()
    assert set(classes["prediction_1"]) <= set(LABELS)
    shares = [float(point["top-1 accuracy"]) for point in points["t3av: what each modality adds"]]
    assert shares[3] == pytest.approx(evaluated["top1"], abs=1e-5)
    for phase in ("pre-training", "fine-tuning"):
        losses = pd.DataFrame(points[f"t3av: losses of {phase}"])
        assert set(losses["field"]) == {"train_loss", "val_loss"}
        assert len(losses) == 6
