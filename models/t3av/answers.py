"""What T3-AV tells a person about a clip."""

from __future__ import annotations

from typing import Any

from models.family import Batch, Facts


def present(predictions: Batch, facts: Facts) -> list[dict[str, Any]]:
    """The most likely sound of each clip with its probability, and below `top` all sounds, the likeliest first."""
    names = facts.labels["label"]
    values, places = predictions["logits"].float().softmax(-1).sort(descending=True, stable=True)
    return [
        {"label": names[best[0]], "score": score[0], "top": [[names[k], s] for k, s in zip(best, score, strict=True)]}
        for best, score in zip(places.tolist(), values.tolist(), strict=True)
    ]
