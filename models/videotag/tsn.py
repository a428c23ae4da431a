"""videotag's TSN: a ResNet on a few frames of a clip. What it is before its classifier are features of frames."""

from __future__ import annotations

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from models import tag_scores
from models.family import Batch, Facts
from models.transforms import IMAGENET
from models.videotag.config import TsnConfig, TsnModel, check_tsn
from models.videotag.data import HEAD


class Tsn(nn.Module):
    """Scores of a clip from the mean of its frames' features (TSN, Wang et al. 2016, with the consensus on features).

    Its batch norm sees a process's micro-batch: with other sizes of that, training differs in more than rounding.
    """

    scale: Tensor

    def __init__(self, config: TsnConfig, facts: Facts) -> None:
        check_tsn(config)
        super().__init__()
        self.config, self.labels = config, facts.labels[HEAD]
        self.resnet = getattr(torchvision.models, f"resnet{config.model.depth}")(weights=None)
        dim = self.resnet.fc.in_features
        self.resnet.fc = nn.Identity()
        self.fc = nn.Linear(dim, len(self.labels))
        nn.init.uniform_(self.fc.weight, -(dim**-0.5), dim**-0.5)
        nn.init.zeros_(self.fc.bias)
        self.register_buffer("scale", torch.tensor(IMAGENET)[:, :, None, None], persistent=False)  # (2, 3, 1, 1)

    def extract(self, frames: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 RGB -> (N, dim) float32, each row from its own frame alone in evaluation mode."""
        # Channels last make convolutions faster; weights stay as they are stored and FSDP shards them.
        pixels = frames.to(torch.float32, memory_format=torch.channels_last) / 255
        return self.resnet((pixels - self.scale[0]) / self.scale[1]).float()

    def forward(self, batch: Batch) -> Batch:
        """Training: the loss of the batch's clips. Evaluation: logits (B, C)."""
        frames = batch["frames"]
        features = self.extract(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).mean(1)
        logits = self.fc(features)
        return self.loss(logits, batch["tags"]) if self.training else {"logits": logits}

    def loss(self, logits: Tensor, tags: Tensor) -> Batch:
        """Cross-entropy of the one tag, or binary cross-entropy of each class, its mean; tags (B, C)."""
        if self.config.loss == "softmax":
            return {"loss": functional.cross_entropy(logits.float(), tags.argmax(1))}
        return {"loss": functional.binary_cross_entropy_with_logits(logits.float(), tags)}


class TsnScores:
    """How well predictions["logits"] (B, C) rank the classes of batch["tags"] (B, C)."""

    def __init__(self, config: TsnConfig, facts: Facts) -> None:
        self.single = config.loss == "softmax"
        self.logits: list[Tensor] = []
        self.tags: list[Tensor] = []

    def update(self, predictions: Batch, batch: Batch) -> None:
        """Take one batch."""
        self.logits.append(predictions["logits"].float())
        self.tags.append(batch["tags"].float())

    def compute(self) -> dict[str, float]:
        """top1, top5: share of clips of whose tags one is among their best 1 and 5 classes; map: mean of the average
        precisions of classes that occur, by probabilities; loss, as in training, its mean.
        """
        logits, tags = torch.cat(self.logits), torch.cat(self.tags)
        scores = (logits.softmax(1) if self.single else logits.sigmoid()).numpy()
        truth = tags.numpy() > 0
        areas = tag_scores.average_precisions(scores, truth)
        if self.single:
            loss = functional.cross_entropy(logits.double(), tags.argmax(1))
        else:
            loss = functional.binary_cross_entropy_with_logits(logits.double(), tags.double())
        return {
            "top1": float(tag_scores.hits_at(scores, truth, 1).mean()),
            "top5": float(tag_scores.hits_at(scores, truth, 5).mean()),
            "map": float(np.nanmean(areas)) if truth.any() else float("nan"),
            "loss": float(loss),
        }


def tiny_tsn() -> TsnConfig:
    """The smallest config, for tests on a CPU."""
    return TsnConfig(
        model=TsnModel(depth=18, model_name="none", head="fresh"), seg_num=2, seg_len=1, loss="bce",
        sampling="uniform", fps=1.0, max_frames=4, resize="keep", short_size=40, target_size=32, min_area=1.0,
        flip=False,
    )  # fmt: skip
