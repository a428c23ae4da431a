"""Weights in 8 bits: how far off, how small, and what they compute."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save
from torch import nn

from models.weights import SCALE, Int8Linear, compute_in_int8, dequantise, quantise, to_int8


class Mixed(nn.Module):
    """Everything that has weights."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.video = nn.Conv3d(3, 32, 3)
        self.layer = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(64, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.image(x) + self.video(x[:, :, None].expand(-1, -1, 3, -1, -1)).mean((2, 3, 4))
        return self.head(self.transformer(self.layer(seen)[:, None])[:, 0])


@pytest.fixture
def module() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


def test_each_row_is_at_most_half_a_step_off() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 3) * torch.tensor([0, 1e-4, 0.01, 1, 50, 1e4]).view(-1, 1, 1, 1)
    stored, scale = to_int8(weight)
    assert stored.dtype == torch.int8
    back = dequantise({"w": stored, f"w{SCALE}": scale})["w"]
    assert ((back - weight).abs() <= 0.5001 * scale.view(-1, 1, 1, 1)).all()
    assert stored.flatten(1).abs().amax(1).tolist() == [0, 127, 127, 127, 127, 127]


def test_a_state_is_a_quarter_and_goes_back(module: Mixed) -> None:
    state = quantise(module)
    size = {
        name: len(save({k: v.contiguous() for k, v in s.items()}))
        for name, s in (("f", module.state_dict()), ("i", state))
    }
    assert size["i"] < 0.35 * size["f"]
    back = dequantise(state)
    assert back.keys() == module.state_dict().keys()
    for key, value in module.state_dict().items():
        assert back[key].dtype == value.dtype
        torch.testing.assert_close(back[key], value, atol=float(value.abs().max()) / 200, rtol=0)
    plain = module.state_dict()
    assert all(torch.equal(value, plain[key]) for key, value in dequantise(plain).items())


def test_answers_stay_close_and_linear_layers_stay_in_int8(module: Mixed) -> None:
    state, x = quantise(module), torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        expected = module(x)
        module.load_state_dict(dequantise(state))
        compute_in_int8(module, state)
        found = module(x)
        alone = module(x[:1])
    assert isinstance(module.layer[0], Int8Linear) and isinstance(module.head, Int8Linear)
    assert type(module.transformer.layers[0].linear1) is nn.Linear
    assert (found - expected).norm() < 0.05 * expected.norm()
    torch.testing.assert_close(alone[0], found[0], atol=1e-5, rtol=1e-4)


def test_int8_product_is_the_float_product_of_what_is_rounded() -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(40, 7).requires_grad_(False), torch.randn(2, 3, 40)
    x[0, 0] = 0
    weight, scale = to_int8(plain.weight)
    ranges = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    rounded = (x / ranges).round() * ranges
    expected = rounded @ (weight.float() * scale[:, None]).T + plain.bias
    before = x.clone()
    torch.testing.assert_close(Int8Linear(weight, scale, plain.bias)(x), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(x, before)
