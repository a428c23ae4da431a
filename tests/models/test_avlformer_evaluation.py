"""avlformer's report on captions made by hand, and the shares of attention that each word is explained by."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from models import caption_scores
from models.avlformer import answers, data
from models.avlformer.bert import Context, Layer
from models.avlformer.config import num_audio_tokens
from models.avlformer.evaluation import CaptionMetrics, cider, evaluate
from models.avlformer.explain import attention, explain
from models.avlformer.model import Finetune, tiny
from models.family import ClipInfo, Facts, InputError, Results
from models.meteor import meteor
from models.metrics import bootstrap

WHO, DOES, SOUND = ["a man", "two dogs", "an old woman"], ["runs", "sits in the sun", "plays"], ["rain", "a drum"]
NUM, WIDTH = 12, 24


def caption(clip: int) -> str:
    """Two sentences, three for every fourth clip; the last one tells what is heard."""
    middle = " it is dark." if clip % 4 == 3 else ""
    return f"{WHO[clip % 3]} {DOES[clip // 3 % 3]}.{middle} {SOUND[clip % 2]} is heard."


TRAIN = [*(caption(clip) for clip in range(0, NUM, 2)), "a cat sleeps on a sofa. nothing is heard.", "a man runs."]
FACTS = Facts(data.labels([{"caption": text} for text in [*TRAIN, *(caption(i) for i in range(NUM))]], []), 0.0, 1.0)
NAMES = FACTS.labels["wordpiece"]


def tokens(text: str) -> list[int]:
    """As `write` returns them."""
    ids, _ = data.read_caption(data.build_tokenizer(FACTS), text, WIDTH)
    return [*ids, *[0] * (WIDTH - len(ids))]


@dataclass
class FakeRun:
    """Clips that are told rightly but for those in `wrong`, worse without sound; the clips in `silent` have none."""

    wrong: dict[int, str] = field(default_factory=dict)
    silent: tuple[int, ...] = ()
    told: dict[int, dict[str, Any]] = field(default_factory=dict)  # annotations of single clips
    lost: int = -1  # a clip whose confidence is NaN
    judged: dict[str, np.ndarray] = field(default_factory=dict)
    facts: Facts = FACTS
    config: Any = None
    trained: tuple[str, ...] = ("finetune",)
    num_bootstrap: int = 60
    seed: int = 3
    asked: list[tuple[str, list[str]]] = field(default_factory=list)

    def clips(self, split: str) -> list[ClipInfo]:
        if split == "train":
            return [ClipInfo(f"train{i:02}", f"t{i}", {"caption": text}) for i, text in enumerate(TRAIN)]
        own = [self.told.get(i, {"caption": caption(i)}) for i in range(NUM)]
        return [ClipInfo(f"test{i:02}", f"g{i // 2}", annotation) for i, annotation in enumerate(own)]

    def predict(self, phase: str, split: str, drop: str = "", untrained: bool = False) -> dict[str, np.ndarray]:
        assert (phase, split, untrained) == ("finetune", "test", False)
        texts = [self.wrong.get(i, caption(i)) for i in range(NUM)]
        if drop == "audio":
            texts = [text.rsplit(". ", 1)[0] + ". nothing is heard." for text in texts]
        if drop == "video":
            texts = ["a man runs. rain is heard."] * NUM
        confidence = np.linspace(0.5, 0.9, NUM).astype(np.float32)
        confidence[self.lost : self.lost + 1 or None] = np.nan if self.lost >= 0 else confidence[-1]
        return {
            "tokens": np.array([tokens(text) for text in texts]), "confidence": confidence,
            "has_sound": np.array([i not in self.silent and drop != "audio" for i in range(NUM)]),
        }  # fmt: skip

    def explain(self, phase: str, split: str, rows: Any) -> dict[str, np.ndarray]:
        own = np.array([tokens(self.wrong.get(row, caption(row)))[1:] for row in rows], dtype=np.float32)
        shares = np.array(rows, dtype=np.float32)[:, None, None] / 100 * (own > 0)[:, :, None]
        return {"tokens": own, "video_attention": shares.repeat(2, 2), "audio_attention": shares.repeat(3, 2)}

    def judge(self, split: str, captions: Any, references: Any) -> dict[str, np.ndarray]:
        self.asked.append((split, list(captions)))
        return self.judged


def run(**changes: Any) -> Any:
    return FakeRun(**changes)


MISTAKES = {
    0: "a man runs. a drum is heard.",
    5: "an old woman plays. rain is heard.",
    7: "two dogs plays. rain is heard.",
}


@pytest.fixture(scope="module")
def results() -> Results:
    return evaluate(run(wrong=MISTAKES, silent=(0, 2)))


# --- numbers ---------------------------------------------------------------------------------------------------------------


def test_a_perfect_model() -> None:
    m = evaluate(run()).metrics
    texts = [caption(i) for i in range(NUM)]
    assert m["cider_d"] == pytest.approx(caption_scores.cider_d(texts, [[text] for text in texts]).mean())
    assert [m[name] for name in ("bleu_1", "bleu_4", "rouge_l", "heard", "heard_low")] == pytest.approx([1] * 5)
    assert m["num_clips"] == NUM
    assert m["audio_heard"] < m["heard"] and m["video_heard"] == 0, "named by what is left"
    assert all(np.isfinite(value) for value in m.values())


def test_mistakes_count(results: Results) -> None:
    m, texts = results.metrics, [MISTAKES.get(i, caption(i)) for i in range(NUM)]
    references = [[caption(i)] for i in range(NUM)]
    assert m["cider_d"] == pytest.approx(caption_scores.cider_d(texts, references).mean())
    assert m["bleu_4"] == pytest.approx(caption_scores.bleu(texts, references).corpus()[3])
    assert m["rouge_l"] == pytest.approx(caption_scores.rouge_l(texts, references).mean())
    assert m["meteor"] == pytest.approx(meteor(texts, references).corpus())
    for name in ("cider_d", "bleu_1", "bleu_4", "meteor", "rouge_l", "heard"):
        assert m[f"{name}_low"] <= m[name] <= m[f"{name}_high"]
        assert m[f"video_{name}"] < m[name], "without sound"


def test_the_last_sentence_counts_for_clips_with_sound_alone(results: Results) -> None:
    assert results.metrics["heard"] == pytest.approx(8 / 10), "of 12, clips 0 and 2 have none, and 5 and 7 are wrong"
    everything = evaluate(run(wrong=MISTAKES)).metrics
    assert everything["heard"] == pytest.approx(9 / 12)
    silent = evaluate(run(silent=tuple(range(NUM))))
    assert not [name for name in silent.metrics if "heard" in name]
    assert "Last sentence right" not in silent.tables["modalities"].frame["measure"].tolist()


def test_the_best_constant_by_trying_them_all(results: Results) -> None:
    references = [[caption(i)] for i in range(NUM)]
    tried = [float(caption_scores.cider_d([text] * NUM, references).mean()) for text in TRAIN]
    assert results.metrics["constant_cider_d"] == pytest.approx(max(tried))
    assert 0 < max(tried) < results.metrics["cider_d"]


def test_the_best_constant_has_words_that_no_reference_has() -> None:
    """Its own rare words count as they would alone, however many constants are tried."""
    told = {i: {"caption": "a man with a hat runs."} if i % 2 else {"caption": "two dogs play."} for i in range(NUM)}
    found = evaluate(run(told=told)).metrics["constant_cider_d"]
    references = [[told[i]["caption"]] for i in range(NUM)]
    assert found == pytest.approx(max(caption_scores.cider_d([text] * NUM, references).mean() for text in TRAIN))


def test_any_reference_will_do() -> None:
    told = {i: {"caption": "it is dark.", "captions": ["it is dark.", caption(i)]} for i in range(NUM)}
    m = evaluate(run(told=told)).metrics
    assert m["heard"] == m["rouge_l"] == 1


def test_judges_scores_are_means_over_whom_they_judged() -> None:
    scores = np.arange(NUM, dtype=np.float64)
    scores[3] = np.nan
    fake = run(wrong=MISTAKES, judged={"clip_score": scores, "nobody": np.full(NUM, np.nan)})
    found = evaluate(fake)
    assert found.metrics["clip_score"] == pytest.approx((66 - 3) / 11)
    assert "nobody" not in found.metrics
    assert fake.asked == [("test", [MISTAKES.get(i, caption(i)) for i in range(NUM)])]
    assert found.tables["predictions"].frame["clip_score"].tolist()[4] == 4


def test_headline_out_of_the_table_as_it_is_read_back(results: Results, tmp_path: Any) -> None:
    results.tables["predictions"].frame.to_csv(tmp_path / "predictions.csv", index=False, float_format="%.6g")
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert table.columns[:2].tolist() == ["clip", "group"]
    assert float(cider(table)(np.ones((1, NUM)))[0]) == pytest.approx(results.metrics["cider_d"], rel=1e-5)
    found = bootstrap(cider(table), table["group"].tolist(), 60, 3)
    assert found == pytest.approx((results.metrics["cider_d_low"], results.metrics["cider_d_high"]), rel=1e-5)


def test_what_cannot_be_scored_is_named() -> None:
    with pytest.raises(InputError, match="clip test07 with NaN"):
        evaluate(run(lost=7))
    for told in ({}, {"caption": ""}, {"caption": "a", "captions": ["a", ""]}):
        with pytest.raises(InputError, match="clip test04 of the test split has no caption"):
            evaluate(run(told={4: told}))


def test_metric_of_the_validation_is_that_of_the_report() -> None:
    whole, metric = evaluate(run(wrong=MISTAKES)).metrics, CaptionMetrics(FACTS)
    told = {key: torch.from_numpy(value) for key, value in run(wrong=MISTAKES).predict("finetune", "test").items()}
    text = torch.tensor([tokens(caption(i)) for i in range(NUM)])
    for rows in torch.arange(NUM).split(5):
        metric.update({"tokens": told["tokens"][rows]}, {"text": text[rows]})
    assert metric.compute() == pytest.approx({name: whole[name] for name in ("cider_d", "bleu_4", "rouge_l", "heard")})


# --- tables ----------------------------------------------------------------------------------------------------------------


def test_the_table_of_modalities(results: Results) -> None:
    frame = results.tables["modalities"].frame.set_index("measure")
    m = results.metrics
    assert frame.T["CIDEr-D"].tolist() == [m["cider_d"], m["audio_cider_d"], m["video_cider_d"]]
    assert frame.columns.tolist() == ["both", "audio only", "video only"]


def test_the_table_of_sentences(results: Results) -> None:
    frame = results.tables["sentences"].frame
    # Wrong: both sentences of 0 and 5 but the first one, "two dogs plays" and its lost second one of 7.
    assert frame["sentence"].tolist() == [1, 2, 3]
    assert frame["clips"].tolist() == [12, 12, 3]
    first, second = [MISTAKES[i].split(". ")[0] == caption(i).split(". ")[0] for i in MISTAKES], [False] * 3
    assert frame["right"].tolist() == pytest.approx([(9 + sum(first)) / 12, (9 + sum(second)) / 12, 2 / 3])


def test_the_table_of_lengths(results: Results) -> None:
    frame = results.tables["lengths"].frame
    lengths = [len(caption(i).replace(".", "").split()) for i in range(NUM)]
    written = [len(MISTAKES.get(i, caption(i)).replace(".", "").split()) for i in range(NUM)]
    scores = results.tables["predictions"].frame["cider_d"]
    assert frame["clips"].sum() == NUM
    ends = -1
    for row in frame.to_dict("records"):
        low, _, high = str(row["words of the reference"]).partition(" to ")
        assert ends < int(low) <= int(high or low)
        ends = int(high or low)
        inside = [i for i in range(NUM) if int(low) <= lengths[i] <= ends]
        assert row["clips"] == len(inside)
        assert row["words written"] == pytest.approx(np.mean([written[i] for i in inside]))
        assert row["CIDEr-D"] == pytest.approx(np.mean([scores[i] for i in inside]))


def test_references_of_one_length_are_one_row() -> None:
    frame = evaluate(run(told={i: {"caption": "a man runs."} for i in range(NUM)})).tables["lengths"].frame
    assert frame[["words of the reference", "clips"]].to_numpy().tolist() == [["3", NUM]]


def test_every_clip_is_in_the_table_of_predictions(results: Results) -> None:
    frame = results.tables["predictions"].frame
    assert frame["answer"].tolist() == [MISTAKES.get(i, caption(i)) for i in range(NUM)]
    assert frame["truth"].tolist() == [caption(i) for i in range(NUM)]
    assert frame["confidence"].tolist() == pytest.approx(np.linspace(0.5, 0.9, NUM))
    assert (frame["cider_d"].idxmax() not in MISTAKES) and (frame.loc[list(MISTAKES), "rouge_l"] < 1).all()


def test_examples_and_what_their_words_were_taken_from(results: Results) -> None:
    by_clip = {example.clip: example for example in results.examples}
    assert set(by_clip) == {f"test{i:02}" for i in range(NUM)}
    wrong = by_clip["test05"]
    assert (wrong.truth, wrong.predictions[0][0]) == (caption(5), MISTAKES[5])
    assert wrong.attention is not None
    assert wrong.attention.words == MISTAKES[5].replace(".", " .").split()
    assert wrong.attention.video.shape == (9, 2) and wrong.attention.audio.shape == (9, 3)
    assert wrong.attention.video == pytest.approx(0.05), "the rows that were asked for"


# --- files -----------------------------------------------------------------------------------------------------------------


def test_files_are_what_the_originals_readers_want(results: Results) -> None:
    rows = json.loads(results.files["prediction_coco_fmt.json"])
    assert [row["image_id"] for row in rows] == [f"test{i:02}" for i in range(NUM)], "a list, as EntityScore reads it"
    assert [row["caption"] for row in rows] == [MISTAKES.get(i, caption(i)) for i in range(NUM)]
    assert rows[0]["conf"] == pytest.approx(0.5)
    told = answers.by_id({"ä": {"caption": "ein Mann.", "confidence": 0.5}}, FACTS)
    assert json.loads(told["prediction.json"]) == {"ä": "ein Mann."}, "a dict, as AudioScore reads it"
    assert "ä" in told["prediction.json"]


def test_answers_are_text_and_confidence() -> None:
    predictions = {"tokens": torch.tensor([tokens("a man runs. it is dark.")]), "confidence": torch.tensor([0.25])}
    assert answers.present(predictions, FACTS) == [{"caption": "a man runs. it is dark.", "confidence": 0.25}]
    assert answers.sentences("a man runs. it is dark.  is it? ") == ["a man runs.", "it is dark.", "is it?"]
    assert answers.sentences("") == []


# --- attention -------------------------------------------------------------------------------------------------------------


def toy(**changes: Any) -> tuple[Finetune, dict[str, torch.Tensor]]:
    """A module of four frames and patches of sound in 2 x 4, of which it reads 2 x 3, and two clips, the second a silent one."""
    torch.manual_seed(0)
    own = tiny()
    video, audio = replace(own.model.video, num_frames=4), replace(own.model.audio, seconds=0.5, patchout_time=1)
    module = Finetune(replace(own, model=replace(own.model, video=video, audio=audio, **changes)), FACTS).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    batch = {
        "frames": torch.randint(0, 256, (2, 4, 3, 32, 32)).byte(), "wave": 0.1 * torch.randn(2, 8000),
        "wave_length": torch.tensor([8000, 0]), "has_video": torch.tensor([True, True]),
        "has_audio": torch.tensor([True, False]), "rows": torch.arange(2).expand(2, -1),
        "columns": torch.tensor([[0, 1, 3], [0, 1, 3]]),
    }  # fmt: skip
    return module, batch


def test_shares_of_attention_are_shares() -> None:
    module, batch = toy()
    seen = explain(module, batch)
    video, audio = seen["video_attention"], seen["audio_attention"]
    assert video.shape[2] == 2 and audio.shape[2] == 4
    assert (video >= 0).all() and (audio >= 0).all()
    total = video.sum(2) + audio.sum(2)
    assert total.max() < 1, "some of it goes to words, and to the [MASK] itself"
    written = seen["tokens"] > 0
    assert (total[written] > 0).all() and (total[~written] == 0).all()
    assert audio[1].max() == 0 and audio[0, :, 2].max() == 0, "no sound; a column that was not read"


def test_attention_that_takes_all_alike_is_counted() -> None:
    module, batch = toy()
    for part in module.bert.layers:
        for linear in (cast(Layer, part).query, cast(Layer, part).key):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    seen = explain(module, batch)
    for clip, number in enumerate((32 + num_audio_tokens(module.config.model.audio), 32)):
        for place in range(int((seen["tokens"][clip] > 0).sum())):
            all_ = number + place + 2  # [CLS] and the words before it, and the [MASK]
            assert seen["video_attention"][clip, place].tolist() == pytest.approx([16 / all_] * 2)
            expected = [0.0] * 4 if clip else [2 / all_, 2 / all_, 0, 2 / all_]
            assert seen["audio_attention"][clip, place].tolist() == pytest.approx(expected)


def test_attention_that_is_forced_to_one_feature_is_found_there() -> None:
    module, batch = toy()
    context = module.context(batch)
    for depth, part in enumerate(module.bert.layers):
        layer = cast(Layer, part)
        for linear in (layer.query, layer.key):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.constant_(layer.query.bias, 10.0)
        keys = torch.zeros_like(context.keys[depth])
        keys[0, :, 20], keys[1, :, 3] = 10.0, 10.0
        context = Context([*context.keys[:depth], keys, *context.keys[depth + 1 :]], context.values, context.present)
    words = torch.randn(2, 3, module.config.model.text.hidden_size)
    shares = attention(module.bert, words, torch.eye(3, dtype=torch.bool).expand(2, -1, -1), context)
    assert shares[0, :, 20].tolist() + shares[1, :, 3].tolist() == pytest.approx([1] * 6)
