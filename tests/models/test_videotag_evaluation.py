"""videotag's report, thresholds and answers on predictions made by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import logit

from models import tag_scores
from models.family import ClipInfo, Facts, InputError
from models.metrics import bootstrap
from models.videotag import answers
from models.videotag.evaluation import TagMetrics, evaluate, global_precision

LABELS = ["cat #0", "ball", "cat #2", "dance", "rain"]  # two classes are called cat; nobody has rain
FACTS = Facts({"tag": LABELS}, 0.0, 1.0, thresholds=dict.fromkeys(LABELS, 0.4) | {"dance": 0.8})
NUM = 24


def tags_of(clip: int) -> list[int]:
    """Two tags a clip, one of the cats and something else."""
    return sorted([0 if clip % 3 else 2, 1 if clip % 2 else 3])


@dataclass
class FakeRun:
    """Clips whose tags score 0.7 and whose others 0.1, but for those of which the other cat is believed, too."""

    wrong: tuple[int, ...] = ()
    segments: bool = False
    facts: Facts = FACTS
    trained: tuple[str, ...] = ("tsn", "tagger")
    config: Any = None
    num_bootstrap: int = 60
    seed: int = 3
    tags: dict[int, list[int]] = field(default_factory=dict)  # of single clips, in place of tags_of

    def clips(self, split: str) -> list[ClipInfo]:
        return [ClipInfo(f"{split}{i:02}", f"g{i // 2}", {"tags": self.tags.get(i, tags_of(i))}) for i in range(NUM)]

    def predict(self, phase: str, split: str, drop: str = "", untrained: bool = False) -> dict[str, np.ndarray]:
        scores = np.full((NUM, len(LABELS)), 0.1)
        for i in range(NUM):
            scores[i, tags_of(i)] = 0.7
            if i in self.wrong:
                scores[i, 2 - (0 if i % 3 else 2)] = 0.75
        found = {"logits": logit(scores).astype(np.float32)}
        return found | (parts() if self.segments and phase == "tagger" else {})


def parts() -> dict[str, np.ndarray]:
    """Two segments a clip and one of padding: cat #2 all the time, ball in the second."""
    rows = {
        "segment_starts": [0.0, 4.0, 0.0],
        "segment_ends": [4.0, 8.0, 0.0],
        "segment_classes": [[2, 3], [1, 2], [0, 1]],
        "segment_scores": [[0.9, 0.7], [0.8, 0.5], [0.9, 0.9]],
    }
    return {name: np.tile(np.array(row, dtype=np.float32), (NUM, *[1] * np.ndim(row))) for name, row in rows.items()}


def run(**changes: Any) -> Any:
    return FakeRun(**changes)


@pytest.fixture(scope="module")
def results():
    return evaluate(run(wrong=(0, 5)))


# --- the report ------------------------------------------------------------------------------------------------------------


def test_a_perfect_model() -> None:
    easy = replace(FACTS, thresholds={})
    m = evaluate(run(facts=easy)).metrics
    assert [m[name] for name in ("gap_20", "hit_at_1", "perr", "map", "micro_f1", "macro_f1", "tsn_top1")] == [1] * 7
    assert m["gap_20_low"] == m["gap_20_high"] == 1
    assert (m["num_clips"], m["num_tags"]) == (NUM, 2 * NUM)
    assert m["ece"] == pytest.approx((2 * 0.3 + 3 * 0.1) / 5), "all five tags are among the twenty best"


def test_mistakes_count(results) -> None:
    m = results.metrics
    assert m["hit_at_1"] == m["tsn_top1"] == pytest.approx(22 / 24)
    assert m["tsn_top5"] == 1
    # Two wrong pairs stand before all 48 right ones.
    assert m["gap_20"] == pytest.approx(48 / 50)
    assert m["perr"] == pytest.approx((22 + 2 * 0.5) / 24)
    # Nobody dares to say dance, which needs 0.8 and scores 0.7: 12 are missed, 36 right, 2 wrong.
    assert m["micro_f1"] == pytest.approx(2 * 36 / (38 + 48))
    for name in ("gap_20", "hit_at_1", "perr", "micro_f1", "macro_f1"):
        assert m[f"{name}_low"] <= m[name] <= m[f"{name}_high"]
    assert all(np.isfinite(value) for value in m.values())


def test_the_model_against_what_everybody_has(results) -> None:
    m = results.metrics
    assert m["baseline_hit_at_1"] == pytest.approx(16 / 24), "cat #0 is the most frequent tag"
    scores = np.tile(np.array([16, 12, 8, 12, 0]) / NUM, (NUM, 1))
    metric = tag_scores.GlobalPrecision(20)
    metric.update(scores, answers.true_tags(run().clips("test"), 5))
    assert m["baseline_gap_20"] == metric.compute() < m["gap_20"]


