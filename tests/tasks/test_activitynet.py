"""ActivityNet's JSON as it is and as people get it wrong, and what is said of it once the files are known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.family import InputError
from tasks import annotations
from tasks.datasets import activitynet, load_format, reviewer, vggsound


def entry(subset: str, *segments: tuple[float, float, str], duration: float = 60.0, **more: Any) -> dict[str, Any]:
    listed = [{"segment": [start, end], "label": label} for start, end, label in segments]
    return {"subset": subset, "duration": duration, "annotations": listed, **more}


def write(folder: Path, database: dict[str, Any], name: str = "annotations.json", classes: str = "") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "THUMOS14-30fps", "taxonomy": [], "database": database}))
    if classes:
        path.with_name("category_idx.txt").write_text(classes)
    return folder


def segments(table: pd.DataFrame) -> dict[str, list[list[Any]]]:
    return {row["id"]: json.loads(row["annotation"])["segments"] for row in table.to_dict("records")}


THUMOS = {
    "video_validation_0000051": entry("training", (67.5, 75.9, "Billiards"), (85, 90.6, "Billiards"), frame=1800),
    "video_test_0000004": entry("validation", (0.2, 1.1, "CricketShot")),
}


@pytest.mark.parametrize("place", ["thumos_14_anno.json", "annotations/thumos_14_anno.json"])
def test_what_is_trained_on_and_what_is_tested(tmp_path: Path, place: str) -> None:
    write(tmp_path, THUMOS, place, "Billiards\nCricketShot\n")
    table = activitynet.read(tmp_path)
    assert table.columns.tolist() == activitynet.COLUMNS
    assert dict(zip(table["id"], table["split"], strict=True)) == {
        "video_validation_0000051": "train",
        "video_test_0000004": "test",
    }
    assert table["group"].tolist() == table["id"].tolist()
    assert json.loads(table["annotation"][0]) == {
        "segments": [[67.5, 75.9, "Billiards"], [85.0, 90.6, "Billiards"]], "duration": 60.0, "frame": 1800,
    }  # fmt: skip
    assert json.loads(table["annotation"][1])["frame"] is None


def test_testing_is_tested_where_its_truth_is_known(tmp_path: Path) -> None:
    told = {"a": entry("training", (1, 2, "x")), "b": entry("validation", (1, 2, "x")), "c": entry("testing")}
    assert activitynet.read(write(tmp_path / "1", told))["split"].tolist() == ["train", "test"]
    told["d"] = entry("testing", (1, 2, "x"))
    assert activitynet.read(write(tmp_path / "2", told))["split"].tolist() == ["train", "val", "test", "test"]


def test_what_is_no_truth_is_left_out(tmp_path: Path) -> None:
    one = entry("training", (3, 4, "x"), (1, 2, "x"), (3, 4, "x"), (3, 4, "y"), (0, 9, "Ambiguous"), (1, 2.5, "x"))
    table = activitynet.read(write(tmp_path, {"a": one}, classes="x\ny\n"))
    assert segments(table)["a"] == [[3.0, 4.0, "x"], [1.0, 2.0, "x"], [3.0, 4.0, "y"], [1.0, 2.5, "x"]]


def test_videos_are_found_by_their_id(tmp_path: Path) -> None:
    names = {"a": "videos/a.mp4", "b": "raw_data/video/b.MKV", "c": "video/c.mp4", "d.e": "videos/d.e.webm"}
    for path in [*names.values(), "video/a.mp4", "videos/a.avi", "videos/f.srt"]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    database = {name: entry("training", (1, 2, "x")) for name in [*names, "f", "g"]}
    database["g"]["path"] = "else where/g.mp4"
    table = activitynet.read(write(tmp_path, database))
    found = dict(zip(table["id"], table["path"], strict=True))
    assert found == names | {"f": "videos/f.mp4", "g": "else where/g.mp4"}


@pytest.mark.parametrize("name", activitynet.BLOCK_LISTS)
def test_blocked_videos_are_left_out(tmp_path: Path, name: str) -> None:
    write(tmp_path, THUMOS, "annotations/a.json")
    (tmp_path / "annotations" / name).write_text("video_test_0000004\nvideo_test_0001292\n")
    assert activitynet.read(tmp_path)["id"].tolist() == ["video_validation_0000051"]


label = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)
times = st.tuples(st.floats(0, 1e4), st.floats(1e-3, 1e3)).map(lambda pair: (pair[0], pair[0] + pair[1]))
segment = st.tuples(times, label.filter(lambda name: name != "Ambiguous")).map(lambda value: (*value[0], value[1]))
video = st.tuples(
    st.sampled_from(["train", "val", "test"]),
    st.lists(segment, min_size=1, max_size=4, unique=True),
    st.none() | st.integers(1, 10**6),
    st.booleans(),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(video, min_size=1, max_size=5))
def test_what_is_written_is_read_again(tmp_path: Path, videos: list[tuple]) -> None:
    rows = [
        activitynet.row(f"v{k}", f"{'videos' if usual else 'raw_data/video'}/v{k}.mp4", split, own, 1e5, frame)
        for k, (split, own, frame, usual) in enumerate(videos)
    ]
    table = pd.DataFrame(rows)
    activitynet.write(table, tmp_path)
    if set(table["split"]) == {"val"} or set(table["split"]) == {"train", "val"}:
        table["split"] = table["split"].replace("val", "test")  # nothing else is there to test on
    pd.testing.assert_frame_equal(activitynet.read(tmp_path), table)
    names = {name for _, own, _, _ in videos for _, _, name in own}
    assert (tmp_path / "category_idx.txt").read_text().split("\n") == [*sorted(names), ""]
    known = json.loads((tmp_path / "annotations.json").read_text())["database"]
    assert {name for name, own in known.items() if "path" in own} == {f"v{k}" for k, v in enumerate(videos) if not v[3]}


def test_the_class_of_a_video_is_all_it_shows(tmp_path: Path) -> None:
    one = entry("training", (1, 2, "Diving"), (1, 2, "CliffDiving"), (5, 6, "Diving"))
    table = activitynet.read(write(tmp_path, {"a": one, "b": entry("training")}))
    assert [activitynet.class_of(text) for text in table["annotation"]] == ["CliffDiving, Diving", None]
    assert load_format("activitynet").class_of is activitynet.class_of


# --- a classifier of whole videos ------------------------------------------------------------------------------------------

FOUR = {
    "a": entry("training", (1, 2, "x")), "b": entry("validation", (1, 2, "y")), "c": entry("testing", (1, 2, "x")),
    "d": entry("testing", (3, 4, "y")),
}  # fmt: skip


def scores(table: pd.DataFrame) -> dict[str, Any]:
    return {row["id"]: json.loads(row["annotation"]).get("class_scores") for row in table.to_dict("records")}


@pytest.mark.parametrize("folder", ["", "annotations"])
def test_its_scores_are_read_and_written(tmp_path: Path, folder: str) -> None:
    write(tmp_path, FOUR, str(Path(folder, "a.json")), "x\ny\nz\n")
    assert set(scores(activitynet.read(tmp_path)).values()) == {None}
    published = {"results": {"c": [0.25, 0.5, 0], "d": [1, 0.125, 0.5], "e": [0, 0, 0]}, "class": ["z", "y", "x"]}
    (tmp_path / folder / "classifier.json").write_text(json.dumps(published))
    table = activitynet.read(tmp_path)
    told = {"c": {"z": 0.25, "y": 0.5, "x": 0}, "d": {"z": 1, "y": 0.125, "x": 0.5}}
    assert scores(table) == {"a": None, "b": None} | told
    activitynet.write(table, tmp_path / "again")
    without_z = {name: {label: own[label] for label in "yx"} for name, own in told.items()}
    assert scores(activitynet.read(tmp_path / "again")) == {"a": None, "b": None} | without_z, "no video shows z"
    by_label = json.loads((tmp_path / "again/classifier.json").read_text())
    assert by_label == {"results": without_z}
    activitynet.write(activitynet.read(tmp_path / "again"), tmp_path / "third")
    assert (tmp_path / "third/classifier.json").read_bytes() == (tmp_path / "again/classifier.json").read_bytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"results": {"c": {"x": 1}}}, r"video d of the test split has no scores; add them, or delete the file"),
        ({"results": {"c": {"w": 1}, "d": {}}}, r"video c: 'w' is none of the 2 classes of the annotations"),
        ({"results": {"c": {"x": 1.5}}}, r"video c: the score of 'x' is 1\.5; it must lie in \[0, 1\]"),
        ({"results": {"c": {"x": "1"}}}, r"video c: the score of 'x' is '1'"),
        ({"results": {"c": [1]}, "class": ["x", "y"]}, r"video c has 1 scores and `class` not as many names"),
        ({"results": {"c": [1]}}, r"video c has 1 scores and `class` not as many names"),
        ({"results": {"c": 1}}, r"video c has 1 as scores; write one score for each"),
        ({"results": []}, r"has no `results` of videos"),
        ([], r"has no `results` of videos"),
    ],
)
def test_scores_that_cannot_be(tmp_path: Path, content: Any, words: str) -> None:
    write(tmp_path, FOUR)
    (tmp_path / "classifier.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=words) as error:
        activitynet.read(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path / "classifier.json") in str(error.value)


WRONG = {
    "subset": ({"a": entry("train")}, r"video a: subset is 'train'; write training, validation or testing"),
    "no subset": ({"a": {"duration": 3}}, r"video a: subset is None"),
    "no entry": ({"a": 3}, r"video a: subset is None"),
    "duration": ({"a": entry("training", duration=0)}, r"video a: duration is 0; write its length in seconds"),
    "duration as text": ({"a": entry("training") | {"duration": "60"}}, r"video a: duration is '60'"),
    "frame": ({"a": entry("training", frame=2.5)}, r"video a: frame is 2.5"),
    "annotations": ({"a": entry("training") | {"annotations": {}}}, r"video a: annotations is a dict; write a list"),
    "backwards": ({"a": entry("training", (1, 2, "x"), (3, 3, "x"))}, r"video a, segment 2: \[3, 3\] is no \[start, end\]"),
    "negative": ({"a": entry("training", (-1, 3, "x"))}, r"video a, segment 1: \[-1, 3\] is no"),
    "no label": ({"a": entry("training", (1, 3, " "))}, r"video a, segment 1: the label is ' '; name the action"),
    "unknown": ({"a": entry("training", (1, 3, "z"))}, r"segment 1: label 'z' is not among the 2 classes of category_idx"),
    "id": ({"a/b": entry("training")}, r"'a/b' is no video's id"),
    "path": ({"a": entry("training", path="../a.mp4")}, r"video a: path '../a.mp4' is none below the folder"),
    "nothing": ({}, r"has no `database` of videos"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(tmp_path: Path, case: str) -> None:
    database, words = WRONG[case]
    write(tmp_path, database, classes="x\ny\n")
    with pytest.raises(InputError, match=words) as error:
        activitynet.read(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path / "annotations.json") in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must hold one \.json, at its top or in annotations/; there is none"):
        activitynet.read(tmp_path)
    (tmp_path / "a.json").write_text('{"database": {\n"a": ,')
    with pytest.raises(InputError, match=r"a\.json line 2 is no JSON"):
        activitynet.read(tmp_path)
    (tmp_path / "a.json").write_text('{"database": {"a": 1, "a": 2}}')
    with pytest.raises(InputError, match=r"a\.json: a is listed twice"):
        activitynet.read(tmp_path)
    write(tmp_path, THUMOS, "b.json", "x\n\ny\n")
    with pytest.raises(InputError, match=r"2 of them: a\.json, b\.json; keep one"):
        activitynet.read(tmp_path)
    (tmp_path / "a.json").unlink()
    with pytest.raises(InputError, match=r"category_idx\.txt line 2: '' is empty"):
        activitynet.read(tmp_path)


# --- against the files -----------------------------------------------------------------------------------------------------


def probed(folder: Path, **changes: dict[str, Any]) -> pd.DataFrame:
    """The table as clean has it: each file as its annotation says, at 30 frames a second, but for the changes."""
    table = activitynet.read(folder)
    known = [json.loads(text) for text in table["annotation"]]
    table["duration"] = [one["duration"] for one in known]
    table["fps"], table["reason"], table["detail"] = 30.0, "", ""
    for name, values in changes.items():
        table.loc[table["id"] == name, list(values)] = list(values.values())
    return table.assign(frames=(table["duration"] * table["fps"]).round().astype(int))


def found(folder: Path, **changes: dict[str, Any]) -> list[tuple[str, str, str]]:
    review = activitynet.check(probed(folder, **changes), folder)
    return [(finding.severity, finding.clip, finding.text) for finding in review.findings]


GOOD = {
    "a": entry("training", (1, 5, "x"), (7, 9, "y"), frame=1800),
    "b": entry("validation", (2, 6, "x"), (50, 60.02, "y")),
}


def test_nothing_is_said_of_what_is_right(tmp_path: Path) -> None:
    assert found(write(tmp_path, GOOD, classes="x\ny\n")) == []


FINDINGS = [
    ({"duration": 30.0}, "error", r"the annotation says 60 s, the file has 30 s"),
    ({"duration": 58.0}, "warning", r"the annotation says 60 s, the file has 58 s"),
    (
        {"reason": "missing", "detail": "there is no such file"},
        "warning",
        r"not used \(missing: there is no such file\)",
    ),
    ({"fps": 25.0}, "warning", r"the annotation says 1800 frames, the file has 1500"),
]


@pytest.mark.parametrize(("change", "severity", "words"), FINDINGS)
def test_a_file_that_is_another(tmp_path: Path, change: dict[str, Any], severity: str, words: str) -> None:
    both = {"c": GOOD["a"], **GOOD}
    said = found(write(tmp_path, both), c=change)
    assert (severity, "c") == said[0][:2] and re.search(words, said[0][2]), said
    assert len(said) == 1 if "fps" in change or "reason" in change else all(clip == "c" for _, clip, _ in said)


def test_segments_that_cannot_be(tmp_path: Path) -> None:
    odd = entry("training", (1, 5, "x"), (1, 5, "x"), (3, 4, "Ambiguous"), (58, 61, "y"), (60, 62, "y"))
    said = found(write(tmp_path, GOOD | {"c": odd, "d": entry("training")}))
    assert [(severity, clip) for severity, clip, _ in said] == [
        ("warning", "c"), ("error", "c"), ("warning", "c"), ("warning", "c"), ("warning", "d"),
    ]  # fmt: skip
    texts = [text for _, _, text in said]
    assert texts[0] == "segment 4 (y, 58 to 61 s) goes on after the end of the video at 60 s"
    assert texts[1] == "segment 5 (y, 60 to 62 s) lies after the end of the video at 60 s"
    assert "stand there before already: 1" in texts[2] and "labelled Ambiguous: 1" in texts[3]
    assert texts[4] == "it has no segment: all of it is background"


def test_frames_at_uneven_times(tmp_path: Path) -> None:
    write(tmp_path, {name: {**own, "frame": None} for name, own in GOOD.items()})
    table = probed(tmp_path)
    table.loc[0, "frames"] = 1700
    (finding,) = activitynet.check(table, tmp_path).findings
    assert finding.text == "1700 frames at 30 a second do not make 60 s: its frame rate varies"


def test_classes_that_cannot_be_learned(tmp_path: Path) -> None:
    more = GOOD | {"c": entry("validation", (1, 2, "z")), "d": entry("training", (1, 2, "w"))}
    said = found(write(tmp_path, more, classes="z\nx\ny\nw\nv\n"), d={"reason": "missing"})
    assert said[0] == ("error", "", "class 'z' is annotated in test and in no usable training video")
    assert said[1][2] == "no usable video shows v, w of category_idx.txt"
    assert said[2][2].startswith("category_idx.txt is not in alphabetical order")
    everything = {name: {"reason": "missing"} for name in "ad"}
    assert found(tmp_path, **everything)[0][2] == "no usable training video has a segment; nothing can be learned"


def test_the_page_and_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = write(tmp_path / "raw", GOOD | {"<c>": entry("training", (61, 62, "x"), (64, 66, "y"))})
    table = probed(raw)
    with pytest.raises(InputError) as error:
        annotations.review(activitynet, table, raw, "toy")
    line = (
        "toy: 2 errors in the annotations, first video <c>: segment 1 (x, 61 to 62 s) lies after the end of the video"
    )
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
    page = (tmp_path / ".duet/reports/toy/annotations.html").read_text()
    assert "2 errors" in page and "&lt;c&gt;" in page and "<c>" not in page and 'src="http' not in page
    assert annotations.review(activitynet, table[table["id"] != "<c>"], raw, "toy") == Path(
        ".duet/reports/toy/annotations.html"
    )
    assert annotations.review(vggsound, table, raw, "toy") is None and reviewer(vggsound) is None


# --- advice ----------------------------------------------------------------------------------------------------------------


def test_values_for_actions_like_those_of_thumos() -> None:
    # Log-normal lengths with 5 % below 0.85 s and 1 % above 19 s at 30 frames a second: the published values come out.
    quantiles = (np.arange(2000) + 0.5) / 2000
    low, high = np.log(0.85), np.log(19.0)
    deviation = (high - low) / (1.6449 + 2.3263)
    lengths = np.exp(low + deviation * (1.6449 + np.sqrt(2) * _inverse_erf(2 * quantiles - 1)))
    assert activitynet.suggest(30.0, lengths, 1500.0) == (4, 768, 6)


def _inverse_erf(values: np.ndarray) -> np.ndarray:
    import torch

    return torch.erfinv(torch.from_numpy(values)).numpy()


@given(
    st.floats(1, 60),
    st.lists(st.floats(0.05, 500), min_size=1, max_size=30).map(np.array),
    st.floats(1, 5000),
)
def test_what_is_suggested_fits_together(fps: float, lengths: np.ndarray, longest: float) -> None:
    step, window, levels = activitynet.suggest(fps, lengths, longest)
    short, long = np.quantile(lengths, [0.05, 0.99])
    assert step >= 1 and (step == 1 or short * fps / step >= 6)
    assert window % 16 == 0 or window % 24 == 0
    assert window % 2 ** (levels - 1) == 0
    assert window >= min(4 * long, longest) * fps / step
    assert levels == 2 or 2**levels <= long * fps / step / 2 < 2 ** (levels + 1)
