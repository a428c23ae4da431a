from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import models
from models.family import Facts, InputError
from tasks import bundle, command, predict, storage
from tasks.data import audio, audio_store, frame_store, index, loader, video
from tasks.predict import Predictor, media_files, readable, table

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, write_bundle: Write) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "finetune")


@pytest.fixture(scope="module")
def predictor(trained: Path) -> Predictor:
    return Predictor(bundle.load(trained))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, write_clip: Write) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "a.mp4", 300)
    write_clip(folder / "b.mp4", 3000)
    write_clip(folder / "below" / "mute.mp4", 900, sound=False)
    (folder / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:700])
    (folder / "notes.txt").write_text("no clip")
    return folder


def test_a_given_sound_is_heard_in_place_of_the_videos_own(
    trained: Path, clips: Path, tmp_path: Path, write_clip: Write
) -> None:
    """The tone of b.mp4 as an mp3 called a: the answer for a.mp4 is no longer its own, and a clip without one is named."""
    predictor = Predictor(bundle.load(trained))
    own = predictor.answers([clips / "a.mp4"])[0]
    tone = video.read_clip(clips / "b.mp4", predictor.preparation).wave
    assert tone is not None
    (tmp_path / "a.mp3").write_bytes(audio.encode(tone, 16000, "mp3"))
    predictor.sounds = tmp_path
    given, missing = predictor.answers([clips / "a.mp4", clips / "b.mp4"])
    assert given["label"] and given != own
    assert missing["error"] == f"no sound {tmp_path / 'b.mp3'}"


def write_bundle_of_classes(folder: Path, num_classes: int) -> None:
    """A bundle like `trained` that knows more sounds than are answered by default."""
    phase, facts = models.load("t3av").phases["finetune"], Facts({"label": list("abcdefghi")[:num_classes]}, -5.0, 4.0)
    torch.manual_seed(0)
    stores = {"num_frames": 8, "short_side": 32, "quality": 95, "sample_rate": 16000, "codec": "pcm16"}
    meta = {
        "family": "t3av", "phase": "finetune", "config": asdict(phase.tiny), "facts": asdict(facts),
        "stores": stores | {"shards": 1, "workers": 1, "max_quarantine": 0.05}, "dataset": "sounds",
    }  # fmt: skip
    bundle.save(folder, phase.build(phase.tiny, facts).state_dict(), meta, [])


def test_answers_equal_those_on_the_stored_clip(
    predictor: Predictor, trained: Path, clips: Path, tmp_path: Path
) -> None:
    """The same clip through the stores and the loader of training, and straight from its file: equal to the bit."""
    loaded = bundle.load(trained)
    stored = video.read_clip(clips / "a.mp4", predictor.preparation)
    assert stored.wave is not None
    frame_store.write_frames(tmp_path / "frames-00000-of-00001.tsv", [("a", stored.width, stored.height, stored.jpegs)])
    audio_store.write_audio(tmp_path / "audio-00000-of-00001.h5", [("a", stored.wave)], 16000, "pcm16")
    row = {"id": "a", "split": "test", "has_video": True, "has_audio": True, "annotation": "{}"}
    row |= {"shard": 0, "row": 0, "audio_row": 0, "num_frames": 8}
    index.write(pd.DataFrame([row]), tmp_path, "")
    phase = models.load("t3av").phases["finetune"]
    transform = phase.transform(loaded.config, loaded.facts, False)
    dataset = loader.ClipDataset(
        index.read(tmp_path),
        frame_store.FrameStore(tmp_path),
        audio_store.AudioStore(tmp_path),
        phase.clip(loaded.config),
        transform,
        0,
    )
    sample = dataset[(0, 0)]
    with torch.inference_mode():
        logits = loaded.module()({key: value[None] for key, value in sample.items()})["logits"]
    probabilities = logits.softmax(-1)[0].numpy()
    (answer,) = predictor.predict([clips / "a.mp4"])
    assert answer["score"] == probabilities.max()
    assert answer["label"] == loaded.facts.labels["label"][int(probabilities.argmax())]


def test_bytes_and_company_change_nothing(predictor: Predictor, clips: Path) -> None:
    paths = [clips / "a.mp4", clips / "b.mp4", clips / "below" / "mute.mp4"]
    together = predictor.predict(paths * 4)
    for path, answer in zip(paths * 4, together, strict=True):
        for alone in predictor.predict([path]) + predictor.predict([path.read_bytes()]):
            assert alone["label"] == answer["label"]
            np.testing.assert_allclose(alone["score"], answer["score"], atol=1e-6)


def test_a_clip_without_sound_counts_as_such(predictor: Predictor, clips: Path) -> None:
    sample = predictor._read(clips / "below" / "mute.mp4")
    assert not isinstance(sample, str)
    assert sample.wave is None
    assert sample.frames is not None
    assert not predictor.transform(sample)["has_audio"]
    assert "label" in predictor.predict([clips / "below" / "mute.mp4"])[0]