def test_headline_out_of_the_table_as_it_is_read_back(results, tmp_path) -> None:
    results.tables["predictions"].frame.to_csv(tmp_path / "predictions.csv", index=False, float_format="%.6g")
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert table.columns[:2].tolist() == ["clip", "group"]
    assert global_precision(table)(np.ones((1, NUM)))[0] == results.metrics["gap_20"]
    assert bootstrap(global_precision(table), table["group"].tolist(), 60, 3) == (
        results.metrics["gap_20_low"],
        results.metrics["gap_20_high"],
    )
    alone = global_precision(table)(np.eye(NUM))
    assert alone[0] < alone[1] == 1


def test_tables(results) -> None:
    classes = results.tables["per_class"].frame.set_index("class")
    assert classes["support"].tolist() == [16, 12, 8, 12, 0]
    assert np.isnan(classes.loc["rain", ["AP", "AP@20"]].astype(float)).all()
    assert classes.loc["dance", ["threshold", "precision", "recall", "F1"]].tolist() == [0.8, 0, 0, 0]
    assert classes.loc["ball", ["AP", "precision", "recall", "F1"]].tolist() == [1, 1, 1, 1]
    assert classes.loc["cat #2", "precision"] == pytest.approx(8 / 9)
    decided = results.tables["decisions"].frame.set_index("threshold")
    assert decided.loc["each its own", "Micro-F1"] == results.metrics["micro_f1"]
    assert decided.loc["0.5 for all", "recall"] == 1
    curve = results.tables["precision_recall"].frame
    assert curve["precision"].tolist() == [pytest.approx(48 / 50)] * 21
    bins = results.tables["reliability"].frame
    assert bins["score"].tolist() == pytest.approx([0.1, 0.7, 0.75])
    assert bins["share right"].tolist() == pytest.approx([0, 1, 0])
    said = results.tables["predictions"].frame.iloc[0]
    assert (said["truth"], said["answer"], said["tags"]) == ("cat #2 · dance", "cat #0 · cat #2", "[2, 3]")


def test_examples_tell_what_was_believed_together(results) -> None:
    by_clip = {example.clip: example for example in results.examples}
    assert len(by_clip) == 12
    right = by_clip["test01"]
    assert right.truth == right.predictions[0][0] == "cat #0 · ball"
    assert right.predictions[0][1] == pytest.approx(0.7**2 * 0.9**3)
    assert [name for name, _ in right.predictions[1:]] == ["cat #0", "ball", "cat #2", "dance", "rain"]
    assert (by_clip["test05"].truth, by_clip["test05"].predictions[0][0]) == ("cat #0 · ball", "cat #0 · ball · cat #2")


def test_timelines_where_segments_are_tagged(results) -> None:
    assert "timelines" not in results.tables
    frame = evaluate(run(segments=True)).tables["timelines"].frame
    assert frame["clip"].nunique() == 6
    own = frame[frame["clip"] == "test00"]
    assert own[["label", "start", "end"]].to_numpy().tolist() == [["cat #2", 0, 8], ["ball", 4, 8]]
    assert own["score"].tolist() == pytest.approx([0.9, 0.8])
    assert set(own["duration"]) == {8}


def test_what_cannot_be_scored() -> None:
    with pytest.raises(InputError, match="no clip of the test split has a tag"):
        evaluate(run(tags={i: [] for i in range(NUM)}))
    with pytest.raises(InputError, match="clip test03: tag 9 was not in training"):
        evaluate(run(tags={3: [9]}))
    diverged = run()
    logits = np.zeros((NUM, 5), dtype=np.float32)
    logits[7, 1] = np.nan
    diverged.predict = lambda phase, split: {"logits": logits}
    with pytest.raises(InputError, match="test07 with NaN"):
        evaluate(diverged)


# --- validation ------------------------------------------------------------------------------------------------------------


def test_metric_of_the_validation_is_that_of_the_report(results) -> None:
    fake = run(wrong=(0, 5))
    logits, clips = torch.tensor(fake.predict("tagger", "test")["logits"]), fake.clips("test")
    truth = torch.tensor(answers.true_tags(clips, 5)).float()
    metric = TagMetrics(20)
    for rows in torch.arange(NUM).split(7):
        metric.update({"logits": logits[rows]}, {"tags": truth[rows]})
    values = metric.compute()
    for name, reported in (("gap", "gap_20"), ("hit_at_1", "hit_at_1"), ("perr", "perr")):
        assert values[name] == pytest.approx(results.metrics[reported], abs=1e-12)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), truth.double())
    assert values["loss"] == pytest.approx(float(expected))


