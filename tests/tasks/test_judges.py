"""Judges with small models of transformers in folders as it writes them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from models.caption_judges import audio_score, legacy_audio_score
from models.family import InputError
from models.passt import PaSST
from models.trilip import TriLip
from tasks import judges, storage
from tasks.data import audio_store
from tasks.data.prepared_store import open_stores
from tasks.judges import LEFT_OUT, NONE, Ear, Judged, Judges, MediaJudge, Weights, clip_pixels, entity_scores, read_t5
from tasks.judges import PASST as PUBLISHED
from tests.tasks import toy_evaluation

CPU = torch.device("cpu")
NOTHING = Weights(clip=NONE, trilip=NONE, t5=NONE, spice=NONE)
VOCABULARY = ["<pad>", "<unk>", "<s>", "</s>", "a", "man", "dog", "the", "crowd", "is", "loud", "depicts", "photo", "."]
END = VOCABULARY.index("</s>")


def published(net: PaSST) -> dict[str, Tensor]:
    """PaSST's tensors as they are published."""
    own = net.state_dict()
    first, second = own.pop("tokens")
    found = {"cls_token": first[None, None], "dist_token": second[None, None], "new_pos_embed": own.pop("places")[None]}
    found["time_new_pos_embed"] = own.pop("time").T[None, :, None, :]
    found["freq_new_pos_embed"] = own.pop("pitch").T[None, :, :, None]
    found["patch_embed.proj.weight"] = own.pop("patch.weight").unflatten(1, (1, 16, 16))
    found["patch_embed.proj.bias"] = own.pop("patch.bias")
    found |= {key.replace(".fc", ".mlp.fc"): value for key, value in own.items()}
    return found | {"head.0.weight": torch.ones(3), "head_dist.bias": torch.ones(3)}


