"""TriLip, the judge of AudioScore: CLIP and PaSST, both frozen, and a head for each of image, text and sound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel

from models.family import InputError, LoadReport
from models.weights import load_matching

WRAPPED = "module."  # before every key of the published file
NAMES = {  # of the published file -> here
    "vis_scaler.": "image_head.",
    "txt_scaler.": "text_head.",
    "aud_scaler.": "audio_head.",
    "w_1.": "wide.",
    "w_2.": "narrow.",
    "layer_norm.": "norm.",
    "a_model.linear.": "audio_projection.",
}
SAME = 2e-3  # how far CLIP's weights may differ: the published file has been half precision


class Head(nn.Module):
    """A residual feed-forward layer with its norm behind."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.wide = nn.Linear(width, hidden)
        self.narrow = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.norm(x + self.narrow(functional.relu(self.wide(x))))


class TriLip(nn.Module):
    """Embeddings of frames, texts and sounds in one space of CLIP's projection width. For judging, not for training.

    `audio` is any module that turns what `embed_audio` is given into tokens (B, T, audio_width): PaSST.
    """

    def __init__(self, clip: CLIPModel, audio: nn.Module, audio_width: int, hidden: int = 2048) -> None:
        super().__init__()
        width = clip.visual_projection.out_features
        self.clip, self.audio = clip, audio
        self.audio_projection = nn.Linear(audio_width, width)
        self.image_head, self.text_head, self.audio_head = (Head(width, hidden) for _ in range(3))
        self.scales = nn.Parameter(torch.full((2,), math.log(1 / 0.07)))  # image with text, audio with text

    def embed_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels as CLIP wants them -> (B, E)."""
        return self.image_head(clip_image(self.clip, pixels))

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) tokens of CLIP's tokenizer and which of them are there -> (B, E)."""
        return self.text_head(clip_text(self.clip, ids, mask))

    def embed_audio(self, sound: Tensor) -> Tensor:
        """What `audio` takes, of B clips -> (B, E), the mean over its tokens."""
        return self.audio_head(self.audio_projection(self.audio(sound))).mean(1)


def clip_image(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """CLIP's own embedding (B, E) of pixels (B, 3, H, W), not of unit length."""
    return clip.visual_projection(clip.vision_model(pixels).pooler_output)


def clip_text(clip: CLIPModel, ids: Tensor, mask: Tensor) -> Tensor:
    """CLIP's own embedding (B, E) of tokens (B, L), not of unit length."""
    return clip.text_projection(clip.text_model(ids, mask).pooler_output)


def load_published(
    module: TriLip, state: Mapping[str, Tensor], read_audio: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
) -> LoadReport:
    """Load the published file's tensors. CLIP stays as it is: InputError where the file was trained with another one.

    `read_audio` turns PaSST's tensors, under the names that PaSST publishes, into a state of `module.audio`.
    """
    state = {key.removeprefix(WRAPPED): value for key, value in state.items()}
    theirs, ours = state.get("vl_model.visual.proj"), module.clip.visual_projection.weight
    if theirs is None or theirs.T.shape != ours.shape or (theirs.T.float().to(ours) - ours).abs().max() > SAME:
        raise InputError(
            "it belongs to another CLIP than the one given; give the folder of openai/clip-vit-base-patch32"
        )
    found: dict[str, Tensor] = {f"clip.{key}": value for key, value in module.clip.state_dict().items()}
    for key, value in state.items():
        for old, new in NAMES.items():
            key = key.replace(old, new)
        if key.split(".")[0] in ("image_head", "text_head", "audio_head", "audio_projection"):
            found[key] = value
    if "logit_scale1" in state and "logit_scale2" in state:
        found["scales"] = torch.stack([state["logit_scale1"], state["logit_scale2"]]).flatten()
    prefix = "a_model.net."
    sound = read_audio({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
    return load_matching(module, found | {f"audio.{key}": value for key, value in sound.items()})