def test_thresholds_by_label() -> None:
    fake, config = run(wrong=(0, 5)), None
    found = answers.calibrate(config, FACTS, fake.predict("tagger", "val"), fake.clips("val"))  # pyright: ignore
    assert list(found) == LABELS
    shared = found["rain"]
    assert shared == pytest.approx((0.7 + 0.1) / 2)
    assert found["ball"] == pytest.approx(0.4)
    nobody = run(tags={i: [] for i in range(NUM)})
    found = answers.calibrate(config, FACTS, nobody.predict("tagger", "val"), nobody.clips("val"))  # pyright: ignore
    assert set(found.values()) == {1.0}


# --- answers ---------------------------------------------------------------------------------------------------------------


def test_answers_hold_scores_and_decisions() -> None:
    predictions = {"logits": torch.tensor(logit(np.array([[0.1, 0.5, 0.75, 0.7, 0.01]])))}
    (answer,) = answers.present(predictions, FACTS)
    assert [tag["id"] for tag in answer["tags"]] == [2, 3, 1, 0, 4]
    assert [tag["label"] for tag in answer["tags"]] == ["cat #2", "dance", "ball", "cat #0", "rain"]
    assert [tag["decision"] for tag in answer["tags"]] == [True, False, True, False, False]
    assert answer["tags"][0]["score"] == pytest.approx(0.75)
    assert "segments" not in answer
    (plain,) = answers.present(predictions, Facts({"tag": LABELS}, 0.0, 1.0))
    assert [tag["decision"] for tag in plain["tags"]] == [True, True, True, False, False], (
        "0.5 where nothing tells better"
    )


def test_answers_list_twenty_tags_and_whatever_more_is_believed() -> None:
    facts = Facts({"tag": [str(i) for i in range(60)]}, 0.0, 1.0)
    logits = torch.full((2, 60), -3.0)
    logits[1, 10:45] = 2.0
    few, many = answers.present({"logits": logits}, facts)
    assert [tag["id"] for tag in few["tags"]] == list(range(20))
    assert [tag["id"] for tag in many["tags"]] == list(range(10, 45))


def test_files_of_answers() -> None:
    predictions = run(segments=True).predict("tagger", "test")
    answered = answers.present({name: torch.tensor(rows) for name, rows in predictions.items()}, FACTS)
    names = ["Kätzchen", *(f"video {i}" for i in range(1, NUM))]
    files = answers.export(dict(zip(names, answered, strict=True)), FACTS)
    assert sorted(files) == sorted(["tags.jsonl", *(f"{name}.png" for name in names)])
    text = files["tags.jsonl"]
    assert isinstance(text, str)
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["video"] for line in lines] == names
    assert {line["schema"] for line in lines} == {1}
    assert "Kätzchen" in text, "as it is written"
    assert lines[0]["tags"] == answered[0]["tags"]
    assert [row["segment"] for row in lines[0]["segments"]] == [[0, 4], [0, 4], [4, 8], [4, 8]], "no padding"


def test_files_of_the_original() -> None:
    (first, second) = answers.present({"logits": torch.tensor([[0.0, -1, 1, -2, -3], [3.0, 0, 0, 0, 0]])}, FACTS)
    files = answers.original({"a": first, "b": second}, FACTS)
    assert list(files) == ["result0.json", "result1.json"]
    name, *tags = json.loads(files["result0.json"])
    assert name == "a"
    assert [list(tag) for tag in tags] == [["class_id", "class_name", "probability"]] * 5
    assert [(tag["class_id"], tag["class_name"]) for tag in tags[:3]] == [(2, "cat"), (0, "cat"), (1, "ball")]
    assert tags[1]["probability"] == 0.5


def test_a_video_of_which_nothing_is_believed_has_an_empty_timeline() -> None:
    row = {"segment": [0.0, 3.0], "label": "ball", "score": 0.1, "id": 1}
    frame = answers.timeline("v", [row], FACTS).frame
    assert frame.to_numpy().tolist() == [["v", 3.0, "nothing", "", 0, 0, 0]]


def test_segments_with_a_gap_stay_apart() -> None:
    def row(start: float, end: float, score: float) -> dict[str, Any]:
        return {"segment": [start, end], "label": "ball", "score": score, "id": 1}

    found = answers.joined([row(4, 6, 0.5), row(0, 2, 0.6), row(2, 3, 0.9)])
    assert found == [("ball", [0, 3], 0.9), ("ball", [4, 6], 0.5)]
