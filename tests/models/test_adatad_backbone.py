"""adatad's backbone: sizes, positions and adapters by their definitions, what reaches what, and what each mode trains."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.adatad.backbone import PIXELS, Adapter, Backbone, build_positions
from models.adatad.config import BackboneConfig

SMALL = BackboneConfig(
    model_name="none",
    mode="adapter",
    dim=16,
    num_layers=3,
    num_heads=2,
    mlp_dim=24,
    patch_size=8,
    tubelet=2,
    chunk_frames=4,
    frame_size=16,
    pretrained_grid=3,
    adapter_dim=4,
    first_adapter=1,
    drop_path=0.0,
    checkpointing=False,
    chunks_at_once=0,
)
SIZE_S = dataclasses.replace(
    SMALL,
    dim=384,
    num_layers=12,
    num_heads=6,
    mlp_dim=1536,
    patch_size=16,
    chunk_frames=16,
    frame_size=160,
    pretrained_grid=14,
    adapter_dim=96,
    first_adapter=6,
)
MODES = ["adapter", "frozen", "full", "side"]


def build(**change) -> Backbone:
    """A small backbone in training mode; its adapters do something, or nothing with `fresh=True`."""
    fresh = change.pop("fresh", False)
    torch.manual_seed(0)
    module = Backbone(dataclasses.replace(SMALL, **change))
    for parameter in module.blocks.parameters():
        nn.init.normal_(parameter, std=0.3)
    for adapter in module.adapters if not fresh else []:
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.5)
    return module.train()


def video(windows: int = 2, chunks: int = 3) -> Tensor:
    return torch.randint(0, 256, (windows, 4 * chunks, 3, 16, 16), dtype=torch.uint8)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# --- sizes and definitions -----------------------------------------------------------------------------------------------


def test_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        module = Backbone(SIZE_S)
    counts = {name: p.numel() for name, p in module.named_parameters()}
    adapters = sum(n for name, n in counts.items() if name.startswith("adapters."))
    # The published ViT-S counts the norm of a classifier, of 2 x 384 values, which features never pass: here there is none.
    assert sum(counts.values()) - adapters + 2 * 384 == 21_879_936
    assert [sum(p.numel() for p in adapter.parameters()) for adapter in module.adapters] == [83_905] * 12
    assert adapters == 1_006_860
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert len(trained) == 12 * 9
    assert all(name.startswith("adapters.") for name in trained)
    assert module.positions.shape == (800, 384)


def by_definition(module: Backbone, chunk: Tensor) -> Tensor:
    """Tokens (N, dim) of one chunk (T, 3, S, S) by a plain ViT, written out again from its definition."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in PIXELS)
    x = ((chunk - mean) / deviation).transpose(0, 1)[None]
    kernel = module.patch.weight.view(16, 3, 2, 8, 8)
    x = functional.conv3d(x, kernel, module.patch.bias, stride=(2, 8, 8)).flatten(2).transpose(1, 2)[0]
    x = x + module.positions
    for block in module.blocks:
        normed = functional.layer_norm(x, (16,), block.norm1.weight, block.norm1.bias, 1e-6)
        weight, heads = block.attn.qkv.weight, []
        q = normed @ weight[:16].T + block.attn.q_bias
        k = normed @ weight[16:32].T
        v = normed @ weight[32:].T + block.attn.v_bias
        for one in (slice(0, 8), slice(8, 16)):
            heads.append((q[:, one] @ k[:, one].T / 8**0.5).softmax(-1) @ v[:, one])
        x = x + torch.cat(heads, 1) @ block.attn.proj.weight.T + block.attn.proj.bias
        normed = functional.layer_norm(x, (16,), block.norm2.weight, block.norm2.bias, 1e-6)
        hidden = normed @ block.fc1.weight.T + block.fc1.bias
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        x = x + hidden @ block.fc2.weight.T + block.fc2.bias
    return x


