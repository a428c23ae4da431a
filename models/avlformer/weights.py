"""Checkpoints of FAVDBench into all of the module; of Video Swin, PaSST and BERT into its parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import nn

from models import passt
from models.avlformer.bert import Bert, Layer
from models.avlformer.config import FinetuneConfig
from models.avlformer.swin import PATCH, VideoSwin, WindowAttention
from models.embed import resize_grid
from models.family import InputError, LoadReport
from models.passt import PaSST
from models.weights import Found, Rules, State, rename

LINKS = "learn_vid_att.weight"

# Beginnings and ends of keys, theirs and ours.
VIDEO: Rules = (
    (r"^backbone\.", ""),
    (r"^layers\.(\d+)\.blocks\.", lambda match: f"features.{2 * int(match[1])}."),
    (r"^layers\.(\d+)\.downsample\.", lambda match: f"features.{2 * int(match[1]) + 1}."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)
TEXT: Rules = (
    (r"\.gamma$", ".weight"),  # of a LayerNorm, in Google's own names
    (r"\.beta$", ".bias"),
    (r"^bert\.", ""),
    (r"^embeddings\.word_embeddings\.", "words."),
    (r"^embeddings\.position_embeddings\.", "positions."),
    (r"^embeddings\.token_type_embeddings\.", "segments."),
    (r"^embeddings\.LayerNorm\.", "norm."),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.self\.", "."),
    (r"\.attention\.output\.dense\.", ".proj."),
    (r"\.attention\.output\.LayerNorm\.", ".norm1."),
    (r"\.intermediate\.dense\.", ".fc1."),
    (r"\.output\.dense\.", ".fc2."),
    (r"\.output\.LayerNorm\.", ".norm2."),
    (r"^cls\.predictions\.transform\.dense\.", "head.dense."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "head.norm."),
    (r"^cls\.predictions\.(decoder\.)?bias$", "decoder.bias"),
    (r"^cls\.predictions\.decoder\.", "decoder."),
)
# What has no place here: classifiers, and what is computed from the sizes.
BESIDE = {
    "video": r"^cls_head\.|^head\.|relative_position_index$|\.attn_mask$",
    "text": r"^(bert\.)?(pooler\.|embeddings\.position_ids$|img_embedding\.)|^cls\.seq_relationship\.|^cls_img_feat\.",
}
# Heads of the published models by their width: with another number the weights have the same shapes.
HEADS = {"audio": {192: 3, 384: 6, 768: 12}, "text": {128: 2, 256: 4, 512: 8, 768: 12, 1024: 16}}
SECTION = "avlformer.model"
# What of the section decides the sizes of our tensors; the first beginning or end that fits counts.
SIZES = (
    (r"^video\..*_table$", "video.window and video.num_heads"),
    (r"^video\.", "video.embed_dim"),
    (r"^audio\.time$", "audio.seconds and audio.stride"),
    (r"^audio\.pitch$", "audio.num_mel_bins and audio.stride"),
    (r"^audio\.", "audio.hidden_size"),
    (r"^bert\..*\.fc[12]\.", "text.hidden_size and text.intermediate_size"),
    (r"^bert\.", "text.hidden_size"),
    (r"^links\.", "video.num_frames, video.frame_size, audio.seconds, audio.patchout_time and audio.patchout_freq"),
    (r"", "feature_dim"),
)
NUMBERS = {  # what decides how many tensors there are, by the module's attribute
    "video": "video.depths",
    "audio": "audio.num_layers",
    "bert": "text.num_layers",
    "links": "mask",
}


def names(config: FinetuneConfig) -> dict[str, str]:
    """The checkpoint of the slot `all`; and where that is none, of `video`, `audio` and `text`."""
    model = config.model
    parts = {"video": model.video.model_name, "audio": model.audio.model_name, "text": model.text.model_name}
    whole = model.model_name != "none"
    return {"all": model.model_name, **{slot: "none" if whole else name for slot, name in parts.items()}}


def load(module: nn.Module, slot: str, state: State) -> LoadReport:
    """Fill the module, or the part of a slot, with a checkpoint; InputError where it is of another kind or size.

    Every tensor of the checkpoint has a place or is one of those known to have none, and every one of ours is filled,
    but for BERT's head where a checkpoint has no head.
    """
    if slot == "all":
        return load_released(module, state)
    attribute, read = SLOTS[slot]
    found, dropped = read(getattr(module, attribute), state)
    return _fill(module, {f"{attribute}.{key}": value for key, value in found.items()}, dropped, [attribute])


def load_released(module: nn.Module, state: State) -> LoadReport:
    """Fill all of the module with FAVDBench's model.bin."""
    prefixes = tuple(prefix for prefix, _ in RELEASED.values())
    lost = [prefix for prefix in prefixes if not any(key.startswith(prefix) for key in state)]
    if lost:
        raise InputError(f"the checkpoint is no model.bin of FAVDBench: no key of it begins with {lost[0]}")
    unknown = [key for key in state if key != LINKS and not key.startswith(prefixes)]
    if unknown:
        raise InputError(f"it has {unknown[0]} and {len(unknown) - 1} more tensors that FAVDBench's model.bin has not")
    found: Found = {}
    dropped: list[str] = []
    for attribute, (prefix, read) in RELEASED.items():
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        own, beside = read(getattr(module, attribute), inside)
        found |= {f"{attribute}.{key}": (prefix + theirs, value) for key, (theirs, value) in own.items()}
        dropped += [prefix + key for key in beside]
    if module.links is None:
        dropped += [LINKS] if LINKS in state else []
    elif LINKS in state:
        side = round(state[LINKS].numel() ** 0.5)
        found["links.weight"] = LINKS, state[LINKS].view(side, -1) if side**2 == state[LINKS].numel() else state[LINKS]
    taken = {theirs for theirs, _ in found.values()}
    return _fill(module, found, [key for key in dropped if key not in taken], [*RELEASED, "links"])


