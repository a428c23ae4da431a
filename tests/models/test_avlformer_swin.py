"""avlformer's Video Swin against torchvision's, and what training does with it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.video import swin3d_b
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d, SwinTransformer3d

from models.avlformer.config import VideoConfig, num_video_tokens
from models.avlformer.swin import VideoSwin, WindowAttention

SMALL = VideoConfig(
    model_name="none",
    freeze=False,
    checkpointing=False,
    num_frames=6,
    frame_size=40,
    embed_dim=8,
    depths=[2, 2],
    num_heads=[1, 2],
    window=[2, 4, 4],
    drop_path=0.0,
)
BASE = dataclasses.replace(
    SMALL,
    num_frames=32,
    frame_size=224,
    embed_dim=128,
    depths=[2, 2, 18, 2],
    num_heads=[4, 8, 16, 32],
    window=[8, 7, 7],
)


def build(**change) -> VideoSwin:
    torch.manual_seed(0)
    swin = VideoSwin(dataclasses.replace(SMALL, **change))
    for parameter in swin.parameters():
        nn.init.normal_(parameter, std=0.2)
    return swin


def video() -> Tensor:
    return torch.randn(2, 6, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def test_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        swin, peer = VideoSwin(BASE), swin3d_b()
        tokens = swin(torch.empty(1, 32, 3, 224, 224))
    assert sum(parameter.numel() for parameter in swin.parameters()) == 87_638_984
    assert tokens.shape == (1, 784, 1024)
    assert swin.grid == (16, 7, 7) and swin.width == 1024
    theirs = {key for key in peer.state_dict() if not key.startswith("head.") and not key.endswith("_index")}
    assert swin.state_dict().keys() == theirs


def test_tokens_are_torchvisions_in_order_of_time_row_and_column() -> None:
    swin = build()
    peer = SwinTransformer3d([2, 4, 4], 8, [2, 2], [1, 2], [2, 4, 4], stochastic_depth_prob=0.0)
    peer.load_state_dict(swin.state_dict(), strict=False)
    with torch.no_grad():
        x = peer.norm(peer.features(peer.patch_embed(video().transpose(1, 2))))
        found = swin(video())
    assert found.shape == (2, num_video_tokens(SMALL), 16)
    for place, (t, h, w) in {0: (0, 0, 0), 1: (0, 0, 1), 5: (0, 1, 0), 25: (1, 0, 0), 74: (2, 4, 4)}.items():
        torch.testing.assert_close(found[:, place], x[:, t, h, w], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, x.flatten(1, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((4, 14, 14), (8, 7, 7), (4, 3, 3)),  # cut in time, no shift there
        ((16, 7, 7), (8, 7, 7), (4, 3, 3)),  # one window in rows and columns, as in the last stage
        ((6, 8, 8), (4, 3, 3), (0, 0, 0)),
        ((9, 8, 5), (4, 3, 3), (2, 1, 1)),  # filled up on every side
        ((2, 2, 2), (4, 3, 3), (2, 1, 1)),  # all in one window
    ],
)
def test_windows_shifts_and_gradients_are_torchvisions(
    size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    ours, theirs = WindowAttention(8, window, shift, 2), ShiftedWindowAttention3d(8, list(window), list(shift), 2)
    nn.init.normal_(ours.relative_position_bias_table)
    missing, _ = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing == ["relative_position_index"]
    assert torch.equal(ours.index, theirs.get_buffer("relative_position_index"))
    x = torch.randn(2, *size, 8)
    found, expected = ours(x), theirs(x)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_what_only_the_shift_brought_together_stays_apart() -> None:
    attention = WindowAttention(8, (2, 2, 2), (1, 1, 1), 2)
    x = torch.randn(1, 4, 4, 4, 8, requires_grad=True)
    attention(x)[0, 0, 0, 0].sum().backward()
    assert x.grad is not None
    reached = x.grad[0].abs().sum(-1) > 1e-12
    assert reached[0, 0, 0]
    assert reached.sum() == 1  # the shift makes the first corner a window of its own


def gradients(module: nn.Module, found: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    found.square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def test_checkpointing_changes_no_gradient_even_with_branches_left_out() -> None:
    found = {}
    for checkpointing in (False, True):
        swin = build(checkpointing=checkpointing, drop_path=0.5).train()
        torch.manual_seed(3)
        found[checkpointing] = gradients(swin, swin(video()))
    assert len(found[True]) == len(list(build().parameters()))
    for name, expected in found[False].items():
        torch.testing.assert_close(found[True][name], expected)


def test_the_chance_to_leave_a_branch_out_rises_to_the_last_block() -> None:
    rates = [part.p for name, part in build(drop_path=0.3).named_modules() if name.endswith("stochastic_depth")]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_frozen_it_is_the_same_in_training_as_in_evaluation() -> None:
    swin = build(freeze=True, drop_path=0.5).train()
    assert not any(parameter.requires_grad for parameter in swin.parameters())
    assert torch.equal(swin(video()), swin.eval()(video()))


def test_a_training_step_with_checkpointing_compiles_without_a_break() -> None:
    swin = build(checkpointing=True, num_frames=4, depths=[2, 1]).train()
    frames = video()[:, :4]
    expected = gradients(swin, swin(frames))
    compiled = torch.compile(swin, fullgraph=True, backend="aot_eager")
    found = gradients(swin, compiled(frames))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)
