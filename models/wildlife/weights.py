"""Checkpoints of VideoMAE (transformers) and ResNet (torchvision) into the encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.family import InputError, LoadReport
from models.wildlife.config import PhaseConfig
from models.wildlife.encoders import AudioEncoder, VideoEncoder, VideoMAE

PARTS = {  # of a layer: ours and theirs
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}


def names(config: PhaseConfig) -> dict[str, str]:
    """The checkpoint of each encoder; none for the CNN, which has none."""
    video = config.model.video_encoder
    return {
        "video": video.model_name if video.kind == "videomae" else "none",
        "audio": config.model.audio_encoder.pretrained,
    }


def fallback(config: PhaseConfig, slot: str) -> PhaseConfig | None:
    """The same with the small CNN, trained from random weights, where VideoMAE's cannot be had and the config wants that."""
    video = config.model.video_encoder
    if slot != "video" or video.fallback == "error":
        return None
    instead = replace(video, kind=video.fallback, freeze_backbone=False)
    return replace(config, model=replace(config.model, video_encoder=instead))


def load_encoder(module: nn.Module, slot: str, state: Mapping[str, Tensor]) -> LoadReport:
    """Fill the encoder of the slot `video` or `audio`; InputError where the checkpoint is of another kind or size."""
    encoder = getattr(module, f"{slot}_encoder")
    load = load_videomae if slot == "video" else load_resnet
    return load(encoder, state)


def load_videomae(encoder: VideoEncoder, state: Mapping[str, Tensor]) -> LoadReport:
    """Fill a video encoder; the decoder and the classifier are dropped, the final norm is kept where there is one."""
    assert isinstance(encoder.body, VideoMAE)
    state = {key.removeprefix("videomae."): value for key, value in state.items()}
    try:
        found, used = _videomae(encoder.body, state)
    except KeyError as error:
        raise InputError(f"the checkpoint is no VideoMAE: it lacks {error.args[0]}") from None
    advice = (
        "set video_feature_dim, num_layers, num_heads, patch_size and tubelet of wildlife.model to the checkpoint's"
    )
    more = f"encoder.layer.{len(encoder.body.blocks)}.layernorm_before.weight"
    if more in state:
        raise InputError(f"the checkpoint does not fit: it has {more}, a layer more than here; {advice}")
    return _fill(encoder, found, [key for key in state if key not in used], advice)


def _videomae(body: VideoMAE, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Our tensors made of theirs, and the keys that went into them. Keys have no bias in VideoMAE: ours is zero."""
    used: set[str] = set()

    def take(*names: str) -> Tensor:
        name = next((name for name in names if name in state), names[0])
        used.add(name)
        return state[name]

    stem = "embeddings.patch_embeddings.projection"
    found = {"body.patch.weight": take(f"{stem}.weight").flatten(1), "body.patch.bias": take(f"{stem}.bias")}
    for i in range(len(body.blocks)):
        theirs, ours = f"encoder.layer.{i}", f"body.blocks.{i}"
        for kind in ("weight", "bias"):
            for part, source in PARTS.items():
                found[f"{ours}.{part}.{kind}"] = take(f"{theirs}.{source}.{kind}")
        rows = f"{theirs}.attention.attention"
        weights = [take(f"{rows}.{row}.weight") for row in ("query", "key", "value")]
        query = take(f"{rows}.q_bias", f"{rows}.query.bias")  # as on the hub, as newer versions write it
        value = take(f"{rows}.v_bias", f"{rows}.value.bias")
        found[f"{ours}.attn.qkv.weight"] = torch.cat(weights)
        found[f"{ours}.attn.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    norm = next((name for name in ("fc_norm", "layernorm") if f"{name}.weight" in state), None)
    if norm:
        found |= {f"norm.{kind}": take(f"{norm}.{kind}") for kind in ("weight", "bias")}
    return found, used


def load_resnet(encoder: AudioEncoder, state: Mapping[str, Tensor]) -> LoadReport:
    """Fill an audio encoder. The stem's one channel has the sum over RGB: it answers as to the same grey picture in all."""
    if "conv1.weight" not in state or "layer4.0.conv1.weight" not in state:
        raise InputError("the checkpoint is no ResNet of torchvision: it lacks conv1.weight or layer4.0.conv1.weight")
    found = {f"resnet.{key}": value for key, value in state.items() if not key.startswith("fc.")}
    found["resnet.conv1.weight"] = state["conv1.weight"].sum(1, keepdim=True)
    dropped = [key for key in state if key.startswith("fc.")]
    return _fill(encoder, found, dropped, "set audio_encoder.model_name of wildlife.model to the checkpoint's")


def _fill(encoder: nn.Module, found: dict[str, Tensor], dropped: list[str], advice: str) -> LoadReport:
    own = encoder.state_dict()
    for key, value in found.items():
        if key not in own:
            raise InputError(f"the checkpoint does not fit: it has {key}, which is not known here; {advice}")
        if own[key].shape != value.shape:
            raise InputError(
                f"the checkpoint does not fit: {key} is {tuple(value.shape)} there and {tuple(own[key].shape)} here; {advice}"
            )
    fresh = [key for key in own if key not in found]
    lost = [key for key in fresh if not key.startswith("norm.") and not key.endswith("num_batches_tracked")]
    if lost:
        raise InputError(f"the checkpoint does not fit: it lacks {lost[0]} and {len(lost) - 1} more tensors; {advice}")
    encoder.load_state_dict(found, strict=False)
    return LoadReport(sorted(found), fresh, sorted(dropped))
