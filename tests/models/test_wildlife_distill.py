"""The student of wildlife: its loss by the formula, and what it must not be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import models
from models.family import Facts, InputError
from models.losses import annotated_cross_entropy, distillation
from models.wildlife.distill import Distill

PHASE = models.load("wildlife").phases["distill"]
FACTS = Facts({"species": ["fox", "hare", "wolf"], "activity": ["foraging", "resting"]}, -5.0, 4.0)


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "frames": torch.randint(0, 256, (4, 2, 3, 16, 16), dtype=torch.uint8),
        "wave": 0.1 * torch.randn(4, 8000),
        "wave_length": torch.full((4,), 8000),
        "has_video": torch.ones(4, dtype=torch.bool),
        "has_audio": torch.ones(4, dtype=torch.bool),
        "species": torch.tensor([0, 2, -1, 1]),
        "activity": torch.tensor([1, -1, -1, 0]),
        "teacher_species_logits": torch.randn(4, 3),
        "teacher_activity_logits": torch.randn(4, 2),
    }


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_loss_is_both_parts_of_both_heads(alpha: float) -> None:
    config = replace(PHASE.tiny, alpha=alpha, temperature=3.0, species_weight=2.0, label_smoothing=0.1)
    module = Distill(config, FACTS).train()
    module.requires_grad_(False)
    clips, expected = batch(), torch.tensor(0.0)
    module.student.audio_encoder.eval()
    answer = module.student.answer(clips)
    for head, weight in (("species", 2.0), ("activity", 1.0)):
        logits = answer[f"{head}_logits"]
        hard = annotated_cross_entropy(logits, clips[head], None, 0.1).mean()
        soft = distillation(logits, clips[f"teacher_{head}_logits"], 3.0).mean()
        expected = expected + weight * (alpha * soft + (1 - alpha) * hard)
    torch.testing.assert_close(module(clips)["loss"], expected)


def test_values_that_make_no_sense_are_one_line() -> None:
    with pytest.raises(InputError, match=r"wildlife\.distill has alpha 1\.5"):
        Distill(replace(PHASE.tiny, alpha=1.5), FACTS)
    with pytest.raises(InputError, match=r"wildlife\.distill\.model\.fusion_layer is 7"):
        Distill(replace(PHASE.tiny, model=replace(PHASE.tiny.model, fusion_layer=7)), FACTS)
