"""adatad: which actions happen when, in untrimmed videos (VideoMAE with temporal adapters, ActionFormer)."""

from __future__ import annotations

from models.adatad import answers, data, detections, evaluation, weights
from models.adatad.config import Augmentation, FinetuneConfig
from models.adatad.model import Finetune, parameter_groups, tiny_model
from models.family import Family, Phase

FAMILY = Family(
    title="AdaTAD: action segments in untrimmed videos",
    phases={
        "finetune": Phase(
            Config=FinetuneConfig,
            clip=data.clip,
            transform=data.transform,
            build=Finetune,
            metrics=detections.AverageMap,
            best=("map_average", "max"),
            tiny=FinetuneConfig(
                model=tiny_model(),
                augment=Augmentation(min_area=1.0, rand_ops=0, color=0.0, hue=0.0),
                keep_threshold=0.75,
                crop_ratio=[0.9, 1.0],
                overlap=0.5,
                center_radius=1.5,
                label_smoothing=0.0,
                normalizer=20.0,
                adapter_lr=2.0,
                min_score=0.001,
                max_per_window=20,
                max_per_video=20,
                nms_sigma=0.5,
                classifier_top=0,
            ),
            merge=detections.merge,
            present=answers.present,
            calibrate=answers.calibrate,
            exports={"activitynet": answers.export},
            pretrained=weights.names,
            load_pretrained=weights.load,
            slim=True,
            parameter_groups=parameter_groups,
        )
    },
    final="finetune",
    labels=data.labels,
    evaluate=evaluation.evaluate,
    headline=("map_average", evaluation.average_map),
)
