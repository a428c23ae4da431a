"""Checkpoints of VideoMAE into the backbone, and of OpenTAD's AdaTAD into backbone and detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from models.adatad.backbone import Backbone, fixed_table
from models.adatad.config import FinetuneConfig
from models.family import InputError, LoadReport

ADVICE = "give adatad.model the sizes of the checkpoint"
# Attention heads of the published VideoMAEs by their width: with another number the weights have the same shapes.
HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
# What checkpoints have beside the tokens' way through the ViT.
BESIDE = ("fc_norm.", "norm.", "layernorm.", "head.", "cls_head.", "classifier.", "pos_embed")


@dataclass(frozen=True)
class Layout:
    """What a kind of checkpoint calls the parts of VideoMAE."""

    origin: str
    stem: str
    blocks: str
    parts: Mapping[str, str]  # of a block: ours and theirs
    rows: Sequence[str]  # weights of queries, keys and values, or of all three in this order
    biases: Sequence[str]  # of queries and values


SAME = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attn.proj"}
JOINT = (["attn.qkv.weight"], ["attn.q_bias", "attn.v_bias"])
TRANSFORMERS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
ROWS = [f"attention.attention.{row}.weight" for row in ("query", "key", "value")]
BIASES = [
    [f"attention.attention.{name}" for name in pair] for pair in (("q_bias", "v_bias"), ("query.bias", "value.bias"))
]
PIXELS = "embeddings.patch_embeddings.projection"
LAYOUTS = (
    Layout(
        "mmaction2", "patch_embed.projection", "blocks", SAME | {"fc1": "mlp.layers.0.0", "fc2": "mlp.layers.1"}, *JOINT
    ),
    Layout("VideoMAE's authors", "patch_embed.proj", "blocks", SAME | {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}, *JOINT),
    Layout("transformers 4", PIXELS, "encoder.layer", TRANSFORMERS, ROWS, BIASES[0]),
    Layout("transformers 5", PIXELS, "encoder.layer", TRANSFORMERS, ROWS, BIASES[1]),
)

# Of OpenTAD: beginnings of keys, then parts of them, ours and theirs.
DETECTOR = {
    "embed.": "projection.embed.",
    "stem.": "projection.stem.",
    "branch.": "projection.branch.",
    "neck.": "neck.fpn_norms.",
    "classes.units.": "rpn_head.cls_convs.",
    "classes.answer.": "rpn_head.cls_head.",
    "offsets.units.": "rpn_head.reg_convs.",
    "offsets.answer.": "rpn_head.reg_head.",
    "scales.": "rpn_head.scale.",
}
BLOCK = {
    ".norm1.": ".ln1.",
    ".norm2.": ".ln2.",
    ".fc1.": ".mlp.0.",
    ".fc2.": ".mlp.3.",
    ".branch1.": ".drop_path_attn.",
    ".branch2.": ".drop_path_mlp.",
    ".attn.out.": ".attn.proj.",
    **{f".attn.{row}.conv.": f".attn.{row}_conv.conv." for row in ("query", "key", "value")},
    **{f".attn.{row}.norm.": f".attn.{row}_norm." for row in ("query", "key", "value")},
    **{f".attn.{row}.project.": f".attn.{row}." for row in ("query", "key", "value")},
}
ADAPTER = {"down": "down_proj", "depthwise": "dwconv", "pointwise": "conv", "up": "up_proj", "gamma": "gamma"}
CLASSIFIER = "rpn_head.cls_head.weight"


def names(config: FinetuneConfig) -> dict[str, str]:
    """The checkpoint of the slot `backbone`."""
    return {"backbone": config.model.backbone.model_name}


def load(module: nn.Module, slot: str, state: Mapping[str, Tensor]) -> LoadReport:
    """Fill `module.backbone`; and all of the module where the checkpoint is OpenTAD's, with a detector."""
    assert slot == "backbone"
    released = any(f".{key}".endswith(f".{CLASSIFIER}") for key in state)
    return load_released(module, state) if released else load_backbone(cast(Backbone, module.backbone), state)


def load_backbone(backbone: Backbone, state: Mapping[str, Tensor]) -> LoadReport:
    """Fill the ViT from one of the four layouts; adapters stay fresh, norms and heads behind the ViT are dropped.

    InputError where the checkpoint is of another kind or size, or has anything else.
    """
    layout, prefix = find_layout(state)
    check_sizes(backbone, layout, prefix, state)
    sources = vit_sources(backbone, layout, prefix)
    return _fill(backbone, sources, state, [key for key in state if _is_beside(key, prefix)])


def load_released(module: nn.Module, state: Mapping[str, Tensor]) -> LoadReport:
    """Fill `module.backbone` and `module.detector` from a checkpoint of OpenTAD's AdaTAD, its adapters included.

    The last layer of the classifier stays fresh where the checkpoint knows another number of classes.
    """
    backbone, detector = cast(Backbone, module.backbone), cast(nn.Module, module.detector)
    layout, prefix = find_layout(state)
    check_sizes(backbone, layout, prefix, state)
    root = next(key.removesuffix(CLASSIFIER) for key in state if key.endswith(CLASSIFIER))
    ours = vit_sources(backbone, layout, prefix) | adapter_sources(backbone, prefix)
    sources = {f"backbone.{key}": theirs for key, theirs in ours.items()}
    sources |= {f"detector.{key}": [root + detector_source(key)] for key in detector.state_dict()}
    beside = [key for key in state if key.startswith(f"{root}backbone.") and _is_beside(key, prefix)]
    beside.append(f"{root}rpn_head.loss_normalizer")
    answer = "detector.classes.answer"
    if len(state[root + CLASSIFIER]) != len(module.state_dict()[f"{answer}.weight"]):
        beside += [sources.pop(f"{answer}.{kind}")[0] for kind in ("weight", "bias")]
    return _fill(module, sources, state, beside)