@pytest.fixture(scope="module", autouse=True)
def small_passt():
    """3 x 5 patches, of which 2 x 3 are read."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"num_mel_bins": 36, "num_frames": 60, "hidden_size": 10, "num_layers": 1, "num_heads": 2, "stride": 10}
        patch.setattr(judges, "PASST", sizes)
        patch.setattr(judges, "LEFT_OUT", (1, 2))
        yield


def write_tokenizer(folder: Path, start: str) -> None:
    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A </s>".strip(), special_tokens=[("<s>", 2), ("</s>", END)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPModel]:
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(VOCABULARY), "max_position_embeddings": 8, "eos_token_id": END, "bos_token_id": 2}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=512)).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder, "<s>")
    return folder, model


@pytest.fixture(scope="module")
def trilip(clip: tuple[Path, CLIPModel], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TriLip]:
    """A file of the published layout, and the module that it was written from."""
    ear = Ear()
    judge = TriLip(clip[1], ear, 10).eval()
    state = {"vl_model.visual.proj": clip[1].visual_projection.weight.detach().T.half().clone()}
    state |= {f"a_model.net.{key}": value for key, value in published(ear.net).items()}
    state |= {f"a_model.linear.{key}": value for key, value in judge.audio_projection.state_dict().items()}
    state |= {"logit_scale1": judge.scales.detach()[0].clone(), "logit_scale2": judge.scales.detach()[1].clone()}
    for name, head in (("vis", judge.image_head), ("txt", judge.text_head), ("aud", judge.audio_head)):
        for old, new in (("w_1", head.wide), ("w_2", head.narrow), ("layer_norm", head.norm)):
            state |= {f"{name}_scaler.{old}.{key}": value for key, value in new.state_dict().items()}
    path = tmp_path_factory.mktemp("trilip") / "TriLip.bin"
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path)
    return path, judge


def clips() -> list[Judged]:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 3, 24, 32, 3), dtype=np.uint8)
    wave = rng.normal(size=9_000).astype(np.float32) * 0.1
    return [
        Judged(frames[0], wave, "a man . the dog is a dog . the crowd is loud . "),
        Judged(frames[1], None, "a dog"),
        Judged(None, wave, "a dog"),
    ]


def ids(text: str, longest: int) -> Tensor:
    words = [VOCABULARY.index(word) if word in VOCABULARY else 1 for word in text.split()]
    return torch.tensor([[2, *words[: longest - 2], END]])


def test_without_weights_nobody_judges() -> None:
    assert Judges(NOTHING, "cpu").judge("nowhere", {"x": "a dog"}, {"x": ["a dog"]}) == {}


def test_passt_has_its_published_sizes() -> None:
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(judges, "PASST", PUBLISHED)
        patch.setattr(judges, "LEFT_OUT", LEFT_OUT)
        ear = Ear()
        assert ear(torch.empty(1, 5)).shape == ear(torch.empty(1, 400_000)).shape == (1, 473, 768)
        assert [len(places) for places in ear.patches] == [8, 59]


def test_a_short_sound_ends_in_silence_and_a_long_one_is_cut() -> None:
    ear, wave = Ear().eval(), torch.randn(1, 30_000) * 0.1
    length = 60 * 320
    torch.testing.assert_close(ear(wave), ear(wave[:, :length]))
    torch.testing.assert_close(ear(wave[:, :100]), ear(functional.pad(wave[:, :100], (0, length - 100))))


def test_clip_score_is_the_mean_over_frames_of_a_caption_cut_to_length(clip: tuple[Path, CLIPModel]) -> None:
    found = MediaJudge(str(clip[0]), NONE).judge(clips(), CPU)
    assert list(found) == ["clip_score"]
    expected = []
    with torch.inference_mode():
        for one in clips()[:2]:
            pixels = clip_pixels(torch.from_numpy(one.frames), 16)
            image = clip[1].get_image_features(pixel_values=pixels).pooler_output
            text = clip[1].get_text_features(input_ids=ids(f"A photo depicts {one.caption}", 8)).pooler_output
            expected.append(float(2.5 * functional.cosine_similarity(image, text).clamp(min=0).mean()))
    assert found["clip_score"][:2] == pytest.approx(expected, rel=1e-5)
    assert np.isnan(found["clip_score"][2]), "a clip without pictures"
    assert any(expected)


def test_audio_score_reads_the_last_sentence_and_legacy_the_first_frame(clip, trilip) -> None:
    found = MediaJudge(str(clip[0]), str(trilip[0])).judge(clips(), CPU)
    one, judge = clips()[0], trilip[1]
    tokens = ids("the crowd is loud .", 8)
    with torch.inference_mode():
        image = judge.embed_image(clip_pixels(torch.from_numpy(one.frames), 16))
        text, audio = (
            judge.embed_text(tokens, torch.ones_like(tokens)),
            judge.embed_audio(torch.from_numpy(one.wave)[None]),
        )
        each = [float(audio_score(row, text[0], audio[0])) for row in image]
        legacy = float(legacy_audio_score(image[0], text[0], audio[0], judge.scales))
    assert found["audio_score"][0] == pytest.approx(sum(each) / 3, rel=1e-5)
    assert found["audio_score_legacy"][0] == pytest.approx(legacy, rel=1e-4)
    assert np.isnan([found[name][1:] for name in ("audio_score", "audio_score_legacy")]).all()


@pytest.mark.parametrize("shape", [(24, 32), (40, 20), (16, 16)])
def test_pixels_are_those_of_clips_own_processor(shape: tuple[int, int]) -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8))
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    expected = processor(list(frames.permute(0, 3, 1, 2)), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(clip_pixels(frames, 16), expected, atol=1e-5, rtol=0)


def test_what_does_not_fit_is_told(clip, trilip, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evaluate\.judges\.trilip needs evaluate\.judges\.clip"):
        Judges(dataclasses.replace(NOTHING, trilip="x.bin"), "cpu")
    state = torch.load(trilip[0], weights_only=True)["model"]
    state["module.vl_model.visual.proj"] = state["module.vl_model.visual.proj"] + 1
    torch.save({"model": state}, tmp_path / "TriLip.bin")
    weights = dataclasses.replace(NOTHING, clip=str(clip[0]), trilip=str(tmp_path / "TriLip.bin"))
    with pytest.raises(InputError, match=r"TriLip\.bin: it belongs to another CLIP"):
        Judges(weights, "cpu")
    (tmp_path / "model.safetensors").write_bytes((clip[0] / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="its config or tokenizer cannot be read"):
        Judges(dataclasses.replace(NOTHING, clip=str(tmp_path)), "cpu")


def test_t5_tells_how_alike_entities_are(tmp_path: Path, clip) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": len(VOCABULARY)}
    whole = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    whole.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, "")
    captions, truths = ["a man", "a man . the dog", "it is"], [["a man"], ["the crowd . a man"], ["a man"]]
    found = entity_scores(*read_t5(str(tmp_path)), captions, truths, CPU)
    encoder = T5EncoderModel.from_pretrained(tmp_path).eval()
    man, dog, crowd = (VOCABULARY.index(word) for word in ("man", "dog", "crowd"))
    with torch.inference_mode():
        own, other = (
            encoder(torch.tensor([row])).last_hidden_state.mean(1) for row in ([man, dog, END], [crowd, man, END])
        )
        alike = (float(functional.cosine_similarity(own, other)) + 1) / 2
    assert found["entity_score"][:2] == pytest.approx([1, 2 * 0.5 * alike / (0.5 + alike)], rel=1e-5)
    assert found["entity_score_legacy"][0] == pytest.approx(2 * 1.0001 / 2.0001, rel=1e-5)
    assert np.isnan([found["entity_score"][2], found["entity_score_legacy"][2]]).all()
    with pytest.raises(InputError, match="the config of a clip; a t5 was expected"):
        read_t5(str(clip[0]))
    (tmp_path / "config.json").write_text(
        json.dumps(T5Config(**{**sizes, "d_model": 24}).to_dict() | {"model_type": "t5"})
    )
    with pytest.raises(InputError, match="another architecture"):
        read_t5(str(tmp_path))


# --- out of the stores -----------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(toy_evaluation, "RATE", 32000)
    toy_evaluation.write_project(tmp_path, silent=["test_01"], blind=["test_02"])
    monkeypatch.setattr(storage, "DATA", tmp_path / "data")
    return tmp_path


CAPTIONS = {"test_02": "a dog", "test_00": "a man", "test_01": "the crowd is loud"}
TRUTHS = {clip: ["a man"] for clip in CAPTIONS}


def test_clips_come_from_the_stores_in_the_order_of_the_captions(project: Path, clip, trilip) -> None:
    weights = dataclasses.replace(NOTHING, clip=str(clip[0]), trilip=str(trilip[0]))
    found = Judges(weights, "cpu").judge("sounds", CAPTIONS, TRUTHS)
    pictures, sounds = open_stores(project / "data/sounds/stores")
    one = Judged(pictures.decode("test_00", [0, 1, 2]), sounds.read("test_00")[0], "a man")
    alone = MediaJudge(str(clip[0]), str(trilip[0])).judge([one], CPU)
    assert list(found) == ["clip_score", "audio_score", "audio_score_legacy"]
    for name, values in found.items():
        assert values[1] == pytest.approx(alone[name][0], rel=1e-5)
        assert np.isnan(values[0]), "test_02 has no pictures"
    assert np.isfinite(found["clip_score"][2]) and np.isnan(found["audio_score"][2])


def test_another_rate_is_told_with_the_key_to_change(project: Path, clip, trilip) -> None:
    stores = project / "data/sounds/stores"
    shard = audio_store.AudioShard(stores / "audio-00000-of-00001.h5")
    rows = [(name, shard.stored(number)[0]) for number, name in enumerate(shard.names())]
    shard.open().close()
    audio_store.write_audio(stores / "audio-00000-of-00001.h5", rows, 16000, "pcm16")
    weights = dataclasses.replace(NOTHING, clip=str(clip[0]))
    assert Judges(weights, "cpu").judge("sounds", CAPTIONS, TRUTHS), "CLIP hears nothing"
    weights = dataclasses.replace(weights, trilip=str(trilip[0]))
    with pytest.raises(
        InputError, match=r"stored at 16000 Hz and TriLip hears 32000 Hz; set stores\.sounds\.sample_rate"
    ):
        Judges(weights, "cpu").judge("sounds", CAPTIONS, TRUTHS)
