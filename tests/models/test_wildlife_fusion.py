"""wildlife's fusions against their formulas, and clips that lack a modality."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.wildlife.fusion import Bottleneck, Concat, TwoToken
from models.wildlife.model import tiny_model
from tests.models.toy_wildlife import batch, build, changed

BOTH = {"video": torch.tensor([True, True]), "audio": torch.tensor([True, True])}


# --- bottlenecks ---------------------------------------------------------------------------------------------------------


def bottleneck(**change) -> tuple[Bottleneck, dict[str, Tensor]]:
    """A fusion with weights of every kind, and tokens for two clips."""
    torch.manual_seed(0)
    module = Bottleneck(changed(**change), {"video": 12, "audio": 20}).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    places = {name: module.places[name].shape[1] for name in ("video", "audio")}
    return module, {"video": torch.randn(2, places["video"], 12), "audio": torch.randn(2, places["audio"], 20)}


def layer(block, x: Tensor) -> Tensor:
    """A pre-norm transformer layer, written out again from its definition."""
    heads, (num, tokens, dim) = block.attn.num_heads, x.shape
    normed = nn.functional.layer_norm(x, (dim,), block.norm1.weight, block.norm1.bias, 1e-6)
    q, k, v = (
        part.view(num, tokens, heads, -1)
        for part in (normed @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, -1)
    )
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / (dim / heads) ** 0.5).softmax(-1)
    x = x + torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2) @ block.attn.proj.weight.T + block.attn.proj.bias
    normed = nn.functional.layer_norm(x, (dim,), block.norm2.weight, block.norm2.bias, 1e-6)
    hidden = normed @ block.fc1.weight.T + block.fc1.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    return x + hidden @ block.fc2.weight.T + block.fc2.bias


def by_formula(module: Bottleneck, z: dict[str, Tensor], present: list[str]) -> Tensor:
    """MBT's rule for clips that have the modalities `present`."""
    z = {m: module.enter[m](z[m]) + module.kind[m] + module.places[m] for m in present}
    b = module.bottlenecks.expand(2, -1, -1)
    for depth in range(3):
        if depth < module.fusion_layer:
            z = {m: layer(module.blocks[m][depth], z[m]) for m in present}
            continue
        out = {m: layer(module.blocks[m][depth], torch.cat([z[m], b], 1)) for m in present}
        z = {m: out[m][:, :-2] for m in present}
        b = sum(out[m][:, -2:] for m in present) / len(present)
    return sum(module.leave[m](z[m]).mean(1) for m in present) / len(present)


@pytest.mark.parametrize("fusion_layer", [0, 1, 2])
def test_bottlenecks_follow_the_formula(fusion_layer: int) -> None:
    module, tokens = bottleneck(fusion_num_layers=3, fusion_layer=fusion_layer)
    torch.testing.assert_close(
        module(tokens, BOTH), by_formula(module, tokens, ["video", "audio"]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["video", "audio"])
def test_a_missing_modality_is_left_out_of_the_formula_clip_by_clip(name: str) -> None:
    module, tokens = bottleneck(fusion_num_layers=3, fusion_layer=1)
    present = {m: torch.tensor([True, m == name]) for m in ("video", "audio")}
    found = module(tokens, present)
    torch.testing.assert_close(found[0], by_formula(module, tokens, ["video", "audio"])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], by_formula(module, tokens, [name])[1], rtol=1e-4, atol=1e-4)


def test_fusion_at_the_last_layer_is_late_fusion() -> None:
    module, tokens = bottleneck(fusion_num_layers=3, fusion_layer=3)
    assert module.bottlenecks is None
    streams = []
    for name in ("video", "audio"):
        x = module.enter[name](tokens[name]) + module.kind[name] + module.places[name]
        for block in module.blocks[name]:
            x = block(x)
        streams.append(module.leave[name](x).mean(1))
    assert torch.equal(module(tokens, BOTH), (streams[0] + streams[1]) / 2)


