"""t3av's evaluation on predictions made by hand, whose scores are known."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest

from models.family import ClipInfo, Facts, InputError
from models.t3av.evaluation import evaluate

LABELS = ["bell, ringing", "cat", "dog", "rain"]


@dataclass
class FakeRun:
    """40 clips of four classes in turn: sound tells only {0, 1} from {2, 3}, the picture only odd from even."""

    trained: list[str] = field(default_factory=lambda: ["pretrain", "contrastive", "finetune"])
    facts: Facts = field(default_factory=lambda: Facts({"label": LABELS}, 0.0, 1.0))
    config: None = None
    num_bootstrap: int = 200
    seed: int = 3
    asked: list[tuple[str, str, str, bool]] = field(default_factory=list)
    silent: int = 5  # the clip without sound

    def clips(self, split: str) -> list[ClipInfo]:
        return [ClipInfo(f"{split}{i}", f"{split}{i // 2}", {"label": LABELS[i % 4]}) for i in range(40)]

    def predict(self, phase: str, split: str, drop: str = "", untrained: bool = False) -> dict[str, np.ndarray]:
        assert phase in self.trained
        self.asked.append((phase, split, drop, untrained))
        truth = np.arange(40) % 4
        eye = np.eye(4, dtype=np.float32)
        heard, seen = eye[truth] + eye[truth ^ 1], eye[truth] + eye[truth ^ 2]
        if phase == "finetune":
            tip = -0.1 * np.arange(4)  # one modality alone answers the lower of two candidates
            return {"logits": 4 * (heard * (drop != "audio") + seen * (drop != "video")) + tip}
        rng = np.random.default_rng([len(phase), len(split), untrained])
        noise = rng.normal(size=(2, 40, 8)).astype(np.float32)
        audio, video = 0.1 * noise
        if not untrained:
            audio, video = audio + heard.repeat(2, 1), video + seen.repeat(2, 1)
        audio[self.silent] = np.nan
        pairs = np.eye(40, dtype=np.float32)
        return {"audio_feature": audio, "video_feature": video, "audio_embedding": pairs, "video_embedding": pairs}


@pytest.fixture(scope="module")
def results():
    return evaluate(FakeRun())


def test_both_modalities_are_needed(results) -> None:
    m = results.metrics
    assert m["top1"] == m["map"] == m["macro_f1"] == m["balanced_accuracy"] == 1
    assert m["audio_top1"] == m["video_top1"] == 0.5
    assert m["top5"] == 1
    assert m["top1_low"] == m["top1_high"] == 1
    assert m["audio_top1_low"] <= 0.5 <= m["audio_top1_high"]
    assert m["late_top1"] == 1  # the mean of both answers brings back what each alone had to guess


def test_shapley_split_starts_at_the_most_frequent_class(results) -> None:
    m = results.metrics
    assert m["majority_top1"] == 0.25
    assert m["shapley_audio"] == m["shapley_video"] == 0.375
    assert m["shapley_audio"] + m["shapley_video"] + m["majority_top1"] == m["top1"]
    assert m["cooperation"] == 0.25
    assert m["mu_a"] == m["mu_v"] == m["mu_av"] == 0


def test_pretrained_features_stand_beside_random_ones(results) -> None:
    m = results.metrics
    assert m["probe_av"] == m["knn_av"] == 1
    assert 0.3 < m["probe_a"] < 0.7
    assert m["probe_av_random"] < 0.6
    assert m["probe_gain"] == pytest.approx(m["probe_av"] - m["probe_av_random"])
    assert m["probe_av_pretrain"] == 1
    assert list(results.tables["probes"].frame.columns) == ["features", "contrastive", "pretrain", "random weights"]


def test_retrieval_leaves_out_what_has_no_partner() -> None:
    run = FakeRun()
    predict = run.predict

    def silent(*args, **kwargs):
        found = predict(*args, **kwargs)
        if "audio_embedding" in found:
            found["audio_embedding"] = found["audio_embedding"].copy()
            found["audio_embedding"][run.silent] = np.nan
        return found

    run.predict = silent  # type: ignore[method-assign]
    m = evaluate(run).metrics
    assert m["gallery"] == 39
    assert m["r1_v2a"] == m["r10_a2v"] == 1


def test_parts_without_a_checkpoint_are_left_out_and_said() -> None:
    run = FakeRun(trained=["finetune"])
    results = evaluate(run)
    assert not [name for name in results.metrics if name.startswith(("probe", "knn", "r1_"))]
    assert results.tables["probes"].frame.empty
    assert "without pre-training" in results.tables["probes"].note
    assert "no contrastive checkpoint" in results.tables["retrieval"].note


def test_only_the_contrastive_phase_is_missing() -> None:
    m = evaluate(FakeRun(trained=["pretrain", "finetune"])).metrics
    assert m["probe_av"] == 1
    assert "probe_av_pretrain" not in m


def test_tables_and_examples(results) -> None:
    predictions = results.tables["predictions"].frame
    assert predictions["clip"].tolist() == [f"test{i}" for i in range(40)]
    assert predictions["prediction_1"].tolist() == predictions["truth"].tolist()
    confusion = results.tables["confusion"].frame
    assert confusion["truth"].tolist() == LABELS == list(confusion.columns[1:])
    assert np.array_equal(confusion[LABELS].to_numpy(), 10 * np.eye(4))
    assert results.tables["per_class"].frame["support"].tolist() == [10] * 4
    assert len(results.examples) == 12
    assert all(len(example.predictions) == 4 for example in results.examples)


def test_the_most_confident_mistakes_are_shown() -> None:
    run = FakeRun()
    predict = run.predict

    def mistaken(*args, **kwargs):
        found = predict(*args, **kwargs)
        if "logits" in found:
            for row, height in ((3, 30.0), (8, 20.0), (17, 10.0)):
                found["logits"][row] = 0
                found["logits"][row, (row + 1) % 4] = height
        return found

    run.predict = mistaken  # type: ignore[method-assign]
    examples = evaluate(run).examples
    assert [example.clip for example in examples[-3:]] == ["test3", "test8", "test17"]
    assert all(example.truth == example.predictions[0][0] for example in examples[:9])


def test_same_predictions_same_results(results) -> None:
    again = evaluate(FakeRun())
    assert again.metrics == results.metrics
    for name, table in results.tables.items():
        pd.testing.assert_frame_equal(table.frame, again.tables[name].frame)


def test_unknown_label_lists_the_known() -> None:
    run = FakeRun(facts=Facts({"label": LABELS[:3]}, 0.0, 1.0))
    with pytest.raises(
        InputError, match="clip test3: label 'rain' was not in training; known: bell, ringing, cat, dog"
    ):
        evaluate(run)
