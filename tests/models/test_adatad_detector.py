"""ActionFormer's layers against their definition, written out with loops; its size against the published one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.adatad import targets
from models.adatad.config import DetectorConfig
from models.adatad.detector import Block, Branch, Detector

PUBLISHED = DetectorConfig(dim=512, num_heads=4, mlp_dim=2048, stem_layers=2, num_levels=6, drop_path=0.1)
TINY = DetectorConfig(dim=8, num_heads=2, mlp_dim=12, stem_layers=1, num_levels=3, drop_path=0.0)


def count(*modules: nn.Module | nn.Parameter) -> int:
    parameters = (p for m in modules for p in ([m] if isinstance(m, nn.Parameter) else m.parameters()))
    return sum(p.numel() for p in parameters)


def build(config: DetectorConfig = TINY, input_dim: int = 6, num_classes: int = 5) -> Detector:
    """A detector none of whose parameters is still 0 or 1."""
    detector = Detector(config, input_dim, num_classes).eval()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return detector


def test_size_is_the_published_one() -> None:
    with torch.device("meta"):
        detector = Detector(PUBLISHED, 384, 20)
        logits, offsets, valid = detector(torch.empty(2, 384, 768), torch.empty(2, 768, dtype=torch.bool))
    assert logits.shape == (2, 1512, 20) and offsets.shape == (2, 1512, 2) and valid.shape == (2, 1512)
    assert count(detector) == 26_695_708 and len(list(detector.parameters())) == 229
    assert count(detector.embed) == 1_378_304 and count(detector.neck) == 6_144
    assert [count(block) for block in (*detector.stem, *detector.branch)] == 7 * [3_161_088]
    assert count(detector.classes, detector.offsets, *detector.scales) == 3_183_644


def test_initial_values() -> None:
    detector = Detector(replace(TINY, dim=64), 6, 5)
    assert torch.allclose(detector.classes.answer.get_parameter("bias").sigmoid(), torch.tensor(0.01))
    scales = [part.scale for part in detector.modules() if isinstance(part, Branch)]
    assert len(scales) == 6 and all((scale == 1e-4).all() for scale in scales)
    assert [scale.item() for scale in detector.scales] == [1.0, 1.0, 1.0]
    biases = {name: p for name, p in detector.named_parameters() if name.endswith("bias")}
    assert [name for name, bias in biases.items() if bias.any()] == ["classes.answer.bias"]


def test_what_is_masked_reaches_nothing() -> None:
    detector, mask = build(), torch.ones(2, 16, dtype=torch.bool)
    mask[0, 11:] = False
    features = torch.randn(2, 6, 16, requires_grad=True)
    other = torch.where(mask[:, None], features, 100.0)
    found, again = detector(features, mask), detector(other, mask)
    for ours, theirs in zip(found[:2], again[:2], strict=True):
        assert torch.equal(ours[found[2]], theirs[found[2]])
        (gradient,) = torch.autograd.grad(ours[found[2]].square().sum(), features, retain_graph=True)
        assert not gradient[0, :, 11:].any() and (gradient[0, :, :11].any(0) & gradient[1, :, :11].any(0)).all()


def test_valid_points_are_those_on_valid_steps() -> None:
    mask = torch.arange(16) < torch.tensor([[16], [11], [1]])
    valid = build()(torch.randn(3, 6, 16), mask)[2]
    assert torch.equal(valid, targets.valid(targets.points(16, 3), mask))


def test_neighbours_in_the_batch_change_nothing() -> None:
    detector, features = build(), torch.randn(3, 6, 16)
    mask = torch.arange(16) < torch.tensor([[16], [11], [4]])
    whole = detector(features, mask)
    for row in range(3):
        alone = detector(features[row : row + 1], mask[row : row + 1])
        torch.testing.assert_close([part[0] for part in alone], [part[row] for part in whole])


# --- the block, written out ----------------------------------------------------------------------------------------------


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """(T, C)."""
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def local(x: Tensor, part: nn.Module, stride: int, length: int) -> Tensor:
    """Depth-wise convolution of three steps, zero outside, the mask, norm and projection."""
    weight, rows = part.conv.weight[:, 0], []  # (C, 3)
    for t in range(0, len(x), stride):
        row = torch.zeros_like(x[0])
        for k, at in enumerate((t - 1, t, t + 1)):
            if 0 <= at < len(x):
                row = row + weight[:, k] * x[at]
        rows.append(row if t // stride < length else torch.zeros_like(row))
    return norm(torch.stack(rows), part.norm) @ part.project.weight.T + part.project.bias


def reference(block: Block, x: Tensor, length: int) -> Tensor:
    """(T, C) -> (T / stride, C), of which `length` steps are valid; no drop-path."""
    stride, attn = block.stride, block.attn
    normed = norm(x, block.norm1)
    q, k, v = (local(normed, part, stride, length) for part in (attn.query, attn.key, attn.value))
    size = q.shape[1] // attn.num_heads
    found = torch.zeros_like(q)
    for h in range(attn.num_heads):
        own = slice(h * size, (h + 1) * size)
        for t in range(length):
            weights = torch.stack([(q[t, own] * k[s, own]).sum() for s in range(length)]).div(math.sqrt(size)).exp()
            found[t, own] = (weights[:, None] * v[:length, own]).sum(0) / weights.sum()
    found = found @ attn.out.weight.T + attn.out.bias
    inside = (torch.arange(len(q)) < length)[:, None]
    skip = x
    if stride == 2:
        around = [[x[at] for at in (t - 1, t, t + 1) if 0 <= at < len(x)] for t in range(0, len(x), 2)]
        skip = torch.stack([torch.stack(rows).amax(0) for rows in around])
    x = skip * inside + block.branch1.scale * found * inside
    hidden = functional.gelu(norm(x, block.norm2) @ block.fc1.weight.T + block.fc1.bias)
    return x + block.branch2.scale * (hidden @ block.fc2.weight.T + block.fc2.bias) * inside


@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_is_its_definition(stride: int) -> None:
    block = Block(TINY, stride).double().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    x, mask = torch.randn(2, 8 * stride, 8).double(), torch.arange(8) < torch.tensor([[8], [5]])
    x[1, 5 * stride :] = 0
    found = block(x, mask)
    for row, length in enumerate((8, 5)):
        torch.testing.assert_close(found[row], reference(block, x[row], length))


def test_drop_path_leaves_out_whole_branches() -> None:
    branch = Branch(4, 0.25).train()
    found = branch(torch.ones(4000, 3, 4)) / 1e-4
    rows = found.flatten(1)
    assert (rows == rows[:, :1]).all()
    assert sorted(rows[:, 0].unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert rows[:, 0].mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(branch.eval()(torch.ones(2, 3, 4)), torch.full((2, 3, 4), 1e-4))


def test_towers_are_shared_and_each_level_has_a_scale() -> None:
    """The same sequence on two levels gives the same logits, and offsets in the proportion of the levels' scales."""
    detector, sequence, mask = build(), torch.randn(1, 16, 8), torch.ones(1, 16, dtype=torch.bool)
    with torch.no_grad():
        for scale, value in zip(detector.scales, (1.0, 3.0, 0.5), strict=True):
            scale.fill_(value)
    detector.pyramid = lambda x, mask: (3 * [sequence], 3 * [mask])
    logits, offsets, _ = (part.chunk(3, 1) for part in detector(torch.randn(1, 6, 16), mask))
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close([offsets[1], offsets[2]], [3 * offsets[0], 0.5 * offsets[0]])
    assert (offsets[0] >= 0).all() and (offsets[0] > 0).any()
