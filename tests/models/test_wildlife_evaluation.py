"""wildlife's evaluation on predictions made by hand, whose scores are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest

from models.family import ClipInfo, Facts, InputError
from models.metrics import bootstrap
from models.wildlife import FAMILY
from models.wildlife.evaluation import evaluate

SPECIES, ACTIVITY = ["fox", "hare", "wolf"], ["foraging", "resting"]
NUM = 36


@dataclass
class FakeRun:
    """36 clips: the species is seen (the sound alone tells nothing of it), the activity needs both modalities."""

    facts: Facts = field(default_factory=lambda: Facts({"species": SPECIES, "activity": ACTIVITY}, 0.0, 1.0))
    trained: tuple[str, ...] = ("finetune",)
    config: None = None
    num_bootstrap: int = 200
    seed: int = 3
    at_random: tuple[float, ...] = (1.0, 0.8, 0.0)  # the curve of a random order
    unknown: dict[str, set[int]] = field(default_factory=lambda: {"species": {0}, "activity": {1, 2}})

    def clips(self, split: str) -> list[ClipInfo]:
        def annotation(i: int) -> dict[str, str | None]:
            truth = {"species": SPECIES[i % 3], "activity": ACTIVITY[i // 3 % 2]}
            return {head: None if i in self.unknown[head] else name for head, name in truth.items()}

        return [ClipInfo(f"{split}{i}", f"event{i // 2}", annotation(i)) for i in range(NUM)]

    def predict(self, phase: str, split: str, drop: str = "", untrained: bool = False) -> dict[str, np.ndarray]:
        rows = np.arange(NUM)
        species = 6 * np.eye(3)[rows % 3] if drop != "video" else np.tile([1.0, 0, 0], (NUM, 1))
        activity = 6 * np.eye(2)[rows // 3 % 2] if not drop else np.tile([1.0, 0], (NUM, 1))
        return {"species_logits": species, "activity_logits": activity}

    def explain(self, phase: str, split: str, rows: Sequence[int]) -> dict[str, np.ndarray]:
        maps = {"video_relevance": np.ones((len(rows), 1, 2, 2)), "audio_relevance": np.ones((len(rows), 4, 6))}
        falling = np.tile([1.0, 0.2, 0.0], (len(rows), 1))
        return maps | {"deletion": falling, "deletion_random": np.tile(self.at_random, (len(rows), 1))}


@pytest.fixture(scope="module")
def results():
    return evaluate(FakeRun())  # pyright: ignore[reportArgumentType]


def test_each_head_by_what_it_needs(results) -> None:
    m = results.metrics
    assert m["mean_macro_f1"] == m["species_macro_f1"] == m["activity_macro_f1"] == m["species_map"] == 1
    assert m["species_weighted_f1"] == m["species_balanced_accuracy"] == m["joint_top1"] == 1
    assert m["video_species_top1"] == 1
    assert m["audio_species_top1"] == pytest.approx(11 / 35)  # always fox; one fox is not annotated
    assert m["audio_activity_top1"] == m["video_activity_top1"] == pytest.approx(16 / 34)
    assert m["video_mean_macro_f1"] == pytest.approx((1 + m["video_activity_macro_f1"]) / 2)
    assert (m["species_num_clips"], m["activity_num_clips"]) == (35, 34)
    assert all(np.isfinite(value) for value in m.values())


def test_shares_add_up(results) -> None:
    m = results.metrics
    for head in ("species", "activity"):
        shares = m[f"{head}_shapley_audio"] + m[f"{head}_shapley_video"]
        assert shares + m[f"{head}_majority_top1"] == pytest.approx(m[f"{head}_top1"])
    frame = results.tables["species_shapley_per_class"].frame.set_index("class")
    assert (
        frame.loc["fox", ["audio adds", "video adds"]].tolist()
        != frame.loc["wolf", ["audio adds", "video adds"]].tolist()
    )
    assert frame.loc["wolf", ["audio adds", "video adds"]].tolist() == [0, 1]


def test_intervals_hold_the_number_and_draw_events(results) -> None:
    m = results.metrics
    for name in ("mean_macro_f1", "audio_mean_macro_f1", "video_mean_macro_f1", "species_top1", "joint_top1"):
        assert m[f"{name}_low"] <= m[name] <= m[f"{name}_high"]


def test_tables_leave_out_what_is_not_annotated(results) -> None:
    frame = results.tables["predictions"].frame
    assert frame.columns[:2].tolist() == ["clip", "group"]
    assert frame["species_truth"].tolist()[:3] == ["", "hare", "wolf"]
    assert frame["activity_prediction"].tolist()[:4] == ["foraging"] * 3 + ["resting"]
    confusion = results.tables["species_confusion"].frame
    assert confusion[SPECIES].to_numpy().sum() == 35
    assert results.tables["activity_per_class"].frame["support"].tolist() == [16, 18]


def test_headline_out_of_the_table_as_it_is_read_back(results, tmp_path) -> None:
    results.tables["predictions"].frame.to_csv(tmp_path / "predictions.csv", index=False)
    table = pd.read_csv(tmp_path / "predictions.csv")
    name, statistic = FAMILY.headline
    assert statistic(table)(np.ones((1, NUM)))[0] == results.metrics[name]
    low, high = bootstrap(statistic(table), table["group"].tolist(), 100, 0)
    assert low == high == 1


def test_examples_pair_the_heads(results) -> None:
    example = results.examples[0]
    assert len(results.examples) == 12
    assert (example.clip, example.truth) == ("test0", "foraging")  # its species is not annotated
    pair = next(example for example in results.examples if " · " in example.truth)
    assert pair.predictions[0][0] == pair.truth
    assert len(pair.predictions) == 5
    assert sum(score for _, score in pair.predictions) <= 1


def test_a_head_without_annotations_is_left_out() -> None:
    run = FakeRun()
    clips = run.clips
    run.unknown = {"species": set(), "activity": set(range(NUM))}
    train = FakeRun()
    run.clips = lambda split: train.clips(split) if split == "train" else clips(split)  # type: ignore[method-assign]
    results = evaluate(run)  # pyright: ignore[reportArgumentType]
    assert not [name for name in results.metrics if "activity" in name or "joint" in name]
    assert results.metrics["mean_macro_f1"] == results.metrics["species_macro_f1"] == 1
    run.unknown = {"species": set(range(NUM)), "activity": set(range(NUM))}
    with pytest.raises(InputError, match="no clip of the test split is annotated"):
        evaluate(run)  # pyright: ignore[reportArgumentType]


def test_overlays_are_called_what_the_deletion_curve_shows(results) -> None:
    assert results.metrics["deletion_area"] == pytest.approx(0.35)
    assert results.metrics["deletion_random_area"] == pytest.approx(0.65)
    table = results.tables["deletion"]
    assert "better than chance" in table.note and "no better" not in table.note
    assert table.frame["share hidden"].tolist() == [0, 0.5, 1]
    assert all(example.video_relevance.shape == (1, 2, 2) for example in results.examples)
    for curve, verdict in (((1.0, 0.2, 0.0), "no better than chance"), ((1.0, 0.1, 0.0), "worse than chance")):
        other = evaluate(FakeRun(at_random=curve))  # pyright: ignore[reportArgumentType]
        assert verdict in other.tables["deletion"].note
