"""What wildlife tells a person about a clip."""

from __future__ import annotations

from typing import Any

from models.family import Batch, Facts
from models.wildlife.config import HEADS


def present(predictions: Batch, facts: Facts) -> list[dict[str, Any]]:
    """Species and activity of each clip with their probabilities, and below top_x all of a head, the likeliest first."""
    answers: list[dict[str, Any]] = [{} for _ in predictions["fused_feature"]]
    for head in HEADS:
        names = facts.labels[head]
        values, places = predictions[f"{head}_logits"].float().softmax(-1).sort(descending=True, stable=True)
        for answer, best, score in zip(answers, places.tolist(), values.tolist(), strict=True):
            answer |= {head: names[best[0]], f"{head}_score": score[0]}
            answer[f"top_{head}"] = [[names[k], s] for k, s in zip(best, score, strict=True)]
    return answers
