"""wildlife: bottlenecks by their formula and nothing beside them, missing modalities, and weights that mean the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from models.family import InputError, Sample
from models.losses import annotated_cross_entropy, effective_number, log_prior
from models.metrics import HeadScores
from models.wildlife.encoders import AudioEncoder, VideoEncoder
from models.wildlife.model import Finetune, HeadLoss, tiny_model
from models.wildlife.weights import fallback, load_encoder, load_resnet, load_videomae, names
from tasks.data.batches import stack
from tasks.engine.optim import rest_frozen_parts
from tasks.pretrained import load_state
from tests.models.toy_wildlife import FACTS, FAMILY, PHASE, batch, build, changed

# --- encoders and their checkpoints --------------------------------------------------------------------------------------

SIZES = {
    "video_num_layers": 2,
    "video_num_frames": 4,
    "video_tubelet": 2,
    "video_frame_size": 32,
    "video_patch_size": 16,
}


@pytest.fixture(scope="module")
def videomae() -> VideoMAEForVideoClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = VideoMAEForVideoClassification(VideoMAEConfig(image_size=32, num_frames=4, use_mean_pooling=True, **sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_pooled_videomae_is_what_transformers_classifies(
    videomae: VideoMAEForVideoClassification, tmp_path: Path
) -> None:
    videomae.save_pretrained(tmp_path)
    encoder = VideoEncoder(changed(**SIZES)).eval()
    report = load_videomae(encoder, load_state(str(tmp_path))[0])
    assert not report.fresh
    assert report.dropped == ["classifier.bias", "classifier.weight"]
    frames = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        pooled = encoder(frames)[1]
        logits = videomae(pixel_values=(frames / 255 - mean) / deviation).logits
        torch.testing.assert_close(videomae.classifier(pooled), logits, rtol=1e-4, atol=1e-4)


def test_layouts_counts_and_kinds_of_frames() -> None:
    frames = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(0)
    encoder = VideoEncoder(changed(**SIZES)).eval()
    other = VideoEncoder(changed(**SIZES, video_layout="bcthw")).eval()
    other.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        pooled = encoder(frames)[1]
        assert torch.equal(other(frames.transpose(1, 2))[1], pooled)
        torch.testing.assert_close(encoder(frames / 255)[1], pooled, rtol=1e-4, atol=1e-5)
        long = frames.repeat_interleave(3, 1)[:, [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]]  # ten frames; of them 0, 3, 6, 9
        assert torch.equal(encoder(long)[1], encoder(long[:, [0, 3, 6, 9]])[1])
        assert encoder(frames[:, :1])[0].shape == encoder(frames)[0].shape


def test_a_checkpoint_of_another_size_is_refused(videomae: VideoMAEForVideoClassification) -> None:
    state = videomae.state_dict()
    for change, message in [
        ({"video_num_layers": 1}, r"encoder\.layer\.1.*a layer more than here"),
        ({"video_num_layers": 3}, r"lacks encoder\.layer\.2"),
        ({"video_feature_dim": 32}, r"body\.patch\.weight is \(16, 1536\) there and \(32, 1536\) here"),
    ]:
        with pytest.raises(InputError, match=message):
            load_videomae(VideoEncoder(changed(**(SIZES | change))), state)
    with pytest.raises(InputError, match="no ResNet"):
        load_encoder(build(), "audio", state)


def test_summed_stem_hears_what_a_grey_picture_shows() -> None:
    torch.manual_seed(0)
    peer = torchvision.models.resnet18(weights=None).eval()
    encoder = AudioEncoder(tiny_model().audio_encoder, FACTS).eval()
    report = load_resnet(encoder, peer.state_dict())
    assert not report.fresh
    assert report.dropped == ["fc.bias", "fc.weight"]
    peer.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    sound = {"wave": torch.randn(2, 8000), "wave_length": torch.tensor([8000, 4000])}
    grey = encoder.picture(sound).expand(-1, 3, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(encoder(sound)[1], peer(grey), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frames", [2, 9, 16])
def test_small_cnn_gives_the_grid_that_is_declared(frames: int) -> None:
    module = build(video_kind="cnn3d", video_num_frames=frames, video_frame_size=24)
    found = module(batch(module.config))
    assert found["video_feature"].shape == (4, 16)
    assert list(module.video_encoder.attentions(torch.zeros(1, frames, 3, 24, 24))) == []


def test_fallback_is_what_the_config_says() -> None:
    named = dataclasses.replace(PHASE.tiny, model=changed(video_model_name="someone/videomae", video_fallback="cnn3d"))
    assert names(named) == {"video": "someone/videomae", "audio": "none"}
    instead = fallback(named, "video")
    assert instead is not None
    assert instead.model.video_encoder.kind == "cnn3d"
    assert names(instead)["video"] == "none"
    assert fallback(named, "audio") is None
    assert fallback(PHASE.tiny, "video") is None


# --- freezing and cached features ----------------------------------------------------------------------------------------


def test_each_encoder_freezes_alone() -> None:
    for video, audio in ((True, False), (False, True), (True, True)):
        module = build(video_freeze_backbone=video, audio_freeze_backbone=audio)
        rest_frozen_parts(module)
        assert module.video_encoder.training is not video
        assert module.audio_encoder.resnet.bn1.training is not audio
        trained = {name.split(".")[0] for name, p in module.named_parameters() if p.requires_grad}
        assert ("video_encoder" in trained, "audio_encoder" in trained) == (not video, not audio)


@pytest.mark.parametrize("fusion", ["concat", "twotoken"])
def test_frozen_features_give_what_the_whole_gives(fusion: str) -> None:
    module = build(fusion=fusion, video_freeze_backbone=True, audio_freeze_backbone=True)
    assert PHASE.cacheable(module.config)
    whole = batch(module.config, silent=2)
    small = {key: value for key, value in whole.items() if value.ndim == 1} | module.encode(whole)
    torch.testing.assert_close(module(small)["species_logits"], module(whole)["species_logits"])
    assert not PHASE.cacheable(PHASE.tiny)


def test_the_resnet_learns_where_it_is_not_frozen() -> None:
    """Its maps lie channels last, its weights and their gradients as they are stored."""
    module, last = build(audio_freeze_backbone=False).train(), []
    net = module.audio_encoder.resnet
    for block in (net.relu, net.layer1, net.layer2):
        block.register_forward_hook(
            lambda _, given, out: last.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    module(batch(module.config))["loss"].backward()
    assert last == [True] * 3
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())
    assert all(p.is_contiguous() and p.grad.is_contiguous() for p in net.parameters() if p.grad is not None)


# --- losses --------------------------------------------------------------------------------------------------------------


def head_loss(**change) -> HeadLoss:
    return HeadLoss(dataclasses.replace(PHASE.tiny, **change), "species", FACTS)


def test_micro_batches_and_processes_change_no_loss() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 3, requires_grad=True)
    labels = torch.tensor([0, -1, 2, -1, -1, 1])
    for change in ({}, {"uncertainty": True}, {"imbalance": "effective_number", "label_smoothing": 0.1}):
        loss = head_loss(**change)
        whole = torch.autograd.grad(loss(logits, labels)[1], logits)[0]
        parts = [2 / 6 * loss(logits[i : i + 2], labels[i : i + 2])[1] for i in (0, 2, 4)]
        torch.testing.assert_close(torch.autograd.grad(sum(parts), logits)[0], whole)


def test_a_head_that_nobody_annotated_costs_nothing() -> None:
    logits = torch.randn(3, 3, requires_grad=True)
    for change in ({}, {"uncertainty": True}, {"imbalance": "effective_number"}):
        error, part = head_loss(**change)(logits, torch.full((3,), -1))
        part.backward()
        assert error == part == 0
    assert (logits.grad == 0).all()


def test_uncertainty_settles_where_its_formula_says() -> None:
    loss = head_loss(uncertainty=True)
    logits, labels = torch.zeros(4, 3), torch.tensor([0, -1, 1, 2])
    optimizer = torch.optim.SGD(loss.parameters(), 0.5)
    for _ in range(300):
        optimizer.zero_grad()
        loss(logits, labels)[1].backward()
        optimizer.step()
    assert loss.log_variance is not None
    torch.testing.assert_close(loss.log_variance.exp(), torch.tensor([2 * np.log(3.0)], dtype=torch.float32))


def test_imbalance_against_its_definitions() -> None:
    weights = effective_number([60, 30, 10], 0.99)
    expected = torch.tensor([(1 - 0.99) / (1 - 0.99**n) for n in (60, 30, 10)])
    torch.testing.assert_close(weights / weights[0], expected / expected[0])
    assert float(weights @ torch.tensor([0.6, 0.3, 0.1])) == pytest.approx(1)
    torch.testing.assert_close(log_prior([60, 30, 10]).exp(), torch.tensor([0.6, 0.3, 0.1]))
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, -1, 0])
    adjusted = head_loss(imbalance="logit_adjustment", tau=1.5)(logits, labels)[1]
    plain = annotated_cross_entropy(logits + 1.5 * log_prior([60, 30, 10]), labels, None, 0.0).mean()
    torch.testing.assert_close(adjusted, plain)


def test_nothing_is_weighed_twice() -> None:
    with pytest.raises(InputError, match="weigh the same thing twice"):
        build(phase={"imbalance": "effective_number", "balanced_sampler": True})
    with pytest.raises(InputError, match="no count of clips"):
        Finetune(dataclasses.replace(PHASE.tiny, imbalance="effective_number"), dataclasses.replace(FACTS, counts={}))


# --- data, metrics, answers ----------------------------------------------------------------------------------------------


def test_labels_and_what_is_not_annotated() -> None:
    clips = [{"species": "wolf", "activity": None}, {"species": "fox", "activity": "resting"}]
    assert FAMILY.labels(clips, []) == {"species": ["fox", "wolf"], "activity": ["resting"]}
    assert batch(PHASE.tiny)["activity"].tolist() == [0, 1, -1, 0]
    transform = PHASE.transform(PHASE.tiny, FACTS, True)
    with pytest.raises(
        InputError, match=r"clip x: species 'lynx' is not among the 3 of training: \['fox', 'hare', 'wolf'\]"
    ):
        transform(Sample("x", None, None, {"species": "lynx", "activity": None}, np.random.default_rng(0)))
    with pytest.raises(InputError, match="its activity annotated"):
        FAMILY.labels(clips[:1], [])


def test_spectrograms_prepared_elsewhere_are_heard_as_they_are() -> None:
    module = build()
    waves = batch(module.config)
    encoder = module.audio_encoder
    transform = PHASE.transform(PHASE.tiny, FACTS, False)
    mels = encoder.mel(waves["wave"]).numpy()

    def sample(i: int) -> dict[str, Tensor]:
        rng = np.random.default_rng(i)
        frames = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
        return transform(Sample(str(i), frames, None, {"species": "fox", "activity": None}, rng, mels[i]))

    prepared = stack([sample(i) for i in range(4)])
    assert "wave" not in prepared and prepared["has_audio"].all()
    with torch.no_grad():
        torch.testing.assert_close(module(prepared)["species_logits"], module(waves)["species_logits"])
    with pytest.raises(InputError, match="num_mel_bins to 8"):
        transform(
            Sample("x", None, None, {"species": "fox", "activity": None}, np.random.default_rng(0), mels[0, :, :8])
        )


def test_modality_dropout_hides_and_keeps_the_tensors() -> None:
    augment = dataclasses.replace(PHASE.tiny.augment, modality_dropout=1.0)
    found = batch(dataclasses.replace(PHASE.tiny, augment=augment), clips=12, training=True)
    assert (found["has_video"] ^ found["has_audio"]).all()
    assert found["has_video"].any() and found["has_audio"].any()
    assert (found["wave"].abs().sum(1) > 0).all() and (found["frames"].flatten(1).sum(1) > 0).all()


def test_heads_are_judged_by_their_own_clips() -> None:
    metric = HeadScores({"species": 3, "activity": 2})
    truth = {"species": torch.tensor([0, 1, -1]), "activity": torch.tensor([-1, -1, -1])}
    metric.update({"species_logits": 9 * torch.eye(3), "activity_logits": torch.zeros(3, 2)}, truth)
    found = metric.compute()
    assert (found["species_top1"], found["species_macro_f1"]) == (1, 1)
    assert np.isnan(found["activity_macro_f1"]) and np.isnan(found["mean_macro_f1"])
    metric.update(
        {"species_logits": torch.zeros(1, 3), "activity_logits": torch.tensor([[0.0, 9]])},
        {"species": torch.tensor([-1]), "activity": torch.tensor([1])},
    )
    assert metric.compute()["mean_macro_f1"] == 1


def test_answers_have_both_labels_with_scores() -> None:
    module = build()
    with torch.no_grad():
        found = module(batch(module.config))
    assert PHASE.present is not None
    answer = PHASE.present(found, FACTS)[0]
    assert list(answer) == ["species", "species_score", "top_species", "activity", "activity_score", "top_activity"]
    assert [answer["species"], answer["species_score"]] == answer["top_species"][0]
    assert sum(score for _, score in answer["top_activity"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"video_frame_size": 20},
            r"wildlife\.model\.video_encoder\.frame_size is 20; it must be a multiple of patch_size",
        ),
        ({"video_num_frames": 3, "video_tubelet": 2}, r"video_encoder\.num_frames is 3"),
        ({"fusion_hidden_dim": 18}, r"fusion_hidden_dim is 18"),
        ({"fusion_layer": 3}, r"fusion_layer is 3; it must lie between 0 and fusion_num_layers \(2\)"),
        ({"num_bottlenecks": 0}, r"num_bottlenecks is 0"),
        ({"audio_audio_duration": 0.02}, r"audio_duration is 0.02 s"),
    ],
)
def test_values_that_do_not_fit_are_named(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**change)
