"""What wildlife shows of itself: relevance that crosses modalities by bottlenecks alone, and deletion curves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import models
from models.family import Facts
from models.wildlife import explain
from models.wildlife.fusion import MODALITIES, Streams
from models.wildlife.model import Finetune, tiny_model

PHASE = models.load("wildlife").phases["finetune"]
FACTS = Facts({"species": ["fox", "hare", "wolf"], "activity": ["foraging", "resting"]}, -5.0, 4.0)
SIZES = {"video": 4, "audio": 3}
BOTH = {"video": torch.tensor([True, True]), "audio": torch.tensor([True, True])}


def build(encoder: dict | None = None, **change) -> Finetune:
    torch.manual_seed(0)
    model = dataclasses.replace(tiny_model(), **change)
    model = dataclasses.replace(model, video_encoder=dataclasses.replace(model.video_encoder, **(encoder or {})))
    module = Finetune(dataclasses.replace(PHASE.tiny, model=model), FACTS).eval()
    with torch.no_grad():  # untrained answers are all but even: make them depend on the clip
        for head in module.heads.values():
            head[1].weight.mul_(20), head[4].weight.mul_(20)  # type: ignore[index]
    return module


def batch(clips: int = 3, frames: int = 2, size: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "frames": torch.randint(0, 256, (clips, frames, 3, size, size), dtype=torch.uint8, generator=generator),
        "wave": 0.1 * torch.randn(clips, 8000, generator=generator),
        "wave_length": torch.full((clips,), 8000),
        "has_video": torch.ones(clips, dtype=torch.bool),
        "has_audio": torch.ones(clips, dtype=torch.bool),
        "row": torch.arange(clips),
    }


def attention(bottlenecks: int) -> Streams:
    return {m: torch.rand(2, 2, SIZES[m] + bottlenecks, SIZES[m] + bottlenecks).softmax(-1) for m in MODALITIES}


def test_rows_of_the_fusion_add_up_to_one() -> None:
    z = explain.bottleneck_rollout([attention(0), attention(2), attention(2)], SIZES, 2, BOTH)
    for m in MODALITIES:
        assert z[m].shape == (2, SIZES[m], 4 + 3 + 2)
        torch.testing.assert_close(z[m].sum(-1), torch.ones(2, SIZES[m]))


def test_two_fused_layers_worked_out_by_hand() -> None:
    """One token a modality and one bottleneck, all attention even: each layer is [[3/4, 1/4], [1/4, 3/4]]."""
    even = {m: torch.full((1, 1, 2, 2), 0.5) for m in MODALITIES}
    one = {m: torch.tensor([True]) for m in MODALITIES}
    z = explain.bottleneck_rollout([even, even], {"video": 1, "audio": 1}, 1, one)
    # After layer 1: z_v = (3/4, 0, 1/4); b = mean of (1/4, 0, 3/4) and (0, 1/4, 3/4) = (1/8, 1/8, 3/4).
    # After layer 2: 3/4 z_v + 1/4 b.
    torch.testing.assert_close(z["video"][0, 0], torch.tensor([19 / 32, 1 / 32, 12 / 32]))
    torch.testing.assert_close(z["audio"][0, 0], torch.tensor([1 / 32, 19 / 32, 12 / 32]))


def test_relevance_crosses_by_bottlenecks_alone() -> None:
    def crossing(layers: list[Streams], num: int, present: Streams = BOTH) -> float:
        z = explain.bottleneck_rollout(layers, SIZES, num, present)
        return float(z["audio"][..., : SIZES["video"]].sum() + z["video"][..., 4 : 4 + SIZES["audio"]].sum())

    def cut(weights: Tensor, own: int) -> Tensor:
        left = weights.clone()
        left[..., :own, own:] = 0  # tokens do not read the bottlenecks
        return left

    fused = [attention(2), attention(2)]
    assert crossing(fused, 2) > 0
    assert crossing([{m: cut(w[m], SIZES[m]) for m in MODALITIES} for w in fused], 2) == 0
    assert crossing([attention(0), attention(0)], 0) == 0
    assert crossing([attention(0), attention(2)], 2) == 0, "what the last layer puts in, nobody reads"
    assert crossing(fused, 2, BOTH | {"video": torch.tensor([False, False])}) > 0
    z = explain.bottleneck_rollout(fused, SIZES, 2, BOTH | {"video": torch.tensor([False, False])})
    assert z["audio"][..., :4].sum() == 0, "a missing modality puts nothing in"


def test_late_fusion_tells_each_stream_by_itself() -> None:
    module, clips = build(fusion_layer=2), batch()
    before = explain.relevance(module, clips)
    other = clips | {"wave": torch.randn_like(clips["wave"])}
    torch.testing.assert_close(explain.relevance(module, other)["video"], before["video"])
    for m in MODALITIES:  # each modality is half of the mean
        torch.testing.assert_close(before[m].sum(1), torch.full((3,), 0.5))


@pytest.mark.parametrize("fusion", ["mbt", "concat", "twotoken"])
@pytest.mark.parametrize("kind", ["videomae", "cnn3d"])
def test_maps_of_every_kind(fusion: str, kind: str) -> None:
    frames, size = (9, 24) if kind == "cnn3d" else (2, 16)
    module = build({"kind": kind, "num_frames": frames, "frame_size": size}, fusion=fusion)
    clips = batch(3, frames, size) | {"has_audio": torch.tensor([True, True, False])}
    found = explain.explain(module, clips)
    assert found["video_relevance"].shape == ((3, 2, 2, 2))
    assert found["audio_relevance"].shape == (3, 16, 48)
    assert (found["audio_relevance"][2] == 0).all()
    flat = kind == "cnn3d" and fusion != "mbt"  # no attention anywhere: nothing is more relevant than the rest
    assert (found["video_relevance"].flatten(1).amax(1) == (0 if flat else 1)).all()
    assert (found["audio_relevance"][:2].flatten(1).amax(1) == (1 if fusion == "mbt" else 0)).all()
    assert all((found[f"{m}_relevance"].flatten(1).amin(1) == 0).all() for m in MODALITIES)
    assert found["deletion"].shape == found["deletion_random"].shape == (3, explain.STEPS + 1)


def test_a_clip_is_shown_the_same_in_any_batch() -> None:
    module, clips = build(), batch()
    whole = explain.explain(module, clips)
    alone = explain.explain(module, {key: value[1:2] for key, value in clips.items()})
    for key, value in alone.items():
        torch.testing.assert_close(value[0], whole[key][1], rtol=1e-4, atol=1e-5)


def test_deletion_hides_from_nothing_to_everything() -> None:
    module, clips = build(), batch()
    shares = explain.relevance(module, clips)
    curves = explain.deletion(module, clips, shares)
    with torch.no_grad():
        whole = module(clips)
        hidden = {m: torch.ones_like(shares[m], dtype=torch.bool) for m in MODALITIES}
        pixels, picture = module.video_encoder.pixels(clips["frames"]), module.audio_encoder.picture(clips)
        nothing = [x.abs().sum() for x in explain.without(module, pixels, picture, hidden)]
    sure = [whole[f"{head}_logits"].softmax(-1).amax(-1) for head in ("species", "activity")]
    assert nothing == [0, 0]
    for curve in curves.values():
        torch.testing.assert_close(curve[:, 0], torch.stack(sure).mean(0))
    torch.testing.assert_close(curves["deletion"][:, -1], curves["deletion_random"][:, -1])
    backwards = explain.deletion(module, clips, {m: -share for m, share in shares.items()})
    assert not torch.allclose(backwards["deletion"], curves["deletion"])
    torch.testing.assert_close(backwards["deletion_random"], curves["deletion_random"])


def test_hiding_a_place_hides_its_patch() -> None:
    module, clips = build(), batch()
    pixels, picture = torch.ones(3, 2, 3, 16, 16), torch.ones(3, 1, 16, 48)
    hidden = {"video": torch.zeros(3, 8, dtype=torch.bool), "audio": torch.zeros(3, 2, dtype=torch.bool)}
    hidden["video"][0, 4 + 1] = hidden["audio"][0, 1] = True  # second frame, upper right; the end of the sound
    left, quiet = explain.without(module, pixels, picture, hidden)
    assert (left[0, 1, :, :8, 8:] == 0).all() and left.sum() == 3 * 2 * 3 * 256 - 3 * 64
    assert (quiet[0, :, :, 32:] == 0).all() and quiet.sum() == 3 * 16 * 48 - 16 * 16
    assert clips["row"].tolist() == [0, 1, 2]
