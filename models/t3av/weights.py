"""A ViT checkpoint of transformers into both patch encoders."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.embed import resize_grid
from models.family import InputError, LoadReport
from models.t3av.config import ModelConfig, sound_grid, video_grid
from models.t3av.encoders import Trunk

ENCODERS = ("video_encoder", "audio_encoder")
PARTS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}


def load_vit(module: nn.Module, slot: str, state: Mapping[str, Tensor]) -> LoadReport:
    """Fill both encoders. The class token and the pooler are dropped; tables of positions are resized to our grids.

    The stem takes frames in [-1, 1]; a tubelet's frames share it equally, and the sound's one channel has the mean over RGB.
    """
    assert isinstance(module, Trunk)
    state = {key.removeprefix("vit."): value for key, value in state.items()}
    own = module.state_dict()
    try:
        wanted = {f"{name}.{key}": value for name in ENCODERS for key, value in _encoder(module, name, state).items()}
    except KeyError as error:
        raise InputError(f"the ViT checkpoint of {slot} lacks {error.args[0]}") from None
    for key, value in wanted.items():
        if own[key].shape != value.shape:
            raise InputError(
                f"the ViT checkpoint does not fit: {key} is {tuple(value.shape)} there and {tuple(own[key].shape)} here; "
                "set dim, encoder_layers, encoder_heads and patch_size of t3av.model to the checkpoint's"
            )
    module.load_state_dict(wanted, strict=False)
    used = [key for key in state if not key.startswith(("pooler.", "classifier.")) and "cls_token" not in key]
    fresh = [key for key in own if key not in wanted]
    return LoadReport(sorted(wanted), fresh, sorted(set(state) - set(used)))


def _encoder(module: Trunk, name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's tensors made of the ViT's."""
    encoder = getattr(module, name)
    stem = state["embeddings.patch_embeddings.projection.weight"]  # (D, 3, p, p)
    places = state["embeddings.position_embeddings"][0, 1:]
    config: ModelConfig = module.config.model  # pyright: ignore
    if name == "video_encoder":
        stem = stem[:, :, None].expand(-1, -1, encoder.tubelet, -1, -1) / encoder.tubelet
        grid = video_grid(config)[1:]
    else:
        stem, grid = stem.mean(1), sound_grid(config)
    found = {
        "patch.weight": stem.flatten(1),
        "patch.bias": state["embeddings.patch_embeddings.projection.bias"],
        "places": resize_grid(places, *grid)[None],
        "norm.weight": state["layernorm.weight"],
        "norm.bias": state["layernorm.bias"],
    }
    for i in range(len(encoder.blocks)):
        theirs = f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            for part, source in PARTS.items():
                found[f"blocks.{i}.{part}.{kind}"] = state[f"{theirs}{source}.{kind}"]
            rows = [state[f"{theirs}attention.attention.{row}.{kind}"] for row in ("query", "key", "value")]
            found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(rows)
    return found
