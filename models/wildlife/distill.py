"""A student of wildlife: the same model, smaller, that learns from a frozen teacher's answers and from the annotations."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import nn

from models.family import Batch, Facts, InputError
from models.losses import distillation
from models.wildlife.config import HEADS, DistillConfig, FinetuneConfig, ModelConfig, check
from models.wildlife.model import Finetune, HeadLoss, tiny_model


class Distill(nn.Module):
    """Per head alpha T^2 KL(teacher / T || student / T) + (1 - alpha) cross-entropy (Hinton et al. 2015).

    The teacher speaks of every clip, also where a head is not annotated.
    """

    def __init__(self, config: DistillConfig, facts: Facts) -> None:
        check(config.model, "wildlife.distill.model")
        if not 0 <= config.alpha <= 1 or config.temperature <= 0:
            raise InputError(
                f"params.yaml: wildlife.distill has alpha {config.alpha} and temperature {config.temperature}; alpha lies "
                "between 0 and 1, temperature above 0"
            )
        super().__init__()
        self.config = config
        self.student = Finetune(as_finetune(config), facts)

    def forward(self, batch: Batch) -> Batch:
        """Training: the losses, with `teacher_<head>_logits` (B, C) in the batch. Evaluation: as `Finetune`."""
        answer = self.student.answer(batch)
        if not self.training:
            return answer
        alpha, losses, terms = self.config.alpha, {}, []
        for head in HEADS:
            logits, head_loss = answer[f"{head}_logits"], cast(HeadLoss, self.student.losses[head])
            losses[f"loss_{head}"], hard = head_loss(logits, batch[head])
            soft = distillation(logits, batch[f"teacher_{head}_logits"], self.config.temperature).mean()
            losses[f"loss_{head}_teacher"] = soft.detach()
            terms.append(alpha * head_loss.scale * soft + (1 - alpha) * hard)
        return {"loss": torch.stack(terms).sum(), **losses}


def as_finetune(config: DistillConfig) -> FinetuneConfig:
    """What `Finetune` must know of a student; the teacher has settled how much each class weighs."""
    return FinetuneConfig(
        model=config.model,
        augment=config.augment,
        species_weight=config.species_weight,
        activity_weight=config.activity_weight,
        uncertainty=False,
        label_smoothing=config.label_smoothing,
        imbalance="none",
        beta=0.0,
        tau=0.0,
        balanced_sampler=False,
    )


def tiny_student() -> ModelConfig:
    """Half of the smallest model."""
    model = tiny_model()
    audio = replace(model.audio_encoder, model_name="resnet10")
    return replace(model, audio_encoder=audio, video_feature_dim=8, fusion_hidden_dim=8, fusion_num_layers=1)