@pytest.mark.parametrize("mode", MODES)
def test_with_fresh_adapters_it_is_a_plain_vit_chunk_by_chunk(mode: str) -> None:
    module, frames = build(mode=mode, fresh=True), video()
    with torch.no_grad():
        found = module(frames)
        for window in range(2):
            tokens = [by_definition(module, chunk) for chunk in frames[window].split(4)]
            expected = torch.cat(tokens).view(6, 4, 16).mean(1).T
            torch.testing.assert_close(found[window], expected, rtol=1e-4, atol=1e-4)
        plain = build(mode="full")
        plain.load_state_dict(module.state_dict(), strict=False)
        assert torch.equal(plain(frames), found), "adapters add exactly nothing"


def test_an_adapter_is_its_formula() -> None:
    adapter = Adapter(16, 4)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 7, 3, 16)  # windows, steps, places, channels
    z = functional.gelu(x @ adapter.down.weight.T + adapter.down.bias)
    a = torch.empty_like(z)
    for window in range(2):
        for place in range(3):
            line = z[window, :, place].T[None]
            line = functional.conv1d(
                line, adapter.depthwise.weight[..., 0], adapter.depthwise.bias, padding=1, groups=4
            )
            a[window, :, place] = functional.conv1d(line, adapter.pointwise.weight[..., None], adapter.pointwise.bias)[
                0
            ].T
    expected = adapter.gamma * ((z + a) @ adapter.up.weight.T + adapter.up.bias)
    torch.testing.assert_close(adapter(x), expected, rtol=1e-4, atol=1e-5)


def test_adapters_start_as_published() -> None:
    adapter = Adapter(384, 96)
    assert adapter.gamma.item() == 1
    assert not adapter.up.weight.any()
    assert not any(part.bias.any() for part in (adapter.down, adapter.depthwise, adapter.pointwise, adapter.up))
    for part, deviation in (
        (adapter.down, 0.02),
        (adapter.depthwise, (2 / 3) ** 0.5),
        (adapter.pointwise, (2 / 96) ** 0.5),
    ):
        assert part.weight.std().item() == pytest.approx(deviation, rel=0.15)


def test_ladder_adds_what_adapters_make_of_the_outputs_beside_them() -> None:
    module, frames = build(mode="side", first_adapter=1), video(windows=1)
    with torch.no_grad():
        tokens = module.embed(frames[0].unflatten(0, (3, 4)))
        outputs = [tokens := block(tokens) for block in module.blocks]
        steps = [x.reshape(1, 6, 4, 16) for x in outputs]
        expected = steps[2] + module.adapters[0](steps[1]) + module.adapters[1](steps[2])
        torch.testing.assert_close(module(frames), expected.mean(2).transpose(1, 2), rtol=1e-4, atol=1e-4)


# --- positions -----------------------------------------------------------------------------------------------------------


def bicubic(inside: int, outside: int) -> np.ndarray:
    """(outside, inside): Keys' cubic convolution with a = -0.75, half-pixel centres, borders repeated."""
    weights = np.zeros((outside, inside))
    for row in range(outside):
        centre = (row + 0.5) * inside / outside - 0.5
        for source in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x, a = abs(centre - source), -0.75
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            weights[row, min(max(source, 0), inside - 1)] += near if x <= 1 else far
    return weights


