"""avlformer's weights: transformers' BERT, torchvision's Swins and a convolution judge what the layouts mean; strictness."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.swin_transformer import SwinTransformer
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from models.avlformer.bert import Bert, Context
from models.avlformer.config import ModelConfig
from models.avlformer.model import tiny
from models.avlformer.weights import load, names
from models.family import InputError
from tests.models.toy_avlformer_weights import (
    AUDIO,
    TEXT,
    VIDEO,
    VOCABULARY,
    State,
    build,
    every,
    expected_tokens,
    mmaction,
    passt,
    randomised,
    swin3d,
    transformers_bert,
)

# --- Video Swin ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["torchvision", "mmaction", "mmaction without prefix"])
def test_video_swin_answers_as_torchvisions(layout: str) -> None:
    peer, module, frames = swin3d(), build(), torch.randn(2, 8, 3, 32, 32)
    state = peer.state_dict()
    if layout != "torchvision":
        state = mmaction({key: v for key, v in state.items() if not key.startswith("head.")}, 0)
        state |= {"cls_head.fc_cls.weight": torch.zeros(4, 16)}
    if layout == "mmaction":
        state = {key if key.startswith("cls_") else f"backbone.{key}": value for key, value in state.items()}
    report = load(module, "video", state)
    with torch.no_grad():
        torch.testing.assert_close(module.video(frames), expected_tokens(peer, frames), rtol=1e-4, atol=1e-5)
    assert report.fresh == []
    assert len(report.loaded) == len(module.video.state_dict())
    assert len(report.dropped) == len(state) - len(report.loaded)
    assert all(re.search(r"head|relative_position_index", key) for key in report.dropped)


def swin2d(window: int = 4) -> tuple[SwinTransformer, State]:
    """A Swin for pictures of torchvision, and its state under the authors' names."""
    peer = randomised(SwinTransformer([4, 4], 8, [2, 2], [1, 2], [window, window], stochastic_depth_prob=0.0))
    state = peer.state_dict()
    stem = {"features.0.0.": "patch_embed.proj.", "features.0.2.": "patch_embed.norm."}
    found = {new + key.removeprefix(old): v for old, new in stem.items() for key, v in state.items() if old in key}
    found |= mmaction({key: value for key, value in state.items() if not key.startswith("features.0.")}, 1)
    return peer, found | {"layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}


def test_a_swin_for_pictures_sees_in_a_still_video_what_it_sees_in_the_picture() -> None:
    (peer, state), module, picture = swin2d(), build(), torch.randn(2, 3, 32, 32)
    report = load(module, "video", state)
    with torch.no_grad():
        found = module.video(picture[:, None].expand(-1, 8, -1, -1, -1)).unflatten(1, (4, 16))
        expected = peer.norm(peer.features(picture)).flatten(1, 2)
    torch.testing.assert_close(found, expected[:, None].expand(-1, 4, -1, -1), rtol=1e-4, atol=1e-5)
    assert "layers.0.blocks.1.attn_mask" in report.dropped


def test_biases_of_another_window_are_resized_and_last_in_time() -> None:
    (_, state), module = swin2d(window=3), build()
    load(module, "video", state)
    table = module.video.get_parameter("features.2.1.attn.relative_position_bias_table").detach()
    theirs = state["layers.1.blocks.1.attn.relative_position_bias_table"]
    grid = theirs.T.view(1, 2, 5, 5)
    expected = functional.interpolate(grid, (7, 7), mode="bicubic")[0].flatten(1).T
    torch.testing.assert_close(table.view(3, 49, 2), expected.expand(3, -1, -1))


# --- PaSST ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "net."])
def test_passts_patches_are_its_convolutions(prefix: str) -> None:
    module, state, spectrum = build(audio={"num_layers": 0}), passt(layers=0), torch.randn(2, 36, 60)
    report = load(module, "audio", {prefix + key: value for key, value in state.items()})
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = functional.conv2d(spectrum[:, None], weight, bias, stride=10)
    x = (x + state["time_new_pos_embed"] + state["freq_new_pos_embed"]).flatten(2).transpose(1, 2)
    second = (state["dist_token"] + state["new_pos_embed"][:, 1:]).expand(2, -1, -1)
    x = functional.layer_norm(torch.cat([second, x], 1), (8,), state["norm.weight"], state["norm.bias"], 1e-6)
    with torch.no_grad():
        torch.testing.assert_close(module.audio(spectrum, *every(module)), x, rtol=1e-4, atol=1e-5)
    assert report.dropped == sorted(prefix + key for key in state if key.startswith("head"))
    assert report.fresh == []


def test_passts_layers_keep_their_parts() -> None:
    module, state = build(), passt()
    load(module, "audio", state)
    for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        own = module.audio.get_parameter(f"blocks.0.{part.removeprefix('mlp.')}.weight")
        assert torch.equal(own, state[f"blocks.0.{part}.weight"])
    assert torch.equal(
        module.audio.tokens[0] + module.audio.places[0], state["cls_token"][0, 0] + state["new_pos_embed"][0, 0]
    )


def test_positions_of_longer_sounds_are_cut_and_shorter_ones_named() -> None:
    module, state = build(), passt(columns=9)
    load(module, "audio", state)
    assert torch.equal(module.audio.time, state["time_new_pos_embed"][0, :, 0, :5].T)
    with pytest.raises(InputError, match=r"time_new_pos_embed .* set avlformer.model.audio.seconds"):
        load(module, "audio", passt(columns=4))


# --- BERT ----------------------------------------------------------------------------------------------------------------


def bert_logits(bert: Bert, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states and logits where all words see one another and there are no features."""
    nothing = torch.zeros(len(ids), 2, 0, 8)
    context = Context([nothing] * 2, [nothing] * 2, torch.zeros(len(ids), 0, dtype=torch.bool))
    words = bert.embed(ids, torch.arange(ids.shape[1]).expand_as(ids))
    hidden = bert.write(words, torch.ones(len(ids), ids.shape[1], ids.shape[1], dtype=torch.bool), context)
    return hidden, bert.answer(hidden)


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForPreTraining])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_bert_answers_as_transformers(kind: type, tied: bool, old: bool) -> None:
    peer, module = transformers_bert(kind), build(text={"tie_weights": tied})
    state = peer.state_dict()
    if old:  # as Google's conversions are
        for theirs, name in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            state = {key.replace(theirs, name): value for key, value in state.items()}
    ids = torch.randint(0, VOCABULARY, (2, 7))
    report = load(module, "text", state)
    with torch.no_grad():
        found, answer = bert_logits(module.bert, ids)[1], peer(ids)
    expected = answer.logits if kind is BertForMaskedLM else answer.prediction_logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert report.fresh == []
    assert all(re.search("pooler|seq_relationship|position_ids", key) for key in report.dropped)


def test_a_head_saved_without_the_matrix_that_it_shares_has_that_of_the_words() -> None:
    peer, module = transformers_bert(BertForMaskedLM), build()
    state = {key: v for key, v in peer.state_dict().items() if not key.startswith("cls.predictions.decoder.")}
    load(module, "text", state)
    assert torch.equal(module.bert.decoder.weight, peer.state_dict()["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(module.bert.decoder.bias, peer.state_dict()["cls.predictions.bias"])


def test_a_bert_without_a_head_leaves_ours_fresh() -> None:
    peer, module = transformers_bert(BertModel), build()
    before = module.bert.decoder.weight.clone()
    ids = torch.randint(0, VOCABULARY, (2, 7))
    report = load(module, "text", peer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(bert_logits(module.bert, ids)[0], peer(ids).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert torch.equal(module.bert.decoder.weight, before)
    assert {key.split(".")[1] for key in report.fresh} == {"head", "decoder"}


def test_another_vocabulary_is_named_with_both_sizes() -> None:
    state = transformers_bert(BertModel).state_dict()
    state["embeddings.word_embeddings.weight"] = torch.zeros(31, 16)
    with pytest.raises(InputError, match=r"31 wordpieces .* 30; .*vocab.txt"):
        load(build(), "text", state)


# --- other sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"video": {"depths": [2, 4]}}, "video.depths"),
        ({"video": {"depths": [2, 1]}}, "video.depths"),
        ({"video": {"window": [4, 4, 4]}}, "video.window and video.num_heads"),
        ({"video": {"num_heads": [2, 2]}}, "video.window and video.num_heads"),
        ({"video": {"embed_dim": 16}}, "video.embed_dim"),
        ({"text": {"num_layers": 1}}, "text.num_layers"),
        ({"text": {"num_layers": 3}}, "text.num_layers"),
        ({"text": {"intermediate_size": 32}}, "text.hidden_size and text.intermediate_size"),
        ({"audio": {"num_layers": 2}}, "audio.num_layers"),
    ],
)
def test_the_key_that_decides_a_size_is_named(change: dict[str, Any], key: str) -> None:
    slot = next(iter(change))
    states = {"video": swin3d().state_dict, "audio": passt, "text": transformers_bert(BertForMaskedLM).state_dict}
    with pytest.raises(InputError, match=rf"set avlformer\.model\.{re.escape(key)} to"):
        load(build(**change), slot, states[slot]())


def test_heads_other_than_published_are_refused() -> None:
    wide = BertConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    text = {"hidden_size": 128, "num_layers": 1, "num_heads": 4}
    with pytest.raises(InputError, match=r"text.num_heads is 4; .*128 channels has 2"):
        load(build(text=text), "text", BertModel(wide).state_dict())


@pytest.mark.parametrize(("slot", "kind"), [("video", "Video Swin"), ("audio", "PaSST"), ("text", "BERT")])
def test_a_checkpoint_of_another_kind_is_refused(slot: str, kind: str) -> None:
    with pytest.raises(InputError, match=f"no {kind}"):
        load(build(), slot, {"conv1.weight": torch.zeros(1)})


def test_parts_are_read_only_where_nothing_fills_all() -> None:
    parts = {
        "video": dataclasses.replace(VIDEO, model_name="swin.pth"),
        "audio": dataclasses.replace(AUDIO, model_name="passt.pt"),
        "text": dataclasses.replace(TEXT, model_name="bert"),
    }
    alone = ModelConfig("none", **cast(Any, parts), feature_dim=12, mask="none", legacy=False)
    whole = dataclasses.replace(alone, model_name="model.bin")
    found = names(dataclasses.replace(tiny(), model=alone))
    assert found == {"all": "none", "video": "swin.pth", "audio": "passt.pt", "text": "bert"}
    found = names(dataclasses.replace(tiny(), model=whole))
    assert found == {"all": "model.bin", "video": "none", "audio": "none", "text": "none"}
