"""adatad's post-processing, report and answers on predictions made by hand."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.adatad import answers
from models.adatad.detections import AverageMap, clip_scores, detect, merge, padded, true_segments
from models.adatad.evaluation import average_map, evaluate
from models.family import ClipInfo, Facts, InputError, Table
from models.metrics import bootstrap

LABELS = ["jump", "run", "swim"]
FACTS = Facts({"label": LABELS}, 0.0, 1.0, thresholds={"jump": 0.5, "run": 0.6, "swim": 0.3})
CONFIG: Any = SimpleNamespace(nms_sigma=0.7, min_score=0.001, max_per_video=50, classifier_top=0)
NUM, DURATION, WINDOW = 12, 60.0, 40.0  # videos of a split; seconds
STARTS = (0.0, 20.0)  # of windows: their middle third is seen twice


def segments_of(video: int) -> list[list[Any]]:
    """Three segments a video, one of them twice; `swim` is nowhere in the test split."""
    return [[5.0, 9.0, "jump"], [22.5 + video / 4, 31.0, "run"], [45.0, 58.0, "jump"], [5.0, 9.0, "jump"]]


@dataclass
class FakeRun:
    """Videos whose windows find every segment that they hold, give or take `shift` seconds, and something at random."""

    shift: float = 0.0
    facts: Facts = FACTS
    trained: tuple[str, ...] = ("finetune",)
    config: Any = field(default_factory=lambda: CONFIG)
    num_bootstrap: int = 100
    seed: int = 3
    twice: bool = False  # every window comes again
    truth: dict[int, list[list[Any]]] = field(default_factory=dict)  # of single videos, in place of segments_of
    class_scores: dict[str, float] = field(default_factory=dict)  # of every video

    def clips(self, split: str) -> list[ClipInfo]:
        more = {"class_scores": self.class_scores} if self.class_scores else {}
        known = [{"segments": self.truth.get(v, segments_of(v)), "duration": DURATION} | more for v in range(NUM)]
        return [ClipInfo(f"{split}{v:02}", f"g{v // 2}", annotation) for v, annotation in enumerate(known)]

    def predict(self, phase: str, split: str, drop: str = "", untrained: bool = False) -> dict[str, np.ndarray]:
        rng, rows = np.random.default_rng(0), []
        assert split == "test", "the thresholds are in the facts"
        for video in range(NUM):
            for start in STARTS:
                found = []
                for number, (begin, end, label) in enumerate(segments_of(video)[:3]):
                    if begin >= start and end <= start + WINDOW:
                        found.append((begin + self.shift, end + self.shift, 0.9 - 0.1 * number, LABELS.index(label)))
                found.append((*np.sort(rng.uniform(start, start + WINDOW, 2)), 0.05, 1))
                found += [(0.0, 0.0, 0.0, -1)] * (6 - len(found))
                rows.append(
                    (*(np.array(column, dtype=np.float32) for column in zip(*found, strict=True)), video, start)
                )
        names = ("starts", "ends", "scores", "classes", "clip", "window_start")
        order = [k for k in range(len(rows)) for _ in range(1 + self.twice)]
        return {name: np.stack([rows[k][i] for k in order]).astype(np.float32) for i, name in enumerate(names)}


def run(**changes: Any) -> Any:
    return FakeRun(**changes)


@pytest.fixture(scope="module")
def results():
    return evaluate(run())


# --- from windows to videos -----------------------------------------------------------------------------------------------


def test_windows_become_videos() -> None:
    fake = run()
    found = detect(fake.predict("finetune", "test"), CONFIG)
    assert np.array_equal(found.video, np.sort(found.video))
    first = found[found.video == 0]
    assert (np.diff(first.score) <= 0).all()
    assert (first.start[0], first.end[0], LABELS[first.label[0]]) == (5, 9, "jump")
    # The window from 20 s on and the one from 0 s both hold 22.5-31 s: the copy decays by exp(-1 / sigma).
    runs = first[(first.label == 1) & (first.start == 22.5)]
    np.testing.assert_allclose(runs.score, [np.float32(0.8), np.float32(0.8) * np.exp(-1 / 0.7)], rtol=1e-12)


def test_a_window_given_twice_counts_once() -> None:
    once, again = (detect(run(twice=twice).predict("finetune", "test"), CONFIG) for twice in (False, True))
    assert np.array_equal(once.score, again.score)
    assert np.array_equal(once.start, again.start)


def test_scores_of_whole_videos_are_multiplied_in() -> None:
    predictions, clip_scores = run().predict("finetune", "test"), np.ones((NUM, 3))
    clip_scores[0] = [0.1, 1, 1]
    plain, told = detect(predictions, CONFIG), detect(predictions, CONFIG, clip_scores)
    assert told.label[told.video == 0][0] == 1, "run stands first, for a jump is unlikely"
    jumps = [np.sort(found.score[(found.video == 0) & (found.label == 0)]) for found in (plain, told)]
    np.testing.assert_allclose(jumps[1], 0.1 * jumps[0])
    assert np.array_equal(plain.score[plain.video > 0], told.score[told.video > 0])


def test_no_more_than_asked_for() -> None:
    few = SimpleNamespace(**vars(CONFIG) | {"max_per_video": 2})
    found, every = (detect(run().predict("finetune", "test"), config) for config in (few, CONFIG))  # type: ignore[arg-type]
    assert np.bincount(found.video).tolist() == [2] * NUM
    for video in range(NUM):
        assert found.score[found.video == video].tolist() == every.score[every.video == video][:2].tolist()


# --- the report -----------------------------------------------------------------------------------------------------------


def test_a_perfect_model(results) -> None:
    m = results.metrics
    assert [m[name] for name in ("map_average", "map_30", "map_50", "map_70", "recall_at_1x", "recall_at_5x")] == [
        1
    ] * 6
    assert m["map_average_low"] == m["map_average_high"] == m["map_50_low"] == m["map_50_high"] == 1
    assert (m["num_clips"], m["num_segments"]) == (NUM, 3 * NUM), "what stands twice counts once"
    assert all(np.isfinite(value) for value in m.values())


def test_a_shifted_model() -> None:
    """4 s of a jump, 8.5 s or less of a run, 13 s of a jump, each 1 s late."""
    m = evaluate(run(shift=1.0)).metrics
    assert m["map_30"] == m["map_50"] == m["map_60"] == 1  # (4 - 1) / (4 + 1)
    assert m["map_60"] > m["map_70"] > 0.5
    assert m["map_average"] == pytest.approx(np.mean([m[f"map_{k}0"] for k in range(3, 8)]))
    assert m["map_average_low"] <= m["map_average"] <= m["map_average_high"]


def test_tables(results) -> None:
    classes = results.tables["per_class"].frame.set_index("class")
    assert classes.loc["jump", ["videos", "segments", "AP"]].tolist() == [NUM, 2 * NUM, 1]
    assert classes.loc["swim", "segments"] == 0
    assert np.isnan(classes.loc["swim", "AP"])
    assert results.tables["map"].frame["mAP"].tolist() == [1] * 6
    assert (results.tables["precision_recall"].frame.iloc[:, 1:] == 1).all(axis=None)
    kinds = results.tables["false_positives"].frame.set_index("kind")
    assert kinds.loc["right", "best n"] == 1
    assert kinds["best 10 n"].sum() == pytest.approx(1)
    assert kinds.loc["double detection", "best 10 n"] > 0, "the overlap of the windows"
    believed = results.tables["thresholds"].frame.set_index("class")
    assert believed.loc[["jump", "run"], ["precision", "recall", "F1"]].to_numpy().tolist() == [[1] * 3] * 2
    assert believed["threshold"].tolist() == [0.5, 0.6, 0.3]
    lines = results.tables["timelines"].frame
    assert lines["clip"].nunique() == 8
    one = lines[lines["clip"] == lines["clip"].iloc[0]]
    assert one.loc[one["kind"] == "truth", "label"].tolist() == ["jump", "run", "jump"]
    assert one.loc[one["kind"] == "found", "start"].tolist() == one.loc[one["kind"] == "truth", "start"].tolist()


def test_headline_out_of_the_table_as_it_is_read_back(tmp_path) -> None:
    results = evaluate(run(shift=1.3))
    frame = results.tables["predictions"].frame
    assert frame.columns[:2].tolist() == ["clip", "group"]
    assert frame["answer"][0].startswith("jump 6.3–10.3 s (0.90); run 23.8–32.3 s (0.80); jump")
    frame.to_csv(tmp_path / "predictions.csv", index=False, float_format="%.6g")
    table = pd.read_csv(tmp_path / "predictions.csv", keep_default_na=False)
    statistic = average_map(table)
    assert statistic(np.ones((1, NUM)))[0] == results.metrics["map_average"] < 1
    low, high = bootstrap(statistic, table["group"].tolist(), 100, 3)
    assert (low, high) == (results.metrics["map_average_low"], results.metrics["map_average_high"])


def test_videos_without_segments_cost_precision() -> None:
    empty = run(truth={v: [] for v in range(6)})
    m = evaluate(empty).metrics
    assert m["num_segments"] == 3 * 6
    assert m["map_50"] == pytest.approx(0.5, abs=0.1), "half of what was found is nothing"
    with pytest.raises(InputError, match="no video of the test split has a segment"):
        evaluate(run(truth={v: [] for v in range(NUM)}))


def test_a_classifier_of_whole_videos_changes_the_scores_and_not_what_is_believed(results) -> None:
    told = run(class_scores={"run": 0.5, "jump": 0.25, "swim": 0.1}, config=SimpleNamespace(**vars(CONFIG)))
    told.config.classifier_top = 1
    scored = evaluate(told)
    detections = json.loads(scored.tables["predictions"].frame["detections"][0])
    assert detections.keys() == {"run"}
    plain = json.loads(results.tables["predictions"].frame["detections"][0])
    np.testing.assert_allclose(np.array(detections["run"])[:, 2], 0.5 * np.array(plain["run"])[:, 2])
    assert scored.metrics["map_50"] == pytest.approx(0.5), "no jump is found any more"
    for name in ("thresholds", "timelines"):
        pd.testing.assert_frame_equal(
            scored.tables[name].frame.sort_values(["clip", "start"] if name == "timelines" else "class"),
            results.tables[name].frame.sort_values(["clip", "start"] if name == "timelines" else "class"),
        )
    with pytest.raises(
        InputError, match=r"clip test00 has no class_scores; put classifier\.json beside the annotations"
    ):
        evaluate(run(config=told.config))


def test_the_likeliest_classes_of_a_video() -> None:
    clips = [
        ClipInfo(name, name, {"class_scores": scores})
        for name, scores in {"a": {"jump": 0.2, "run": 0.7, "swim": 0.1}, "b": {"swim": 0.5}}.items()
    ]
    assert clip_scores(clips, LABELS, 2).tolist() == [[0.2, 0.7, 0], [0, 0, 0.5]]


def test_a_label_that_training_never_saw() -> None:
    clips = [ClipInfo("v1", "v1", {"segments": [[0, 1, "run"], [2, 3, "dive"]]})]
    with pytest.raises(InputError, match="clip v1: label 'dive' was not in training; known: jump, run, swim"):
        true_segments(clips, LABELS)


def test_a_model_that_diverged() -> None:
    fake = run()
    predictions = fake.predict("finetune", "test")
    predictions["scores"][5, 1] = np.nan
    fake.predict = lambda *_: predictions
    with pytest.raises(InputError, match="answers clip test02 with NaN"):
        evaluate(fake)


def test_validation_is_the_evaluation() -> None:
    """The metric, batch by batch, against `evaluate`."""
    fake = run(shift=1.3, truth={3: []})
    predictions, metric = fake.predict("finetune", "test"), AverageMap(CONFIG, FACTS)
    truth = {name: np.full((NUM, 9), -1.0) for name in ("truth_starts", "truth_ends", "truth_classes")}
    for video, clip in enumerate(fake.clips("val")):
        for place, (start, end, label) in enumerate(clip.annotation["segments"]):
            for name, value in zip(truth, (start, end, LABELS.index(label)), strict=True):
                truth[name][video, place] = value
    for begin in range(0, 2 * NUM, 5):
        rows = slice(begin, begin + 5)
        seen = {name: torch.from_numpy(value[rows]) for name, value in predictions.items()}
        clip = seen["clip"].long()
        metric.update(seen, {"clip": clip} | {name: torch.from_numpy(value)[clip] for name, value in truth.items()})
    results = evaluate(fake).metrics
    assert metric.compute() == {name: pytest.approx(results[name], abs=1e-12) for name in ("map_average", "map_50")}
    assert results["map_average"] < 1


# --- answers --------------------------------------------------------------------------------------------------------------


def test_an_answer_a_video() -> None:
    found = detect(run().predict("finetune", "test"), CONFIG)
    told = answers.present(padded(found, NUM), FACTS)
    assert len(told) == NUM
    assert [len(answer["segments"]) for answer in told] == np.bincount(found.video).tolist()
    assert told[0]["segments"][0] == {"segment": [5.0, 9.0], "label": "jump", "score": pytest.approx(0.9)}
    assert answers.present(padded(found[found.video > NUM], 2), FACTS) == [{"segments": []}] * 2


def test_thresholds_leave_what_is_right() -> None:
    fake = run()
    clips, predictions = fake.clips("val"), fake.predict("finetune", "test")
    thresholds = json.loads(json.dumps(answers.calibrate(CONFIG, FACTS, predictions, clips)))
    assert list(thresholds) == LABELS and 0.3 < thresholds["run"] < 0.8
    told, facts = merged(predictions), replace(FACTS, thresholds=thresholds)
    files = answers.export({clip.id: answer for clip, answer in zip(clips, told, strict=True)}, facts)
    for clip in clips:
        table = files[f"{clip.id}.png"]
        assert isinstance(table, Table) and table.plot == "timeline"
        shown = table.frame[["start", "end", "label"]].to_numpy().tolist()
        assert shown == sorted(clip.annotation["segments"][:3])
        assert set(table.frame["duration"]) == {DURATION} and set(table.frame["kind"]) == {"found"}
        srt = files[f"{clip.id}.srt"]
        assert isinstance(srt, str) and srt.count("-->") == 3
    predictions["classes"][:] = -1
    assert answers.calibrate(CONFIG, FACTS, predictions, clips) == dict.fromkeys(LABELS, 1.0)


def merged(predictions: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Answers as a person's videos get them."""
    batch = merge(CONFIG, {name: torch.from_numpy(value) for name, value in predictions.items()})
    return [{"duration": DURATION, **answer} for answer in answers.present(batch, FACTS)]


