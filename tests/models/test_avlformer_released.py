"""FAVDBench's model.bin in avlformer: where its tensors go, what is refused, and the whole against its arithmetic."""

from __future__ import annotations

import re
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import BertForPreTraining

from models.avlformer.links import Links
from models.avlformer.model import Finetune
from models.avlformer.weights import load
from models.family import Batch, InputError
from tests.models.toy_avlformer_weights import (
    LINKS,
    State,
    build,
    every,
    expected_tokens,
    released,
    swin3d,
    transformers_bert,
)


def test_model_bin_fills_all_of_the_module() -> None:
    module, state = build(), released()
    report = load(module, "all", state)
    assert report.fresh == []
    assert report.loaded == sorted(module.state_dict())
    assert {re.sub(r"\d+", "N", key) for key in report.dropped} == {
        "swin.backbone.layers.N.blocks.N.attn.relative_position_index",
        "passt.net.head.N.weight",
        "passt.net.head.N.bias",
        "trans_encoder.bert.pooler.dense.weight",
        "trans_encoder.bert.pooler.dense.bias",
        "trans_encoder.cls_img_feat.predictions.decoder.weight",
    }
    assert torch.equal(module.video_proj.weight, state["fc.weight"])
    assert torch.equal(module.audio_proj.bias, state["passt.linear.bias"])
    assert torch.equal(module.features.weight, state["trans_encoder.bert.img_embedding.weight"])
    assert torch.equal(module.bert.decoder.weight, state["trans_encoder.cls.predictions.decoder.weight"])
    assert torch.equal(cast(Links, module.links).weight[2], state["learn_vid_att.weight"][2 * LINKS : 3 * LINKS, 0])
    alone = build()
    load(alone, "video", {k.removeprefix("swin."): v for k, v in state.items() if k.startswith("swin.")})
    assert all(torch.equal(v, module.state_dict()[f"video.{key}"]) for key, v in alone.video.state_dict().items())


def test_links_are_dropped_where_there_are_none() -> None:
    assert "learn_vid_att.weight" in load(build("none"), "all", released()).dropped


def without(state: State, start: str) -> State:
    return {key: value for key, value in state.items() if not key.startswith(start)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra.weight": torch.zeros(1)}, r"it has extra.weight and 0 more"),
        ({"swin.backbone.extra": torch.zeros(1)}, r"swin.backbone.extra, .* no place"),
        (
            {"learn_vid_att.weight": torch.zeros(49, 1)},
            r"\(7, 7\) there and \(80, 80\) here; .*num_frames.*patchout_time",
        ),
        ({"learn_vid_att.weight": torch.zeros(50, 1)}, r"\(50, 1\) there and \(80, 80\) here"),
        ({"fc.weight": torch.zeros(13, 16)}, r"fc.weight is \(13, 16\) there .*feature_dim"),
    ],
)
def test_a_model_bin_that_does_not_fit_is_refused(change: State, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(build(), "all", released() | change)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("passt.", r"no model.bin of FAVDBench: .*passt.net"),
        ("learn_vid_att", r"nothing for links.weight .*model.mask"),
        ("fc.bias", r"nothing for video_proj.bias"),
        ("trans_encoder.cls.predictions.bias", r"nothing for bert.decoder.bias"),
    ],
)
def test_a_model_bin_that_lacks_something_is_refused(lost: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(build(), "all", without(released(), lost))


def test_answers_of_their_own_cannot_be_tied() -> None:
    with pytest.raises(InputError, match=r"text.tie_weights to false"):
        load(build(text={"tie_weights": True}), "all", released())


# --- the whole -----------------------------------------------------------------------------------------------------------


def clips(module: Finetune) -> Batch:
    """Two clips, the second of which ends early."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = every(module)
    return {
        "frames": torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "wave": torch.randn(2, 9600, generator=generator) * 0.1,
        "wave_length": torch.tensor([9600, 4000]),
        "has_video": torch.tensor([True, True]),
        "has_audio": torch.tensor([True, True]),
        "rows": rows.expand(2, -1),
        "columns": columns.expand(2, -1),
    }


def test_with_model_bin_the_legacy_model_is_favdbenchs_joint_sequence() -> None:
    state, module = released(), build(legacy=True)
    state["learn_vid_att.weight"] = 9 + torch.randn(LINKS**2, 1)  # there FAVDBench's bias is neither 0 nor all closed
    load(module, "all", state)
    batch = clips(module)
    ids = torch.tensor([[2, 7, 8, 9, 3], [2, 11, 4, 3, 0]])
    with torch.no_grad():
        asked = torch.tensor([[1, 3], [2, 0]])
        found, named = module.legacy_logits({"read": ids, "text": ids, "asked": asked}, module.context(batch))
        expected = favdbench(module, state, batch, ids)
    words = ids[:, :-1] != 0
    torch.testing.assert_close(found[words], expected[:, :-1][words], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(named[0], expected[0, asked[0]], rtol=1e-3, atol=1e-4)


def favdbench(module: Finetune, state: State, batch: Batch, ids: Tensor) -> Tensor:
    """Logits (B, L, V) by transformers' BERT over words, video and sound in one sequence (specs/avlformer.md §3)."""
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    seen = expected_tokens(swin3d(), (batch["frames"] / 255 - mean) / deviation)
    seen = seen @ state["fc.weight"].T + state["fc.bias"]
    heard = module.audio(module.spectrum(batch["wave"]), batch["rows"], batch["columns"])
    heard = heard @ state["passt.linear.weight"].T + state["passt.linear.bias"]
    heard = heard / (heard.norm(dim=2, keepdim=True) / 12**0.5 + 1e-6)
    stem = "trans_encoder.bert.img_embedding"
    features = torch.cat([seen, heard], 1) @ state[f"{stem}.weight"].T + state[f"{stem}.bias"]
    num, length = features.shape[1], ids.shape[1]
    weight = state["learn_vid_att.weight"].view(num, num).sigmoid()
    eye = torch.eye(num)
    mask = torch.zeros(len(ids), length + num, length + num)
    for clip, words in enumerate((ids != 0).sum(1).tolist()):
        mask[clip, :words, :words] = torch.ones(words, words).tril()
        mask[clip, :words, length:] = 1
        mask[clip, length:, length:] = eye + (1 - eye) * weight
    peer = cast(Any, transformers_bert(BertForPreTraining, tie_word_embeddings=False))
    text = {
        key.removeprefix("trans_encoder."): value for key, value in state.items() if key.startswith("trans_encoder.")
    }
    text["cls.predictions.decoder.bias"] = text["cls.predictions.bias"]  # transformers has it twice
    missing, _ = peer.load_state_dict(text, strict=False)
    assert all("seq_relationship" in key for key in missing)
    x = torch.cat([peer.bert.embeddings(ids), features], 1)
    x = peer.bert.encoder(x, attention_mask=(1 - mask)[:, None] * -10000.0).last_hidden_state
    return peer.cls.predictions(x[:, :length])