@pytest.mark.parametrize("side", [10, 14])
def test_positions_are_videomaes_table_resized_step_by_step(side: int) -> None:
    found = build_positions(dataclasses.replace(SIZE_S, frame_size=16 * side)).numpy()
    j = np.arange(384)
    angles = np.arange(8 * 14 * 14)[:, None] / 10000 ** (2 * (j // 2) / 384)
    table = np.where(j % 2 == 0, np.sin(angles), np.cos(angles)).reshape(8, 14, 14, 384)
    weights = bicubic(14, side)
    expected = np.einsum("yh,xw,thwc->tyxc", weights, weights, table)
    np.testing.assert_allclose(found.reshape(8, side, side, 384), expected, atol=2e-5)


# --- what reaches what ---------------------------------------------------------------------------------------------------


def reached(module: Backbone, chunk: int = 3, chunks: int = 7) -> list[int]:
    """The chunks whose features an impulse in the pixels of `chunk` changes, told by gradients."""
    frames = video(1, chunks).float().requires_grad_()
    features = module(frames)
    found = []
    for other in range(chunks):
        (gradient,) = torch.autograd.grad(features[..., 2 * other : 2 * other + 2].sum(), frames, retain_graph=True)
        if gradient[0].unflatten(0, (chunks, 4))[chunk].any():
            found.append(other)
    return found


def test_chunks_meet_in_adapters_alone() -> None:
    assert reached(build(mode="full")) == [3]
    assert reached(build(fresh=True)) == [3]
    assert reached(build(num_layers=1)) == [2, 3, 4]
    assert reached(build(num_layers=2)) == [1, 2, 3, 4, 5]
    cut = build(num_layers=2)
    with torch.no_grad():
        for adapter in cut.adapters:
            adapter.depthwise.weight[:, :, [0, 2]] = 0  # what looks back and ahead
    assert reached(cut) == [3]


def test_windows_do_not_meet() -> None:
    module, frames = build(), video()
    with torch.no_grad():
        torch.testing.assert_close(module(frames)[:1], module(frames[:1]), rtol=1e-4, atol=1e-5)


# --- modes ---------------------------------------------------------------------------------------------------------------

TRAINS = {"adapter": ("adapters.",), "side": ("adapters.",), "frozen": (), "full": ("patch.", "blocks.")}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_mode_trains_its_part(mode: str, checkpointing: bool) -> None:
    module = build(mode=mode, checkpointing=checkpointing, drop_path=0.2)
    assert len(module.adapters) == {"adapter": 3, "side": 2}.get(mode, 0)
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == name.startswith(TRAINS[mode] or "none"), name
    frames = video().float().requires_grad_()
    features = module(frames)
    assert features.requires_grad == (mode != "frozen")
    if mode != "frozen":
        features.square().sum().backward()
    assert gradients(module).keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    assert (frames.grad is not None) == (mode in ("adapter", "full")), (
        "what is beside the ViT has no gradient through it"
    )


@pytest.mark.parametrize("mode", ["adapter", "full", "side"])
def test_computing_activations_again_changes_no_gradient(mode: str) -> None:
    frames, found = video(), []
    for checkpointing in (False, True):
        module = build(mode=mode, checkpointing=checkpointing, drop_path=0.5)
        torch.manual_seed(1)
        module(frames).square().sum().backward()
        found.append(gradients(module))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0] | found[1])


@pytest.mark.parametrize("mode", MODES)
def test_chunks_at_once_change_nothing(mode: str) -> None:
    frames = video(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(
            build(mode=mode, chunks_at_once=3)(frames), build(mode=mode)(frames), rtol=1e-4, atol=1e-5
        )


def test_branches_are_skipped_in_training_alone_and_more_often_in_later_blocks() -> None:
    module, frames = build(drop_path=0.5), video()
    x = torch.zeros(20_000, 1, 16)
    assert module.kept(x, 0) is None
    for depth, rate in ((1, 0.25), (2, 0.5)):
        kept = module.kept(x, depth)
        assert kept is not None
        assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
        assert (kept == 0).float().mean(1).flatten().tolist() == pytest.approx([rate, rate], abs=0.02)
    with torch.no_grad():
        assert not torch.equal(module(frames), module(frames))
        module.eval()
        assert torch.equal(module(frames), module(frames))
        for mode in ("frozen", "side"):
            resting = build(mode=mode, drop_path=0.5)
            assert torch.equal(resting(frames), resting(frames))


# --- numbers and compilation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_gives_float_features(mode: str) -> None:
    module, frames = build(mode=mode, checkpointing=True), video()
    with torch.autocast("cpu", torch.bfloat16):
        found = module(frames)
    assert found.dtype == torch.float32
    expected = module(frames)
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(module(frames.float()), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_has_no_graph_break(mode: str) -> None:
    module, frames = build(mode=mode, num_layers=2, checkpointing=True, drop_path=0.5, chunks_at_once=2), video(1)
    compiled, found = torch.compile(module, backend="eager", fullgraph=True), []
    for step in (module, compiled):
        module.zero_grad()
        torch.manual_seed(1)
        features = step(frames)
        if features.requires_grad:
            features.square().sum().backward()
        found.append({"features": features.detach()} | gradients(module))
    for key in found[0] | found[1]:
        torch.testing.assert_close(found[1][key], found[0][key])
