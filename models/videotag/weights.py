"""Weights of the original VideoTag (PaddlePaddle) and of torchvision's ResNets into the modules, and back.

Keys on the original's side are those of its .pdparams files. Beside them a state may have `labels`: the names of its classes
by id, one a line, as UTF-8 bytes (uint8); then a classifier's rows can be matched by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from models.family import InputError, LoadReport
from models.videotag.config import TaggerConfig, TsnConfig
from models.videotag.data import unique
from models.videotag.model import Tagger
from models.videotag.pooling import FusedLSTM, PeepholeLSTM, Recurrent
from models.videotag.tsn import Tsn

Sources = dict[str, tuple[str, Callable[[Tensor], Tensor]]]  # by our key the source's key, and what it becomes here

LABELS = "labels"
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # of each stage, by depth
NORM = {"scale": "weight", "offset": "bias", "mean": "running_mean", "variance": "running_var"}  # theirs, torchvision's


def as_is(value: Tensor) -> Tensor:
    """The tensor itself."""
    return value


def names(config: TsnConfig | TaggerConfig) -> dict[str, str]:
    """The weights that the phase starts from."""
    return {"model": config.model.model_name}


# --- TSN -----------------------------------------------------------------------------------------------------------------


def resnet_keys(depth: int) -> dict[str, str]:
    """The original's key of each of torchvision's of a ResNet of bottlenecks, without the classifier."""
    found = {"conv1.weight": "conv1_weights"} | _norm("bn1", "bn_conv1")
    for stage, num in enumerate(BLOCKS[depth], 1):
        for j in range(num):
            letters = depth == 50 or stage != 3
            block = f"{stage + 1}{chr(97 + j)}" if letters or j == 0 else f"{stage + 1}b{j}"
            ours = f"layer{stage}.{j}"
            for i, branch in enumerate("abc", 1):
                found[f"{ours}.conv{i}.weight"] = f"res{block}_branch2{branch}_weights"
                found |= _norm(f"{ours}.bn{i}", f"bn{block}_branch2{branch}")
            if j == 0:
                found[f"{ours}.downsample.0.weight"] = f"res{block}_branch1_weights"
                found |= _norm(f"{ours}.downsample.1", f"bn{block}_branch1")
    return found


def _norm(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}_{name}" for name, kind in NORM.items()}


def load_tsn(module: nn.Module, slot: str, state: Mapping[str, Tensor]) -> LoadReport:
    """Fill the TSN from the original's or torchvision's weights; the classifier as the config's `head` says."""
    module = cast("Tsn", module)
    depth, advice = module.config.model.depth, "give videotag.tsn.model.depth the checkpoint's"
    own = module.resnet.state_dict()
    if "conv1_weights" in state:
        if depth == 18:
            raise InputError(
                "it is a TSN of the original, whose ResNets have 50 layers at least; give depth the checkpoint's"
            )
        keys = resnet_keys(depth)
        weight, bias = (state.get(f"fc_0.{part}") for part in ("w_0", "b_0"))
        head = (None if weight is None else weight.T), bias
    elif "conv1.weight" in state:
        keys = {key: key for key in own if not key.endswith("num_batches_tracked") or key in state}
        head = state.get("fc.weight"), state.get("fc.bias")
    else:
        raise InputError("it is neither a ResNet of torchvision nor a TSN of the original: it has no conv1")
    found = {f"resnet.{key}": (name, as_is) for key, name in keys.items()}
    beside = {"fc_0.w_0", "fc_0.b_0", "fc.weight", "fc.bias", LABELS}
    beside |= {key for key in state if key.endswith("num_batches_tracked")}
    return _fill(
        module, found, state, beside, Head(module.fc, "fc", module.labels, module.config.model.head, *head), advice
    )


def tsn_to_paddle(module: Tsn) -> dict[str, Tensor]:
    """The TSN's weights under the original's keys."""
    state = module.resnet.state_dict()
    found = {theirs: state[ours] for ours, theirs in resnet_keys(module.config.model.depth).items()}
    return found | {"fc_0.w_0": module.fc.weight.detach().T, "fc_0.b_0": module.fc.bias.detach()}


# --- tagger --------------------------------------------------------------------------------------------------------------

GATES = (1, 2, 0, 3)  # rows of PyTorch's LSTM are i, f, g, o, columns of the original's g, i, f, o
BACK = (2, 0, 1, 3)  # and the other way round
FRAMES = "branches.frames"


