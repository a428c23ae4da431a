"""wildlife: which animal, and what it does, from picture and sound (VideoMAE, ResNet and a bottleneck transformer)."""

from __future__ import annotations

from models.family import Family, Phase
from models.metrics import HeadScores
from models.samples import Augmentation
from models.wildlife import answers, data, evaluation, explain, weights
from models.wildlife.config import HEADS, FinetuneConfig
from models.wildlife.model import Finetune, is_frozen, tiny_model

FAMILY = Family(
    title="wildlife: species and behaviour from video and sound",
    phases={
        "finetune": Phase(
            Config=FinetuneConfig,
            clip=data.clip,
            transform=data.transform,
            build=Finetune,
            metrics=lambda config, facts: HeadScores({head: len(facts.labels[head]) for head in HEADS}),
            best=("mean_macro_f1", "max"),
            tiny=FinetuneConfig(
                model=tiny_model(),
                augment=Augmentation(
                    min_area=1.0, time_mask=0, freq_mask=0, gain=0.0, roll=False, modality_dropout=0.0
                ),
                species_weight=1.0,
                activity_weight=1.0,
                uncertainty=False,
                label_smoothing=0.0,
                imbalance="none",
                beta=0.999,
                tau=1.0,
                balanced_sampler=False,
            ),
            present=answers.present,
            explain=explain.explain,
            pretrained=weights.names,
            load_pretrained=weights.load_encoder,
            fallback=weights.fallback,
            cacheable=is_frozen,
            frequencies=data.frequencies,
        ),
    },
    labels=data.labels,
    evaluate=evaluation.evaluate,
    headline=("mean_macro_f1", evaluation.mean_macro_f1),
)