def test_top_cuts_the_answers(predictor: Predictor, clips: Path) -> None:
    (answer,) = predictor.predict([clips / "a.mp4"], top=2)
    assert len(answer["top"]) == 2
    assert answer["top"][0] == [answer["label"], answer["score"]]


def test_top_may_ask_for_every_class(clips: Path, tmp_path: Path) -> None:
    write_bundle_of_classes(tmp_path / "finetune", 9)
    wide = Predictor(bundle.load(tmp_path / "finetune"))
    (answer,) = wide.predict([clips / "a.mp4"], top=8)
    names, scores = zip(*answer["top"], strict=True)
    assert len(set(names)) == 8
    assert list(scores) == sorted(scores, reverse=True)
    (everything,) = wide.predict([clips / "a.mp4"], top=100)
    assert everything["top"][:8] == answer["top"]
    assert sum(score for _, score in everything["top"]) == pytest.approx(1, abs=1e-5)
    (short,) = wide.predict([clips / "a.mp4"])
    assert short["top"] == answer["top"][:5]


@pytest.mark.parametrize("top", [0, -1])
def test_top_below_one_is_refused(predictor: Predictor, clips: Path, top: int) -> None:
    with pytest.raises(InputError, match="1 answer or more"):
        predictor.predict([clips / "a.mp4"], top=top)


def test_a_broken_clip_has_its_reason_and_the_others_their_answers(predictor: Predictor, clips: Path) -> None:
    first, second, third = predictor.predict([clips / "broken.mp4", clips / "a.mp4", clips / "absent.mp4"])
    assert set(first) == {"error"}
    assert second["label"]
    assert third == {"error": "no such file"}


def test_videos_and_prepared_clips_are_not_taken_for_each_other(
    predictor: Predictor, trained: Path, clips: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.pt").write_bytes(b"")
    assert predictor.predict([tmp_path / "x.pt"]) == [{"error": "the model was trained on videos; give a video"}]
    loaded = bundle.load(trained)
    other = Predictor(replace(loaded, meta={**loaded.meta, "prepared": True}))
    refused = "the model was trained on clips prepared elsewhere; give the path of such a .pt"
    assert [answer["error"] for answer in other.predict([clips / "a.mp4", b"bytes", tmp_path / "x.pt"])] == [
        refused,
        refused,
        "empty: x.pt has no bytes",
    ]
    assert media_files([tmp_path], other.suffixes) == [tmp_path / "x.pt"]


def test_a_phase_without_answers_is_refused(write_bundle: Write, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="later phase"):
        Predictor(bundle.load(write_bundle(tmp_path / "pretrain", "pretrain")))


def test_folders_are_searched(clips: Path, tmp_path: Path) -> None:
    assert [p.name for p in media_files([clips])] == ["a.mp4", "b.mp4", "mute.mp4", "broken.mp4"]
    with pytest.raises(InputError, match="no video files"):
        media_files([tmp_path])


def test_one_readable_line() -> None:
    answer = {"label": "rain", "score": 0.91234, "top": [["rain", 0.91234], ["dog barking", 0.05]]}
    assert readable(answer) == "label rain, score 0.912, top: rain 0.912; dog barking 0.05"


def test_table_of_answers() -> None:
    frame = table([{"label": "rain", "score": 0.9, "top": [["rain", 0.9]]}, {"error": "no such file"}])
    assert frame.columns.tolist() == ["label", "score", "error", "answer"]
    assert frame["error"].tolist() == ["", "no such file"]
    assert json.loads(frame["answer"][0])["top"] == [["rain", 0.9]]


def test_command(
    trained: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    storage.link_or_copy(trained / "bundle.json", tmp_path / "artifacts" / "t3av" / "finetune" / "bundle.json")
    storage.link_or_copy(trained / "weights.safetensors", tmp_path / "artifacts/t3av/finetune/weights.safetensors")
    monkeypatch.setattr(sys, "argv", ["predict", "t3av", str(clips), "--top", "1", "--json", "out.json"])
    with pytest.raises(SystemExit) as stopped:
        command.run(predict.main)
    assert stopped.value.code == 1  # one clip of four is broken
    shown = capsys.readouterr()
    assert [line.split(": ")[0] for line in shown.out.splitlines()] == list(map(str, media_files([clips])))
    assert "1 of 4 clips could not be read" in shown.err
    written = json.loads((tmp_path / "out.json").read_text())
    assert [Path(answer["clip"]).name for answer in written] == ["a.mp4", "b.mp4", "mute.mp4", "broken.mp4"]
    assert len(written[0]["top"]) == 1


def test_absent_model_is_one_line(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="artifacts/t3av/finetune"):
        predict.load_predictor("t3av", "artifacts/t3av/finetune")