def reordered(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """The four blocks along the first dimension in another order."""
    return torch.cat([weight.chunk(4)[i] for i in order])


def load_tagger(module: nn.Module, slot: str, state: Mapping[str, Tensor]) -> LoadReport:
    """Fill a tagger with a recurrent pooling from the original's weights; the last layer as the config's `head` says.

    The original's dropout scales by what is kept in evaluation: where ours is not `legacy_dropout`, the layers that read
    the scaled states carry that factor. nn.LSTM has no peepholes: weights with any are refused for it.
    """
    module = cast("Tagger", module)
    model, pooling = module.config.model, module.branches["frames"]
    if "rgb_fc.w_0" not in state:
        raise InputError("it is no tagger of the original: it has no rgb_fc.w_0")
    if not isinstance(pooling, Recurrent) or model.audio or len(model.hidden) != 2:
        raise InputError(
            "it is the original's tagger; set videotag.tagger.model.pooling to peephole, audio to false and hidden to its "
            "two widths"
        )
    kept = 1.0 if model.legacy_dropout else 1.0 - model.dropout
    found: Sources = {
        f"{FRAMES}.embed.weight": ("rgb_fc.w_0", lambda value: value.T),
        f"{FRAMES}.embed.bias": ("rgb_fc.b_0", as_is),
        f"{FRAMES}.attend.score.weight": ("rgb_weight.w_0", lambda value: value.T * kept),
        "hidden.0.weight": ("fc1.w_0", lambda value: value.T * kept),
        "hidden.0.bias": ("fc1.b_0", as_is),
        "hidden.1.weight": ("fc2.w_0", lambda value: value.T),
        "hidden.1.bias": ("fc2.b_0", as_is),
    }
    state = dict(state)
    for key, value in _lstm_from_paddle(pooling, state).items():
        name = f"lstm {key}"  # made of several of theirs, whose place it takes
        state[name] = value
        found[f"{FRAMES}.lstm.{key}"] = (name, as_is)
    weight = state.get("output.w_0")
    head = Head(
        module.output,
        "output",
        module.labels,
        model.head,
        None if weight is None else weight.T,
        state.get("output.b_0"),
    )
    beside = {"output.w_0", "output.b_0", LABELS}
    advice = "give videotag.tagger.model the checkpoint's feature_dim, embedding_size, lstm_size and hidden"
    return _fill(module, found, state, beside, head, advice)


def _lstm_from_paddle(pooling: Recurrent, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The LSTM's tensors, made of the original's, which leave `state`."""
    try:
        each = [
            [state.pop(name).float() for name in (f"rgb_fc_{way}.w_0", f"rgb_lstm_{way}.w_0", f"rgb_lstm_{way}.b_0")]
            for way in ("forward", "backward")
        ]
    except KeyError as error:
        raise InputError(f"it is no whole tagger of the original: it lacks {error.args[0]}") from None
    size = each[0][1].shape[0]
    if isinstance(pooling.lstm, PeepholeLSTM):
        return {
            "project.weight": torch.cat([project.T for project, _, _ in each]),
            "recurrent": torch.stack([recurrent for _, recurrent, _ in each]),
            "bias": torch.cat([bias.view(1, -1) for _, _, bias in each]),
        }
    found = {}
    for name, (project, recurrent, bias) in zip(("ahead", "back"), each, strict=True):
        bias = bias.flatten()
        if bias[4 * size :].any():
            raise InputError(
                "its LSTM has peepholes, for which pooling lstm has no place; set videotag.tagger.model.pooling to peephole"
            )
        found[f"{name}.weight_ih_l0"] = reordered(project.T, GATES)
        found[f"{name}.weight_hh_l0"] = reordered(recurrent.T, GATES)
        found[f"{name}.bias_ih_l0"] = reordered(bias[: 4 * size], GATES)
        found[f"{name}.bias_hh_l0"] = torch.zeros(4 * size)
    return found


def tagger_to_paddle(module: Tagger) -> dict[str, Tensor]:
    """The weights of a tagger with a recurrent pooling, two hidden layers and no sound under the original's keys."""
    model, state = module.config.model, module.state_dict()
    kept = 1.0 if model.legacy_dropout else 1.0 - model.dropout
    found = {
        "rgb_fc.w_0": state[f"{FRAMES}.embed.weight"].T,
        "rgb_fc.b_0": state[f"{FRAMES}.embed.bias"],
        "rgb_weight.w_0": state[f"{FRAMES}.attend.score.weight"].T / kept,
    }
    layers = (("fc1", "hidden.0", kept), ("fc2", "hidden.1", 1.0), ("output", "output", 1.0))
    for theirs, ours, scale in layers:
        found[f"{theirs}.w_0"] = state[f"{ours}.weight"].T / scale
        found[f"{theirs}.b_0"] = state[f"{ours}.bias"]
    lstm = cast("Recurrent", module.branches["frames"]).lstm
    for i, way in enumerate(("forward", "backward")):
        parts = _direction_to_paddle(lstm, i)
        for name, value in zip((f"rgb_fc_{way}.w_0", f"rgb_lstm_{way}.w_0", f"rgb_lstm_{way}.b_0"), parts, strict=True):
            found[name] = value
    return {key: value.contiguous() for key, value in found.items()}


def _direction_to_paddle(lstm: nn.Module, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input weights (E, 4H), recurrent ones (H, 4H) and the bias with the peepholes (1, 7H) of direction 0 or 1."""
    state = lstm.state_dict()
    if isinstance(lstm, PeepholeLSTM):
        return state["project.weight"].chunk(2)[i].T, state["recurrent"][i], state["bias"][i : i + 1]
    assert isinstance(lstm, FusedLSTM)
    name = ("ahead", "back")[i]
    project, recurrent = (reordered(state[f"{name}.weight_{kind}_l0"], BACK).T for kind in ("ih", "hh"))
    bias = reordered(state[f"{name}.bias_ih_l0"] + state[f"{name}.bias_hh_l0"], BACK)
    return project, recurrent, torch.cat([bias, bias.new_zeros(3 * len(recurrent))])[None]


# --- what goes where -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """A classifier, and the one of the weights that are loaded."""

    layer: nn.Linear
    key: str  # of the layer in the module
    labels: Sequence[str]  # of the layer's classes
    how: str  # fresh | id | name
    weight: Tensor | None  # (classes there, width)
    bias: Tensor | None


def _fill(
    module: nn.Module, found: Sources, state: Mapping[str, Tensor], beside: set[str], head: Head, advice: str
) -> LoadReport:
    """Fill what has a source, by our key its key and what it becomes here; nothing but those `beside` may be left over."""
    own, values, used = module.state_dict(), {}, {name for name, _ in found.values()}
    for key, (name, convert) in found.items():
        if name not in state:
            raise InputError(f"it lacks {name}; {advice}")
        value = convert(state[name])
        if value.shape != own[key].shape:
            raise InputError(f"{name} is {tuple(value.shape)} and {key} {tuple(own[key].shape)} here; {advice}")
        values[key] = value
    unknown = sorted(state.keys() - used - beside)
    if unknown:
        raise InputError(f"it has {unknown[0]} and {len(unknown) - 1} more tensors that have no place here; {advice}")
    rows = _matches(head, state.get(LABELS))
    module.load_state_dict(values, strict=False)
    _copy_rows(head, rows)
    filled = [f"{head.key}.weight", f"{head.key}.bias"] if rows else []
    fresh = [key for key in own if key not in values and key not in filled]
    dropped = [] if rows else sorted((state.keys() & beside) - used - {LABELS})
    there = class_names(state.get(LABELS))
    lines = [
        f"class {i} {name}: " + (f"from {rows[i]} {there.get(rows[i], '')}".rstrip() if i in rows else "fresh")
        for i, name in enumerate(head.labels)
    ]
    return LoadReport(sorted([*values, *filled]), fresh, dropped, lines)


def class_names(labels: Tensor | None) -> dict[int, str]:
    """Names by id of what `labels` holds; those that occur more than once carry their id. Empty for None."""
    return {} if labels is None else dict(enumerate(unique(bytes(labels.tolist()).decode().split("\n"))))


def _matches(head: Head, labels: Tensor | None) -> dict[int, int]:
    """Our class -> the one there whose weights it gets."""
    if head.how == "fresh":
        return {}
    if head.weight is None or head.bias is None:
        raise InputError("it has no classifier; set `head` of the model section to fresh")
    if head.weight.shape[1] != head.layer.in_features:
        raise InputError(
            f"its classifier reads {head.weight.shape[1]} numbers and ours {head.layer.in_features}; set `head` to fresh"
        )
    if head.how == "id":
        return {i: i for i in range(min(len(head.labels), len(head.weight)))}
    if labels is None:
        raise InputError(
            "it does not tell the names of its classes; import it with its label file, or set `head` to id"
        )
    there = {name: i for i, name in class_names(labels).items()}
    rows = {i: there[name] for i, name in enumerate(head.labels) if name in there}
    if not rows or max(there.values()) >= len(head.weight):
        raise InputError(
            f"none of its {len(there)} classes has a name of ours, or they are not those of its classifier's "
            f"{len(head.weight)}; set `head` to id or fresh"
        )
    return rows


@torch.no_grad()
def _copy_rows(head: Head, rows: Mapping[int, int]) -> None:
    """Weights and biases of matched classes; the others keep what they have."""
    assert not rows or (head.weight is not None and head.bias is not None)
    for ours, theirs in rows.items():
        head.layer.weight[ours] = head.weight[theirs]  # pyright: ignore[reportOptionalSubscript]
        head.layer.bias[ours] = head.bias[theirs]  # pyright: ignore[reportOptionalSubscript]