def find_layout(state: Mapping[str, Tensor]) -> tuple[Layout, str]:
    """The layout of a checkpoint, and what stands before all keys of the ViT; InputError where it is none of those known."""
    for layout in LAYOUTS:
        stem = f"{layout.stem}.weight"
        for key in state:
            prefix = key.removesuffix(stem)
            whole = key.endswith(stem) and (not prefix or prefix.endswith("."))
            if whole and f"{prefix}{layout.blocks}.0.{layout.biases[0]}" in state:
                return layout, prefix
    kinds = ", ".join(f"{layout.stem}.weight with {layout.blocks}.0.{layout.biases[0]}" for layout in LAYOUTS)
    raise InputError(f"the checkpoint is no VideoMAE: it has none of {kinds}")


def check_sizes(backbone: Backbone, layout: Layout, prefix: str, state: Mapping[str, Tensor]) -> None:
    """InputError where the width, the patches, the heads or the positions are not those of the config."""
    config, stem = backbone.config, state[f"{prefix}{layout.stem}.weight"]
    if len(stem) != config.dim:
        raise InputError(
            f"its tokens have {len(stem)} channels and adatad.model.backbone.dim is {config.dim}; {ADVICE}"
        )
    cube = (3, config.tubelet, config.patch_size, config.patch_size)
    if stem.shape[1:] != cube:
        raise InputError(
            f"its patches are {tuple(stem.shape[1:])} and here {cube} (channels, frames, pixels); {ADVICE}"
        )
    heads = HEADS.get(config.dim, config.num_heads)
    if heads != config.num_heads:
        raise InputError(
            f"adatad.model.backbone.num_heads is {config.num_heads}; VideoMAE with {config.dim} channels has {heads}"
        )
    positions = state.get(f"{prefix}pos_embed")
    if positions is not None:
        table = fixed_table(config)
        given = positions.flatten(0, -2).float()
        if given.shape != table.shape or not torch.allclose(given, table, atol=1e-3):
            raise InputError(
                f"its pos_embed {tuple(positions.shape)} is not VideoMAE's table of fixed positions for chunk_frames "
                f"{config.chunk_frames} and pretrained_grid {config.pretrained_grid}; {ADVICE}"
            )


def vit_sources(backbone: Backbone, layout: Layout, prefix: str) -> dict[str, list[str]]:
    """The checkpoint's tensors of which each of the ViT's is made, by our key."""
    sources = {f"patch.{kind}": [f"{prefix}{layout.stem}.{kind}"] for kind in ("weight", "bias")}
    for i in range(len(backbone.blocks)):
        ours, theirs = f"blocks.{i}", f"{prefix}{layout.blocks}.{i}"
        for kind in ("weight", "bias"):
            sources |= {f"{ours}.{part}.{kind}": [f"{theirs}.{name}.{kind}"] for part, name in layout.parts.items()}
        sources[f"{ours}.attn.qkv.weight"] = [f"{theirs}.{row}" for row in layout.rows]
        for kind, name in zip(("q_bias", "v_bias"), layout.biases, strict=True):
            sources[f"{ours}.attn.{kind}"] = [f"{theirs}.{name}"]
    return sources


def adapter_sources(backbone: Backbone, prefix: str) -> dict[str, list[str]]:
    """The same of OpenTAD's adapters, which are parts of the blocks or of a ladder beside them."""
    sources: dict[str, list[str]] = {}
    for key in backbone.adapters.state_dict():
        i, part, *kind = key.split(".")
        place = f"ladders.adapters.{i}" if backbone.config.mode == "side" else f"blocks.{i}.adapter"
        sources[f"adapters.{key}"] = [prefix + ".".join([place, ADAPTER[part], *kind])]
    return sources


def detector_source(key: str) -> str:
    """OpenTAD's key of a tensor of the detector."""
    start = next(start for start in DETECTOR if key.startswith(start))
    theirs = DETECTOR[start] + key.removeprefix(start)
    for part, name in BLOCK.items():
        theirs = theirs.replace(part, name)
    return f"{theirs}.scale" if start == "scales." else theirs


def _is_beside(key: str, prefix: str) -> bool:
    """Whether a tensor of VideoMAE is no part of the ViT whose keys begin with `prefix`."""
    return not key.startswith(prefix) or key.removeprefix(prefix).startswith(BESIDE)


def _fill(
    module: nn.Module, sources: Mapping[str, Sequence[str]], state: Mapping[str, Tensor], beside: Sequence[str]
) -> LoadReport:
    """Fill what has `sources`; every other tensor of the checkpoint must be one of those `beside`."""
    used = {name for names in sources.values() for name in names}
    lost = [name for names in sources.values() for name in names if name not in state]
    if lost:
        raise InputError(f"it lacks {lost[0]} and {len(lost) - 1} more tensors; {ADVICE}")
    unknown = sorted(state.keys() - used - set(beside))
    if unknown:
        raise InputError(f"it has {unknown[0]} and {len(unknown) - 1} more tensors that have no place here; {ADVICE}")
    own, found = module.state_dict(), {}
    for key, names in sources.items():
        value = state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])
        shape = value.flatten(1).shape if value.ndim == 5 else value.shape  # patches are a linear layer here
        if [n for n in shape if n > 1] != [n for n in own[key].shape if n > 1]:  # so are convolutions over one step
            raise InputError(f"{names[0]} is {tuple(shape)} and {key} {tuple(own[key].shape)} here; {ADVICE}")
        found[key] = value.reshape(own[key].shape)
    module.load_state_dict(found, strict=False)
    return LoadReport(sorted(found), [key for key in own if key not in found], sorted(state.keys() - used))