def test_the_results_file_has_every_detection() -> None:
    (told, *_), sure = merged(run().predict("finetune", "test")), replace(FACTS, thresholds=dict.fromkeys(LABELS, 2.0))
    files = answers.export({"v": told}, sure)
    assert set(files) == {"results.json", "v.srt", "v.png"}
    assert files["v.srt"] == ""
    assert files["v.png"].frame[["kind", "label"]].to_numpy().tolist() == [["nothing", ""]]  # type: ignore[union-attr]
    known = json.loads(files["results.json"])  # type: ignore[arg-type]
    assert known.keys() == {"version", "external_data", "results"}
    assert len(known["results"]["v"]) == len(told["segments"]) > 3


def test_results_file_rounds() -> None:
    answer = {"segments": [{"segment": [1.23456, 2.5], "label": "run", "score": 0.123456}]}
    expected = {"v1": [{"segment": [1.23, 2.5], "label": "run", "score": 0.1235}], "v2": []}
    assert answers.results({"v1": answer, "v2": {"segments": []}})["results"] == expected


def parse(text: str) -> list[tuple[int, int, list[str]]]:
    """Subtitles as a player reads them: begin and end in ms, lines."""
    cues = []
    for number, block in enumerate(text.split("\n\n") if text else [], 1):
        first, times, *lines = block.strip("\n").split("\n")
        found = re.fullmatch(r"(\d\d):(\d\d):(\d\d),(\d{3}) --> (\d\d):(\d\d):(\d\d),(\d{3})", times)
        assert found
        assert int(first) == number
        h, m, s, ms, *until = map(int, found.groups())
        cues.append(
            (((h * 60 + m) * 60 + s) * 1000 + ms, ((until[0] * 60 + until[1]) * 60 + until[2]) * 1000 + until[3], lines)
        )
    return cues