def read_video(swin: VideoSwin, state: State) -> tuple[Found, list[str]]:
    """mmaction's keys, torchvision's or those of a Swin for pictures, which is made to last in time; and those dropped.

    Of pictures (Liu et al. 2022, §3.3): the same patch in each of its frames, and the same biases at every distance in time.
    """
    found, dropped = rename(state, VIDEO, BESIDE["video"])
    stem = "patch_embed.proj.weight"
    if stem not in found or "features.0.0.attn.qkv.weight" not in found:
        raise InputError(
            "the checkpoint is no Video Swin: it lacks patch_embed.proj.weight or the first stage's attention"
        )
    if found[stem][1].ndim == 4:
        attention = cast(WindowAttention, swin.get_submodule("features.0.0.attn"))
        time, rows, columns = (2 * side - 1 for side in attention.window)
        for key, (theirs, value) in found.items():
            if key == stem:
                found[key] = theirs, value[:, :, None].repeat(1, 1, PATCH[0], 1, 1) / PATCH[0]
            elif key.endswith("_table"):
                found[key] = theirs, resize_grid(value.float(), rows, columns).repeat(time, 1)
    return found, dropped


def read_audio(module: PaSST, state: State) -> tuple[Found, list[str]]:
    """PaSST's keys, and those dropped."""
    found, dropped = passt.read_published(module, state)
    _check_heads("audio", module.hidden_size, module.num_heads)
    return found, dropped


def read_text(bert: Bert, state: State) -> tuple[Found, list[str]]:
    """Keys of transformers' BERT with or without a head, and those dropped."""
    found, dropped = rename(state, TEXT, BESIDE["text"])
    if "words.weight" not in found or "layers.0.query.weight" not in found:
        raise InputError("the checkpoint is no BERT: it lacks embeddings.word_embeddings.weight or its first layer")
    there, here = len(found["words.weight"][1]), bert.words.num_embeddings
    if there != here:
        raise InputError(
            f"the checkpoint has {there} wordpieces and the vocabulary here {here}; give it its own vocab.txt"
        )
    _check_heads("text", bert.words.embedding_dim, cast(Layer, bert.layers[0]).num_heads)
    words = found["words.weight"]
    tied = bert.decoder.weight is bert.words.weight
    if tied and "decoder.weight" in found and not torch.equal(found["decoder.weight"][1], words[1]):
        raise InputError(f"its words and answers have different weights; set {SECTION}.text.tie_weights to false")
    if tied or "head.dense.weight" in found:  # a head without weights of its own answers with those of the words
        found.setdefault("decoder.weight", words)
    return found, dropped


def read_linear(linear: nn.Linear, state: State) -> tuple[Found, list[str]]:
    """Keys of a linear layer, which are ours."""
    return {key: (key, value) for key, value in state.items()}, []


Reader = Callable[..., tuple[Found, list[str]]]
SLOTS: Mapping[str, tuple[str, Reader]] = {  # the module's attribute, and who reads its checkpoints
    "video": ("video", read_video),
    "audio": ("audio", read_audio),
    "text": ("bert", read_text),
}
# Where FAVDBench's model.bin keeps the parts, by the module's attribute.
RELEASED: Mapping[str, tuple[str, Reader]] = {
    "video": ("swin.backbone.", read_video),
    "video_proj": ("fc.", read_linear),
    "audio": ("passt.net.", read_audio),
    "audio_proj": ("passt.linear.", read_linear),
    "features": ("trans_encoder.bert.img_embedding.", read_linear),
    "bert": ("trans_encoder.", read_text),
}


def _check_heads(slot: str, width: int, num_heads: int) -> None:
    published = HEADS[slot].get(width, num_heads)
    if num_heads != published:
        raise InputError(
            f"{SECTION}.{slot}.num_heads is {num_heads}; the published one of {width} channels has {published}"
        )


def _fill(module: nn.Module, found: Found, dropped: Sequence[str], attributes: Sequence[str]) -> LoadReport:
    """Fill what of the module begins with one of `attributes`, all but BERT's head where `found` has none."""
    own = {key: value for key, value in module.state_dict().items() if key.split(".")[0] in attributes}
    number = f"set {SECTION}.%s to the checkpoint's"
    for key, (theirs, value) in found.items():
        if key not in own:
            raise InputError(
                f"it has {theirs}, which has no place here; {number % NUMBERS.get(key.split('.')[0], 'feature_dim')}"
            )
        if own[key].shape != value.shape:
            values = next(values for pattern, values in SIZES if re.search(pattern, key))
            raise InputError(
                f"{theirs} is {tuple(value.shape)} there and {tuple(own[key].shape)} here; {number % values}"
            )
    fresh = [key for key in own if key not in found]
    headless = "bert.head.dense.weight" not in found
    lost = [key for key in fresh if not (headless and key.startswith(("bert.head.", "bert.decoder.")))]
    if lost:
        advice = number % NUMBERS.get(lost[0].split(".")[0], "feature_dim")
        raise InputError(f"it has nothing for {lost[0]} and {len(lost) - 1} more tensors here; {advice}")
    module.load_state_dict({key: value for key, (_, value) in found.items()}, strict=False)
    return LoadReport(sorted(found), fresh, sorted(dropped))
