"""wildlife: which animal, and what it does, from picture and sound (VideoMAE, ResNet and a bottleneck transformer)."""

from __future__ import annotations

from typing import Any

from models.family import Family, Phase
from models.metrics import HeadScores
from models.samples import Augmentation
from models.wildlife import answers, data, evaluation, explain, imported, weights
from models.wildlife.config import HEADS, DistillConfig, FinetuneConfig
from models.wildlife.distill import Distill, tiny_student
from models.wildlife.model import Finetune, is_frozen, tiny_model

NO_AUGMENTATION = Augmentation(min_area=1.0, time_mask=0, freq_mask=0, gain=0.0, roll=False, modality_dropout=0.0)
SHARED: dict[str, Any] = {
    "clip": data.clip,
    "transform": data.transform,
    "metrics": lambda config, facts: HeadScores({head: len(facts.labels[head]) for head in HEADS}),
    "best": ("mean_macro_f1", "max"),
    "present": answers.present,
    "pretrained": weights.names,
    "fallback": weights.fallback,
}

FAMILY = Family(
    title="wildlife: species and behaviour from video and sound",
    phases={
        "finetune": Phase(
            Config=FinetuneConfig,
            build=Finetune,
            tiny=FinetuneConfig(
                model=tiny_model(),
                augment=NO_AUGMENTATION,
                species_weight=1.0,
                activity_weight=1.0,
                uncertainty=False,
                label_smoothing=0.0,
                imbalance="none",
                beta=0.999,
                tau=1.0,
                balanced_sampler=False,
            ),
            explain=explain.explain,
            load_pretrained=weights.load_encoder,
            cacheable=is_frozen,
            frequencies=data.frequencies,
            **SHARED,
        ),
        "distill": Phase(
            Config=DistillConfig,
            build=Distill,
            tiny=DistillConfig(
                model=tiny_student(),
                augment=NO_AUGMENTATION,
                species_weight=1.0,
                activity_weight=1.0,
                label_smoothing=0.0,
                temperature=2.0,
                alpha=0.5,
            ),
            teacher="finetune",
            explain=lambda module, batch: explain.explain(module.student, batch),
            load_pretrained=lambda module, slot, state: weights.load_encoder(
                module.get_submodule("student"), slot, state
            ),
            **SHARED,
        ),
    },
    final="finetune",
    labels=data.labels,
    evaluate=evaluation.evaluate,
    headline=("mean_macro_f1", evaluation.mean_macro_f1),
    read_config=imported.read_config,
)