def test_subtitles() -> None:
    rows = [([3600.0, 3605.0], "run", 0.8), ([3602.5, 3610.0], "jump", 0.91), ([3620.0, 3620.0001], "run", 0.5)]
    answer = {"segments": [{"segment": times, "label": label, "score": score} for times, label, score in rows]}
    assert answers.subtitles(answer) == (
        "1\n01:00:00,000 --> 01:00:02,500\nrun (0.80)\n\n"
        "2\n01:00:02,500 --> 01:00:05,000\nrun (0.80)\njump (0.91)\n\n"
        "3\n01:00:05,000 --> 01:00:10,000\njump (0.91)\n"
    )
    assert answers.subtitles({"segments": []}) == ""


@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 4000), st.sampled_from(LABELS), st.integers(1, 99))))
@settings(max_examples=30, deadline=None)
def test_subtitles_say_at_every_moment_what_goes_on(rows: list[tuple[int, int, str, int]]) -> None:
    answer = {
        "segments": [
            {"segment": [start / 1000, (start + length) / 1000], "label": label, "score": score / 100}
            for start, length, label, score in rows
        ]
    }
    cues = parse(answers.subtitles(answer))
    assert all(begin < end for begin, end, _ in cues)
    assert all(a[1] <= b[0] for a, b in pairwise(cues)), "in order, never two at once"
    for moment in sorted({edge for start, length, _, _ in rows for edge in (start, start + length)}):
        going: dict[str, int] = {}
        for start, length, label, score in rows:
            if start <= moment < start + length:
                going[label] = max(score, going.get(label, 0))
        shown = [lines for begin, end, lines in cues if begin <= moment < end]
        assert sorted(shown[0] if shown else []) == sorted(f"{label} ({s / 100:.2f})" for label, s in going.items())
