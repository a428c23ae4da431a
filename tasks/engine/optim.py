"""The optimizers, their schedules, clipping and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.family import InputError, ParameterGroup

Kind = Literal["adamw", "rmsprop", "sgd"]
Schedule = Literal["cosine", "linear"]


def rest_frozen_parts(module: nn.Module) -> None:
    """Training mode, save for frozen parts: where no parameter of a submodule is trained, dropout and batch norm rest."""
    module.train()
    for part in module.modules():
        parameters = list(part.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            part.eval()


class CenteredRMSProp(torch.optim.Optimizer):
    """Paddle's RMSProp: the gradient over the root of its running variance, to which `eps` is added inside the root.

    PyTorch's own adds it outside. Weight decay is added to the gradient (L2): r and m are the running means of g² and of g,
    each (1 - rho) of the new one, and w -= lr g / sqrt(r - m² + eps).
    """

    def __init__(self, groups: list[dict[str, Any]], rho: float, eps: float = 1e-6) -> None:
        super().__init__(groups, {"rho": rho, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {key: torch.zeros_like(parameter) for key in ("square", "mean")}
                gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
                state["square"].lerp_(gradient.square(), 1 - group["rho"])
                state["mean"].lerp_(gradient, 1 - group["rho"])
                variance = (state["square"] - state["mean"].square()).clamp_(min=0)  # below it only by rounding
                parameter.addcdiv_(gradient, variance.add_(group["eps"]).sqrt_(), value=-group["lr"])


def build_optimizer(
    module: nn.Module,
    lr: float,
    weight_decay: float,
    beta2: float,
    rules: Mapping[str, ParameterGroup],
    kind: Kind = "adamw",
) -> torch.optim.Optimizer:
    """The optimizer over what is trained; decay on weights of two or more dimensions alone.

    adamw (Loshchilov & Hutter 2019) decays apart from the gradient; rmsprop, centred, whose rho is beta2, and sgd with a
    momentum of 0.9 add the decay to it. What begins with a prefix in `rules` is trained as they say. Each group has
    `factor`: its rate over `lr`.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not trained:
        raise InputError("every parameter is frozen, nothing is left to train; unfreeze a part in params.yaml")
    groups = []
    for prefix, rule in [*rules.items(), ("", ParameterGroup(1.0, decay_all=False))]:
        own = [trained.pop(name) for name in list(trained) if name.startswith(prefix)]
        decayed = [p for p in own if rule.decay_all or p.ndim >= 2]
        spared = [p for p in own if not (rule.decay_all or p.ndim >= 2)]
        rate = {"lr": lr * rule.lr, "factor": rule.lr}
        groups += [rate | {"params": decayed, "weight_decay": weight_decay}] if decayed else []
        groups += [rate | {"params": spared, "weight_decay": 0.0}] if spared else []
    if kind == "rmsprop":
        return CenteredRMSProp(groups, beta2)
    if kind == "sgd":
        sharded = any(hasattr(parameter, "full_tensor") for parameter in module.parameters())
        return torch.optim.SGD(groups, momentum=0.9, fused=not sharded)  # the fused one knows no shards
    return torch.optim.AdamW(groups, betas=(0.9, beta2), fused=True)  # unfused: a call per tensor on a CPU


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Each group's rate for the next step: `rate` times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def learning_rate(
    step: int, steps: int, warmup: int, peak: float, floor: float, schedule: Schedule = "cosine"
) -> float:
    """Rate of a step counted from 0: linear up to `peak` at the last of `warmup` steps, then down to `floor`.

    Down goes half a cosine (SGDR, Loshchilov & Hutter 2017, without restarts) or a line (BERT's, Devlin et al. 2019); the step
    after the last one would have `floor` exactly.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    part = (step - warmup) / (steps - warmup)
    left = 1 - part if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * part))
    return floor + (peak - floor) * left


def stepped_rate(step: int, falls: Sequence[int], gamma: float, warmup: int, peak: float) -> float:
    """Rate of a step counted from 0: linear up to `peak` as above, times `gamma` from each of the steps `falls` on."""
    return peak * min(1.0, (step + 1) / max(warmup, 1)) * gamma ** sum(fall <= step for fall in falls)


def clip(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale all gradients to a total norm of at most `limit` (0 = leave them); the norm before that, on the device."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if limit > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # pyright: ignore[reportAttributeAccessIssue]


class MovingAverage:
    """Exponential moving average of a module's weights, starting at the initial ones; other state is copied."""

    def __init__(self, live: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.live = live  # shares memory with the module
        self.state = {key: value.detach().clone() for key, value in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """average = decay x average + (1 - decay) x weights."""
        for key, value in self.live.items():
            if value.is_floating_point():
                self.state[key].lerp_(value, 1 - self.decay)
            else:
                self.state[key].copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module carries the averaged weights inside the block."""
        with torch.no_grad():
            trained = {key: value.clone() for key, value in self.live.items()}
            for key, value in self.live.items():
                value.copy_(self.state[key])
            try:
                yield
            finally:
                for key, value in self.live.items():
                    value.copy_(trained[key])
