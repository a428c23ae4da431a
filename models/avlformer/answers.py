"""What avlformer tells a person about a clip: its description, sentence by sentence, and the files of the original."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from models.avlformer.data import HEAD
from models.avlformer.writing import spell
from models.family import Batch, Facts

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def present(predictions: Batch, facts: Facts) -> list[dict[str, Any]]:
    """The caption of each clip and its confidence, exp(mean log-probability of its wordpieces), in [0, 1]."""
    names = facts.labels[HEAD]
    captions = [spell([int(token) for token in row], names) for row in predictions["tokens"].tolist()]
    confidence = predictions["confidence"].tolist()
    return [{"caption": text, "confidence": sure} for text, sure in zip(captions, confidence, strict=True)]


def sentences(caption: str) -> list[str]:
    """A caption's sentences, with their marks; in FAVDBench's the last one says what is heard."""
    return [part for part in SENTENCE_END.split(caption.strip()) if part]


def coco(answers: Mapping[str, Mapping[str, Any]], facts: Facts) -> dict[str, str]:
    """prediction_coco_fmt.json, as FAVDBench's evaluation writes it: a list of image_id, caption and conf."""
    rows = [{"image_id": clip, "caption": a["caption"], "conf": a["confidence"]} for clip, a in answers.items()]
    return {"prediction_coco_fmt.json": json.dumps(rows, indent=1, ensure_ascii=False) + "\n"}


def by_id(answers: Mapping[str, Mapping[str, Any]], facts: Facts) -> dict[str, str]:
    """prediction.json, {clip: caption}, which FAVDBench's AudioScore reads."""
    captions = {clip: answer["caption"] for clip, answer in answers.items()}
    return {"prediction.json": json.dumps(captions, indent=1, ensure_ascii=False) + "\n"}
