"""Weights into modules: every key matched or reported; what of them is trained; and weights in 8 bits."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.family import InputError, LoadReport

State = Mapping[str, Tensor]
Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]  # of renaming: pattern, and what stands for it
Found = dict[str, tuple[str, Tensor]]  # by our key: what the checkpoint calls it, and the tensor as it is here
SCALE = ":scale"  # ends the key of the scales that an int8 tensor is multiplied by
LARGE: dict[type[nn.Module], str] = {  # what has nearly all of a module's weights; everything else stays as it is
    nn.Linear: "weight",
    nn.Conv2d: "weight",
    nn.Conv3d: "weight",
    nn.MultiheadAttention: "in_proj_weight",
}


def load_matching(module: nn.Module, state: Mapping[str, Tensor], fresh: tuple[str, ...] = ()) -> LoadReport:
    """Load what `module` and `state` share. Keys that start with one of `fresh` may be missing and stay as they are.

    InputError for any other missing key and for a shape that differs: it is another architecture's checkpoint.
    """
    own, advice = module.state_dict(), "give the model section the values it was trained with"
    for key, value in own.items():
        if key in state and state[key].shape != value.shape:
            raise InputError(
                f"checkpoint of another architecture: {key} is {tuple(state[key].shape)} there and {tuple(value.shape)} "
                f"here; {advice}"
            )
    missing = [key for key in own if key not in state]
    lost = [key for key in missing if not key.startswith(fresh)] if fresh else missing
    if lost:
        raise InputError(
            f"checkpoint of another architecture: it lacks {lost[0]} and {len(lost) - 1} more tensors; {advice}"
        )
    loaded = {key: value for key, value in state.items() if key in own}
    module.load_state_dict(loaded, strict=False)
    return LoadReport(sorted(loaded), missing, sorted(key for key in state if key not in own))


def rename(state: State, rules: Rules, beside: str) -> tuple[Found, list[str]]:
    """A published checkpoint's tensors by our keys, all rules applied in order; and the keys that match `beside`, left out."""
    found: Found = {}
    dropped: list[str] = []
    for theirs, value in state.items():
        if re.search(beside, theirs):
            dropped.append(theirs)
            continue
        key = theirs
        for pattern, ours in rules:
            key = re.sub(pattern, ours, key)
        found[key] = theirs, value
    return found, dropped


# --- what is trained, and what is frozen ---------------------------------------------------------------------------------


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state without frozen parameters: what training can have changed."""
    frozen = frozen_state(module)
    return {key: value for key, value in module.state_dict().items() if key not in frozen}


def frozen_state(module: nn.Module) -> dict[str, Tensor]:
    """Of the module's state the parameters that are not trained, in the order of their keys."""
    frozen = {key for key, parameter in module.named_parameters() if not parameter.requires_grad}
    return {key: value for key, value in sorted(module.state_dict().items()) if key in frozen}


def frozen_digest(module: nn.Module) -> str:
    """SHA-256 over the bytes of the frozen parameters, in the order of their keys."""
    digest = hashlib.sha256()
    for value in frozen_state(module).values():
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- int8 ----------------------------------------------------------------------------------------------------------------


def quantise(module: nn.Module) -> dict[str, Tensor]:
    """The module's state with the weights of linear layers and convolutions as int8, symmetric.

    Each output channel has its own scale, the channel's greatest magnitude / 127, under the weight's key + ":scale".
    """
    state = dict(module.state_dict())
    for name, part in module.named_modules():
        for kind, parameter in LARGE.items():
            if isinstance(part, kind):
                key = f"{name}.{parameter}"
                state[key], state[key + SCALE] = to_int8(state[key])
    return state


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, ...) floats -> the same in int8, and the scale (rows,) of each row; a row of zeros has the scale 1."""
    greatest = weight.detach().float().flatten(1).abs().amax(1)
    scale = torch.where(greatest > 0, greatest / 127, 1)
    return (weight.detach() / _rows(scale, weight)).round().to(torch.int8), scale


def dequantise(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with every int8 weight as the float32 that it stands for, without scales; another state as it is."""
    found = {key: value for key, value in state.items() if not key.endswith(SCALE)}
    for key, value in found.items():
        if key + SCALE in state:
            found[key] = value.float() * _rows(state[key + SCALE], value)
    return found


def _rows(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weight.ndim - 1))


def compute_in_int8(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace the linear layers that `state` holds in int8, so that they keep 8 bits and multiply them on a CPU.

    Convolutions, for whose activations nobody measured a range, and PyTorch's own transformer layers, whose fused path
    reads weights itself, have their weights back as floats: there int8 makes the file smaller and nothing else.
    """
    fused = [name for name, part in module.named_modules() if isinstance(part, nn.TransformerEncoderLayer)]
    for name, part in list(module.named_modules()):
        key = f"{name}.weight"
        if type(part) is nn.Linear and key + SCALE in state and not any(name.startswith(f"{own}.") for own in fused):
            module.set_submodule(name, Int8Linear(state[key], state[key + SCALE], part.bias))


class Int8Linear(nn.Module):
    """A linear layer with int8 weights; on a CPU its inputs are rounded to int8 too, each token by its own range.

    So the result does not depend on the other clips of the batch. On a GPU the weights are made floats as they are used.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if x.device.type != "cpu":
            return functional.linear(x, (self.weight * self.scale[:, None]).to(x.dtype), self.bias)
        rows = x.reshape(-1, x.shape[-1])
        ranges = rows.abs().amax(1, keepdim=True).clamp_(min=1e-12).div_(127)
        out = torch._int_mm((rows / ranges).round_().to(torch.int8), self.weight.T).float()  # pyright: ignore[reportPrivateImportUsage]
        out = out.mul_(ranges).mul_(self.scale)
        out = out if self.bias is None else out.add_(self.bias)
        return out.view(*x.shape[:-1], -1)
