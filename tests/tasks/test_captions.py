"""Files of captions in all their shapes, and the command that scores one against another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models import caption_scores
from models.family import InputError
from models.meteor import meteor
from tasks import captions
from tasks.caption_files import captions_by_clip, clip_id, read
from tasks.judges import NONE, Judges, Weights

NOBODY = Weights(clip=NONE, trilip=NONE, t5=NONE, spice=NONE)
PREDICTIONS = {"test/a.mp4": "a man plays a guitar", "b": "a dog barks", "test/c.mp4": "it is so", "new": "a cat"}
REFERENCES = [
    {"image_id": "c", "caption": "it was"},
    {"image_id": "datasets/videos/test/a.mp4", "caption": "a man is playing the guitar"},
    {"image_id": "a", "caption": "a man with a guitar"},
    {"image_id": "b", "caption": "a dog barks"},
    {"image_id": "unseen", "caption": "a bird sings"},
]
TEXTS = ["a man plays a guitar", "a dog barks", "it is so"]
TRUTHS = [["a man is playing the guitar", "a man with a guitar"], ["a dog barks"], ["it was"]]


def write_files(folder: Path) -> list[str]:
    (folder / "predictions.json").write_text(json.dumps(PREDICTIONS))
    (folder / "references.json").write_text(json.dumps({"annotations": REFERENCES, "images": []}))
    return [str(folder / "predictions.json"), str(folder / "references.json")]


# --- the command -----------------------------------------------------------------------------------------------------------


def test_the_command_scores_what_both_files_have_and_says_what_they_lack(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tasks.captions", *write_files(tmp_path), "--json", "scores.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, "two clips were left out"
    assert (
        "error: not scored: 1 without reference (new) and 1 without prediction (unseen); give both files the same clips"
        in done.stderr
    )
    lines = {line[:-17].strip(): line.split()[-2:] for line in done.stdout.splitlines()}
    expected = {
        "BLEU-4": caption_scores.bleu(TEXTS, TRUTHS).corpus()[3],
        "METEOR, exact and stem": meteor(TEXTS, TRUTHS).corpus(),
        "ROUGE-L": caption_scores.rouge_l(TEXTS, TRUTHS).mean(),
        "CIDEr-D": caption_scores.cider_d(TEXTS, TRUTHS).mean(),
    }
    for title, value in expected.items():
        assert lines[title] == [f"{value:.4f}", "3"]
    assert lines["Nouns shared, F1"][1] == "2", "neither text of c has a noun"
    told = json.loads((tmp_path / "scores.json").read_text())
    assert told["metrics"]["cider_d"] == pytest.approx(expected["CIDEr-D"])
    assert list(told["clips"]) == ["a", "b", "c"]
    assert [told["clips"][clip]["entity_f1"] for clip in "bc"] == [1, None]
    assert (told["without_reference"], told["without_prediction"]) == (["new"], ["unseen"])


def test_a_caption_of_all_clips_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    path = tmp_path / "same.json"
    path.write_text(json.dumps({"a": "a dog barks", "b": "a man plays a guitar loudly"}))
    monkeypatch.setattr(sys, "argv", ["captions", str(path), str(path)])
    captions.main()
    found = {line[:-17].strip(): float(line.split()[-2]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert found["BLEU-4"] == found["ROUGE-L"] == found["METEOR, exact and stem"] == found["Nouns shared, F1"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--trilip", "x"], "--trilip needs --clip"), (["--clip", "x"], "--clip needs --dataset")],
)
def test_what_a_judge_needs_is_asked_for(options: list[str], message: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["captions", "p.json", "r.json", *options])
    with pytest.raises(SystemExit) as ended:
        captions.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_judges_scores_stand_beside_the_others() -> None:
    class Silent(Judges):
        def judge(self, dataset, captions, references):
            return {"spice": np.array([0.5, np.nan]), "audio_score": np.array([np.nan, np.nan])}

    found = captions.score({"a": "x", "b": "y"}, {"a": ["x"], "b": ["y"]}, Silent(NOBODY, "cpu"), "")
    assert found.corpus["spice"] == 0.5
    assert "audio_score" not in found.corpus
    assert [line.split()[-2:] for line in captions.table(found)[-2:]] == [["0.5000", "1"], ["nan", "0"]]


def test_files_that_cannot_be_compared_are_told(tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text('{"x/a.mp4": "t", "a": "u"}')
    two.write_text('{"b": "t"}')
    with pytest.raises(InputError, match=r"one\.json: a has 2 captions"):
        captions.pair(one, two)
    with pytest.raises(InputError, match=r"no clip in common \(b there, a here\)"):
        captions.pair(two, one)


# --- files -----------------------------------------------------------------------------------------------------------------


def test_a_caption_tsv_of_favdbench_is_read(tmp_path: Path) -> None:
    path = tmp_path / "test.caption.tsv"
    path.write_text(
        'datasets/videos/test/a.mp4\t[{"caption": "a man"}, {"caption": "one"}]\nb\t[{"caption": "a dog"}]\n'
    )
    assert read(path) == {"a": ["a man", "one"], "b": ["a dog"]}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"broken\.json is no JSON"):
        read(tmp_path / "broken.json")
    with pytest.raises(InputError, match=r"gone\.json: no such file"):
        read(tmp_path / "gone.json")


@pytest.mark.parametrize(
    "content",
    [
        [{"image_id": "test/a_0_5.mp4", "caption": "a man"}, {"image_id": "b.c", "caption": "a dog"}],
        {
            "annotations": [{"image_id": "/x/a_0_5.MP4", "caption": "a man"}, {"image_id": "b.c", "caption": "a dog"}],
            "type": 1,
        },
        {"a_0_5": "a man", "b.c": ["a dog"]},
    ],
)
def test_captions_come_by_clip_whatever_the_shape(content: object) -> None:
    assert captions_by_clip(content, "p.json") == {"a_0_5": ["a man"], "b.c": ["a dog"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image_id": "a", "caption": "x"}, {"image_id": "b"}], "p.json: entry 1 is"),
        ({"annotations": [3]}, "p.json: annotations: entry 0"),
        ({"a": 3}, "p.json: a has no caption"),
        ("text", "p.json: a str;"),
    ],
)
def test_what_is_no_caption_is_named(content: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        captions_by_clip(content, "p.json")


def test_ids_lose_their_folder_and_a_video_extension_only() -> None:
    assert [clip_id(key) for key in ("a.b", "x\\a.webm", "val/-05w_1_2.mp4", "")] == ["a.b", "a", "-05w_1_2", ""]
