"""A small module of avlformer, and small checkpoints of what it is filled with, under the keys of the originals."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import SwinTransformer3d
from transformers import BertConfig, BertForPreTraining

from models.avlformer.config import AudioConfig, ModelConfig, TextConfig, VideoConfig
from models.avlformer.data import HEAD
from models.avlformer.model import Finetune, tiny
from models.family import Facts

State = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)
VIDEO = VideoConfig("none", False, False, 8, 32, 8, [2, 2], [1, 2], [2, 4, 4], 0.0)
AUDIO = AudioConfig("none", False, 16000, 0.6, 36, 8, 1, 2, 10, 0, 0)  # a grid of 3 x 5 patches
TEXT = TextConfig("none", 16, 2, 2, 24, 8, 0.0, False)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(25))]
VOCABULARY = len(WORDS)
LINKS = 4 * 4 * 4 + 3 * 5 + 1


def build(mask: Literal["none", "learned"] = "learned", legacy: bool = False, **change: dict[str, Any]) -> Finetune:
    """The module with the sizes above, but for those that are to `change` in one of its sections."""
    torch.manual_seed(7)
    parts = {"video": VIDEO, "audio": AUDIO, "text": TEXT}
    parts |= {name: dataclasses.replace(cast(Any, parts[name]), **values) for name, values in change.items()}
    sizes = ModelConfig("none", **cast(Any, parts), feature_dim=12, mask=mask, legacy=legacy)
    config = dataclasses.replace(tiny(), model=sizes)
    return Finetune(config, Facts({HEAD: WORDS}, 0.0, 1.0)).eval()


def randomised(module: Module) -> Module:
    """The module with weights far from where they start, always the same ones, in evaluation mode."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


def swin3d() -> SwinTransformer3d:
    """A Video Swin of torchvision with the sizes above."""
    return randomised(SwinTransformer3d([2, 4, 4], 8, [2, 2], [1, 2], [2, 4, 4], stochastic_depth_prob=0.0))


def mmaction(state: State, first: int) -> State:
    """Keys of torchvision as the authors have them, where the first stage of `features` is that of number `first`."""
    found = {}
    for key, value in state.items():
        match = re.match(r"features\.(\d+)\.(.*)", key)
        if match:
            number, rest = int(match[1]) - first, match[2]
            rest = rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
            key = f"layers.{number // 2}." + (f"downsample.{rest}" if number % 2 else f"blocks.{rest}")
        found[key] = value
    return found


def passt(layers: int = 1, columns: int = 5) -> State:
    """Weights under PaSST's names, for a grid of 3 rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "cls_token": (1, 1, 8),
        "dist_token": (1, 1, 8),
        "new_pos_embed": (1, 2, 8),
        "freq_new_pos_embed": (1, 8, 3, 1),
        "time_new_pos_embed": (1, 8, 1, columns),
        "patch_embed.proj.weight": (8, 1, 16, 16),
        "patch_embed.proj.bias": (8,),
        "norm.weight": (8,),
        "norm.bias": (8,),
        "head.0.weight": (8,),
        "head.0.bias": (8,),
        "head.1.weight": (4, 8),
        "head.1.bias": (4,),
        "head_dist.weight": (4, 8),
        "head_dist.bias": (4,),
    }
    parts = {
        "norm1": (8,),
        "attn.qkv": (24, 8),
        "attn.proj": (8, 8),
        "norm2": (8,),
        "mlp.fc1": (32, 8),
        "mlp.fc2": (8, 32),
    }
    for i in range(layers):
        for part, shape in parts.items():
            shapes |= {f"blocks.{i}.{part}.weight": shape, f"blocks.{i}.{part}.bias": shape[:1]}
    return {key: torch.randn(shape, generator=generator) * 0.2 for key, shape in shapes.items()}


def transformers_bert(kind: type, **change: Any) -> nn.Module:
    """A BERT of transformers with the sizes above."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return randomised(kind(BertConfig(vocab_size=VOCABULARY, **sizes, **change)))


def released() -> State:
    """A small model.bin."""
    text = transformers_bert(BertForPreTraining).state_dict()
    text = {key: v for key, v in text.items() if not re.search(r"seq_relationship|decoder\.bias", key)}
    text["cls.predictions.decoder.weight"] = torch.randn(VOCABULARY, 16)  # not tied there
    text |= {"bert.img_embedding.weight": torch.randn(16, 12), "bert.img_embedding.bias": torch.randn(16)}
    text |= {"cls_img_feat.predictions.decoder.weight": torch.randn(12, 16)}
    video = mmaction({key: v for key, v in swin3d().state_dict().items() if not key.startswith("head.")}, 0)
    state = {f"trans_encoder.{key}": value for key, value in text.items()}
    state |= {f"swin.backbone.{key}": value for key, value in video.items()}
    state |= {
        f"passt.net.{key}": value for key, value in passt().items() if not key.startswith(("head.1", "head_dist"))
    }
    state |= {"fc.weight": torch.randn(12, 16), "fc.bias": torch.randn(12)}
    state |= {"passt.linear.weight": torch.randn(12, 8), "passt.linear.bias": torch.randn(12)}
    return state | {"learn_vid_att.weight": torch.randn(LINKS**2, 1)}


def expected_tokens(peer: SwinTransformer3d, frames: Tensor) -> Tensor:
    """Tokens (B, N, C) of torchvision's Video Swin before it takes their mean."""
    return peer.norm(peer.features(peer.patch_embed(frames.transpose(1, 2)))).flatten(1, 3)


def every(module: Finetune) -> tuple[Tensor, Tensor]:
    """All rows and columns of patches of sound."""
    return torch.arange(module.audio.grid[0]), torch.arange(module.audio.grid[1])