def test_modalities_meet_in_the_bottlenecks_alone() -> None:
    module, tokens = bottleneck(fusion_num_layers=3, fusion_layer=1)

    def influence() -> float:
        """How much the sound's tokens owe to the picture."""
        tokens["video"].requires_grad_(True)
        heard = module.tokens(tokens, BOTH)["audio"].square().sum()
        (gradient,) = torch.autograd.grad(heard, tokens["video"], allow_unused=True)
        return 0.0 if gradient is None else float(gradient.abs().sum())

    assert influence() > 0
    step = module.step

    def cut(depth, z, b, present):
        after, mixed = step(depth, z, b, present)
        return after, mixed.detach()

    module.step = cut  # pyright: ignore[reportAttributeAccessIssue]
    assert influence() == 0


def test_one_fused_layer_carries_nothing_across_yet() -> None:
    module, tokens = bottleneck(fusion_num_layers=2, fusion_layer=1)
    other = tokens | {"video": torch.randn_like(tokens["video"])}
    assert torch.equal(module.tokens(tokens, BOTH)["audio"], module.tokens(other, BOTH)["audio"])


def test_attention_shown_is_the_attention_used() -> None:
    module, tokens = bottleneck(fusion_num_layers=3, fusion_layer=1)
    found = list(module.attentions(tokens, BOTH))
    own = tokens["video"].shape[1]
    assert [layers["video"].shape[-1] for layers in found] == [own, own + 2, own + 2]
    x = module.embed(tokens)["video"]
    attention = module.blocks["video"][0].attn
    x = module.blocks["video"][0].norm1(x)
    mixed = (found[0]["video"] @ attention.split(x)[2]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.proj(mixed), attention(x), rtol=1e-4, atol=1e-5)


# --- the other fusions, and clips that lack a modality -------------------------------------------------------------------


def test_twotoken_is_the_plain_transformer() -> None:
    torch.manual_seed(0)
    module = TwoToken(changed(fusion="twotoken"), {"video": 12, "audio": 20}).eval()
    peer_layer = nn.TransformerEncoderLayer(16, 2, 64, 0.1, activation="gelu", batch_first=True)
    peer = nn.TransformerEncoder(peer_layer, 2).eval()
    peer.load_state_dict(module.transformer.state_dict())
    given = {"video": torch.randn(2, 12), "audio": torch.randn(2, 20)}
    tokens = torch.stack([module.enter[name](given[name]) for name in ("video", "audio")], 1)
    expected = nn.functional.layer_norm(peer(tokens).mean(1), (16,))
    torch.testing.assert_close(module(given, BOTH), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.train()(given, BOTH).shape, expected.shape)


@pytest.mark.parametrize("fusion", ["mbt", "concat", "twotoken"])
@pytest.mark.parametrize("lost", ["video", "audio"])
def test_a_hidden_modality_has_no_say(fusion: str, lost: str) -> None:
    module = build(fusion=fusion)
    whole = batch(module.config)
    hidden = whole | {f"has_{lost}": torch.tensor([True, False, True, True])}
    noise = {"frames": torch.randint_like(whole["frames"], 256), "wave": torch.randn_like(whole["wave"])}
    tensor = {"video": "frames", "audio": "wave"}[lost]
    other = hidden | {tensor: torch.cat([hidden[tensor][:1], noise[tensor][1:2], hidden[tensor][2:]])}
    with torch.no_grad():
        first, second, complete = module(hidden), module(other), module(whole)
    torch.testing.assert_close(first["species_logits"], second["species_logits"])
    torch.testing.assert_close(first["fused_feature"][[0, 2, 3]], complete["fused_feature"][[0, 2, 3]])
    assert not torch.allclose(first["fused_feature"][1], complete["fused_feature"][1])


@pytest.mark.parametrize("fusion", ["mbt", "concat", "twotoken"])
def test_a_clip_that_lacks_both_still_has_an_answer(fusion: str) -> None:
    module = build(fusion=fusion)
    nothing = batch(module.config, silent=1, blind=1)
    with torch.no_grad():
        assert all(torch.isfinite(value).all() for value in module(nothing).values())
    losses = module.train()(nothing)
    losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_concat_reads_both() -> None:
    module = Concat(tiny_model(), {"video": 12, "audio": 20})
    given = {"video": torch.randn(2, 12), "audio": torch.randn(2, 20)}
    assert module(given, BOTH).shape == (2, 16)
