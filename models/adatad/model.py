"""adatad's module: a video backbone with adapters and a detector of action segments, trained end to end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.adatad import targets
from models.adatad.backbone import Backbone
from models.adatad.config import BackboneConfig, DetectorConfig, FinetuneConfig, ModelConfig, check
from models.adatad.data import pictures
from models.adatad.detector import Detector
from models.adatad.targets import Points
from models.family import Batch, Facts, ParameterGroup


class Finetune(nn.Module):
    """Segments of actions, their classes and scores, from the frames of a window."""

    normalizer: Tensor
    resize: Tensor
    positions: Tensor
    strides: Tensor
    ranges: Tensor

    def __init__(self, config: FinetuneConfig, facts: Facts) -> None:
        check(config.model)
        super().__init__()
        model = config.model
        self.config = config
        self.num_classes = len(facts.labels["label"])
        self.backbone = Backbone(model.backbone)
        self.detector = Detector(model.detector, model.backbone.dim, self.num_classes)
        # Of the number of positive points in a step's whole batch.
        self.register_buffer("normalizer", torch.tensor(config.normalizer))
        steps = model.window * model.scale_factor // model.backbone.tubelet
        self.register_buffer("resize", interpolation(steps, model.window), persistent=False)
        for name, value in targets.points(model.window, model.detector.num_levels)._asdict().items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, batch: Batch) -> Batch:
        """Training: the losses. Evaluation: of each window the best answers, `clip` (B,) telling the window's video."""
        logits, offsets, valid = self.detector(self.features(pictures(batch)), batch["mask"])
        return self.loss(logits, offsets, valid, batch) if self.training else self.answer(logits, offsets, valid, batch)

    def features(self, frames: Tensor) -> Tensor:
        """(B, T, 3, S, S) -> (B, dim, window) float32: the backbone's, between whose steps lie the grid's."""
        features = self.backbone(frames)
        with torch.autocast(features.device.type, enabled=False):
            return features @ self.resize

    def loss(self, logits: Tensor, offsets: Tensor, valid: Tensor, batch: Batch) -> Batch:
        """Focal loss and 1 - DIoU over the average number of positive points, and their sum.

        Where the batch is a piece of a larger one, which `total_positive` () and `total_clips` () tell, the mean of the
        pieces' losses, by their clips, is the loss of the whole.
        """
        config = self.config
        wanted = targets.assign(
            self.points(), batch["segments"], batch["classes"], batch["mask"], self.num_classes, config.center_radius
        )
        sums = targets.loss_sums(logits, offsets, valid, wanted, config.label_smoothing)
        normalizer, share = self.moved(wanted.positive.sum()), 1.0
        if "total_positive" in batch:
            normalizer, share = self.moved(batch["total_positive"]), len(logits) / batch["total_clips"]
        loss_cls, loss_reg = (each / (normalizer * share) for each in sums)
        return {"loss": loss_cls + loss_reg, "loss_cls": loss_cls.detach(), "loss_reg": loss_reg.detach()}

    def moved(self, total: Tensor) -> Tensor:
        """The average number of positive points with a step's own."""
        return 0.9 * self.normalizer + 0.1 * total.clamp(min=1)

    @torch.no_grad()
    def end_step(self, batch: Batch) -> None:
        """Keep the average that the step's loss was divided by."""
        self.normalizer.copy_(self.moved(batch["total_positive"].to(self.normalizer.device, non_blocking=True)))

    def answer(self, logits: Tensor, offsets: Tensor, valid: Tensor, batch: Batch) -> Batch:
        """starts and ends (B, K) in seconds within the video, scores (B, K), classes (B, K), best first; and whose they are.

        `clip` (B,) and `window_start` (B,) tell the window's video and, in seconds, its place there.
        """
        segments = targets.to_seconds(targets.decode(self.points(), offsets), batch)
        best = targets.best_answers(segments, logits, valid, self.config.min_score, self.config.max_per_window)
        starts, ends = best.pop("segments").unbind(-1)
        return {"starts": starts, "ends": ends, **best, "clip": batch["clip"], "window_start": batch["start"]}

    def points(self) -> Points:
        """The points, on the module's device."""
        return Points(self.positions, self.strides, self.ranges)


def interpolation(steps: int, window: int) -> Tensor:
    """(steps, window): features (…, steps) @ this are interpolated linearly (align_corners False) to the window's steps.

    As a product its gradient is the same in each run, also on a GPU.
    """
    return functional.interpolate(torch.eye(steps)[None], size=window, mode="linear")[0]


def parameter_groups(config: FinetuneConfig) -> Mapping[str, ParameterGroup]:
    """What is trained of the backbone has a rate of its own, and weight decay on all of it (AdaTAD, Liu et al. 2024)."""
    return {"backbone.": ParameterGroup(config.adapter_lr, decay_all=True)}


def tiny_model() -> ModelConfig:
    """The smallest model, for tests on a CPU."""
    return ModelConfig(
        backbone=BackboneConfig(
            model_name="none",
            mode="adapter",
            dim=16,
            num_layers=2,
            num_heads=2,
            mlp_dim=32,
            patch_size=8,
            tubelet=2,
            chunk_frames=4,
            frame_size=16,
            pretrained_grid=2,
            adapter_dim=4,
            first_adapter=1,
            drop_path=0.0,
            checkpointing=False,
            chunks_at_once=0,
        ),
        detector=DetectorConfig(dim=16, num_heads=2, mlp_dim=32, stem_layers=1, num_levels=3, drop_path=0.0),
        window=16,
        scale_factor=1,
        max_segments=4,
    )
