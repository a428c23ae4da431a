"""T3-AV: nothing leaks from masked tokens, positions stay true, frozen means frozen, and the ViT's weights mean the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel

import models
from models.family import Facts, InputError, Sample
from models.t3av.config import ModelConfig
from models.t3av.model import Contrastive, Finetune, Pretrain, tiny_model
from models.t3av.weights import load_vit
from tasks.data.batches import stack
from tasks.engine.optim import rest_frozen_parts
from tasks.pretrained import load_state

FAMILY = models.load("t3av")
FACTS = Facts({"label": ["dog barking", "rowboat, canoe, kayak rowing"]}, -5.0, 4.0)


def batch(phase: str, config, clips: int = 4, silent: int = -1, blind: int = -1) -> dict[str, torch.Tensor]:
    spec = FAMILY.phases[phase].clip(config)
    transform = FAMILY.phases[phase].transform(config, FACTS, False)

    def sample(i: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng(i)
        frames = rng.integers(0, 256, (spec.num_frames, 16, 16, 3), dtype=np.uint8)
        wave = 0.1 * rng.standard_normal(round(spec.sample_rate * spec.audio_seconds)).astype(np.float32)
        label = {"label": FACTS.labels["label"][i % 2]}
        return transform(Sample(str(i), None if i == blind else frames, None if i == silent else wave, label, rng))

    return stack([sample(i) for i in range(clips)])


@pytest.fixture
def pretrain() -> Pretrain:
    torch.manual_seed(0)
    return Pretrain(FAMILY.phases["pretrain"].tiny, FACTS).eval()


def test_masked_pixels_never_reach_visible_tokens(pretrain: Pretrain) -> None:
    patches = torch.randn(2, 8, 192)
    keep = torch.tensor([[0, 3, 5], [1, 2, 7]])
    changed = patches.clone()
    changed[0, [1, 2, 4, 6, 7]] = 100.0
    changed[1, [0, 3, 4, 5, 6]] = -100.0
    assert torch.equal(pretrain.video_encoder(patches, keep), pretrain.video_encoder(changed, keep))


def test_positions_follow_the_original_place(pretrain: Pretrain) -> None:
    patches = torch.zeros(1, 8, 192)  # all alike: only the position can tell them apart
    first = pretrain.video_encoder(patches, torch.tensor([[2]]))
    second = pretrain.video_encoder(patches, torch.tensor([[6]]))
    assert not torch.allclose(first, second)
    encoder = pretrain.video_encoder
    encoder.blocks, encoder.norm = torch.nn.ModuleList(), torch.nn.Identity()
    whole = encoder(patches)
    some = encoder(patches, torch.tensor([[1, 6]]))
    torch.testing.assert_close(some, whole[:, [1, 6]])


def test_the_backbone_sees_visible_tokens_alone(pretrain: Pretrain) -> None:
    seen: list[int] = []
    pretrain.backbone.blocks[0].register_forward_hook(lambda module, given, out: seen.append(given[0].shape[1]))
    pretrain.video_loss(batch("pretrain", pretrain.config))
    assert seen == [4]  # half of the eight


@pytest.mark.parametrize(("lacking", "key"), [("silent", "loss_audio"), ("blind", "loss_video")])
def test_a_missing_modality_costs_nothing_and_moves_nothing(pretrain: Pretrain, lacking: str, key: str) -> None:
    found = pretrain(batch("pretrain", pretrain.config, **{lacking: 1}))
    assert found[key][1] == 0
    assert (found[key][[0, 2, 3]] > 0).all()


def test_a_hidden_modality_is_as_good_as_a_missing_one() -> None:
    torch.manual_seed(0)
    module = Finetune(FAMILY.phases["finetune"].tiny, FACTS).eval()
    hidden = batch("finetune", module.config)
    hidden["has_audio"] = torch.zeros_like(hidden["has_audio"])
    missing = batch("finetune", module.config)
    missing |= {"wave": torch.randn_like(missing["wave"]), "has_audio": hidden["has_audio"]}
    torch.testing.assert_close(module(hidden)["logits"], module(missing)["logits"])


def test_freezing() -> None:
    tiny = FAMILY.phases["finetune"].tiny

    def trained(**change) -> set[str]:
        module = Finetune(dataclasses.replace(tiny, **change), FACTS)
        return {name.split(".")[0] for name, p in module.named_parameters() if p.requires_grad}

    heads = {"classifier", "absent"}
    assert trained(freeze_all_except_head=True) == heads
    assert trained(freeze_encoders=True) == {"backbone", *heads}
    assert trained(freeze_encoders=True, freeze_backbone=True, unfreeze_backbone_layers=1) == {"backbone", *heads}
    opened = trained(freeze_encoders=True, freeze_backbone=True, unfreeze_encoder_layers=1)
    assert opened == {"audio_encoder", *heads}
    frozen = Finetune(dataclasses.replace(tiny, freeze_all_except_head=True), FACTS).train()
    rest_frozen_parts(frozen)
    assert not frozen.backbone.training
    assert frozen.classifier.training


def test_frozen_features_give_what_the_whole_gives() -> None:
    config = dataclasses.replace(FAMILY.phases["finetune"].tiny, freeze_all_except_head=True)
    assert FAMILY.phases["finetune"].cacheable(config)
    torch.manual_seed(0)
    module = Finetune(config, FACTS).eval()
    whole = batch("finetune", config, silent=2)
    small = {key: value for key, value in whole.items() if value.ndim == 1} | module.encode(whole)
    torch.testing.assert_close(module(small)["logits"], module(whole)["logits"])


def test_pairs_find_each_other() -> None:
    torch.manual_seed(0)
    config = FAMILY.phases["contrastive"].tiny
    module = Contrastive(config, FACTS).train()
    data = batch("contrastive", config, clips=8)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    for _ in range(250):
        losses = module(data)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["collapse"] == 0
    found = module.eval()(data)
    nearest = (found["video_embedding"] @ found["audio_embedding"].T).argmax(1)
    assert (nearest == torch.arange(8)).float().mean() > 0.9


def test_an_unknown_label_lists_the_known_ones() -> None:
    config = FAMILY.phases["finetune"].tiny
    transform = FAMILY.phases["finetune"].transform(config, FACTS, True)
    with pytest.raises(InputError, match="'cat meowing' is not among the 2 of training"):
        transform(Sample("x", None, None, {"label": "cat meowing"}, np.random.default_rng(0)))


def vit(dim: int = 32) -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4 * dim,
        image_size=32,
        patch_size=16,
    )
    return ViTModel(config, add_pooling_layer=True).eval()


def vit_sized(**change) -> ModelConfig:
    size = {"dim": 32, "encoder_layers": 2, "encoder_heads": 2, "frame_size": 32, "patch_size": 16}
    size |= {"audio_patch_size": 16, "num_frames": 1}
    return dataclasses.replace(tiny_model(), **{**size, **change})


def saved(theirs: ViTModel, folder: Path) -> Mapping[str, torch.Tensor]:
    """The checkpoint as it lies on disk: transformers names tensors otherwise in memory."""
    theirs.save_pretrained(folder)
    return load_state(str(folder))[0]


def test_one_frame_through_our_encoder_is_the_vit_without_its_class_token(tmp_path: Path) -> None:
    theirs = vit()
    module = Pretrain(dataclasses.replace(FAMILY.phases["pretrain"].tiny, model=vit_sized()), FACTS).eval()
    report = load_vit(module, "vit", saved(theirs, tmp_path))
    assert all("cls_token" in key or key.startswith("pooler.") for key in report.dropped)
    frame = torch.randint(0, 256, (1, 1, 3, 32, 32), dtype=torch.uint8)
    ours = module.video_encoder(module.video_encoder.patches(frame))
    with torch.no_grad():
        pixels = frame[:, 0].float() / 127.5 - 1
        x = theirs.embeddings(pixels)[:, 1:]  # without the class token, which ours has not
        for layer in theirs.layers:
            out = layer(x)
            x = out[0] if isinstance(out, tuple) else out
        expected = theirs.layernorm(x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_vit_of_another_size_is_refused(tmp_path: Path) -> None:
    module = Pretrain(dataclasses.replace(FAMILY.phases["pretrain"].tiny, model=vit_sized(dim=16)), FACTS)
    with pytest.raises(InputError, match=r"video_encoder\.patch\.weight is \(32, 768\) there and \(16, 768\) here"):
        load_vit(module, "vit", saved(vit(), tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_size": 20}, r"t3av\.model\.frame_size is 20; it must be a multiple of patch_size"),
        ({"num_mel_bins": 20}, r"num_mel_bins is 20"),
        ({"num_frames": 3, "tubelet": 2}, r"num_frames is 3"),
        ({"dim": 18}, r"dim is 18"),
        ({"audio_duration": 0.01}, r"audio_duration is 0.01"),
    ],
)
def test_values_that_do_not_fit_are_named(change: dict, message: str) -> None:
    config = dataclasses.replace(FAMILY.phases["pretrain"].tiny, model=dataclasses.replace(tiny_model(), **change))
    with pytest.raises(InputError, match=message):
        Pretrain(config, FACTS)
