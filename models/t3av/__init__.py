"""T3-AV: masked auto-encoding, then contrastive alignment, then sound-event classification from picture and sound."""

from __future__ import annotations

from models.family import Family, Phase
from models.metrics import Classification, MeanMetric
from models.metrics import Contrastive as Retrieval
from models.samples import Augmentation
from models.t3av import answers, data, evaluation
from models.t3av.config import ContrastiveConfig, FinetuneConfig, PretrainConfig
from models.t3av.model import Contrastive, Finetune, Pretrain, is_frozen, tiny_model
from models.t3av.weights import load_vit

NONE = Augmentation(min_area=1.0, time_mask=0, freq_mask=0, gain=0.0, roll=False, modality_dropout=0.0)


def _shared(name: str) -> dict:
    return {
        "clip": data.clip,
        "transform": data.transform(name),
        "pretrained": lambda config: {"vit": config.model.vit_model_name},
        "load_pretrained": load_vit,
    }


def _losses(config: PretrainConfig) -> list[str]:
    trained = {"loss_video": config.train_video_mae, "loss_audio": config.train_audio_mae}
    return ["loss", *(key for key, wanted in trained.items() if wanted)]


FAMILY = Family(
    title="T3-AV: sound events from video and sound",
    phases={
        "pretrain": Phase(
            Config=PretrainConfig,
            build=Pretrain,
            metrics=lambda config, facts: MeanMetric(_losses(config)),
            best=("loss", "min"),
            tiny=PretrainConfig(
                model=tiny_model(),
                augment=NONE,
                train_video_mae=True,
                train_audio_mae=True,
                mask_ratio=0.5,
                audio_mask_ratio=0.5,
                video_mask_mode="tube",
                audio_mask_mode="random",
                norm_pix_loss=True,
                dec_dim=16,
                dec_layers=1,
                dec_heads=2,
            ),
            **_shared("pretrain"),
        ),
        "contrastive": Phase(
            Config=ContrastiveConfig,
            build=Contrastive,
            metrics=lambda config, facts: Retrieval(),
            best=("r1", "max"),
            tiny=ContrastiveConfig(
                model=tiny_model(),
                augment=NONE,
                contrastive_dim=8,
                proj_hidden_dim=16,
                temperature=0.1,
                learn_temperature=True,
                freeze_encoders=False,
                freeze_backbone=False,
            ),
            fresh=("video_head.", "audio_head.", "log_temperature"),
            cacheable=is_frozen,
            **_shared("contrastive"),
        ),
        "finetune": Phase(
            Config=FinetuneConfig,
            build=Finetune,
            metrics=lambda config, facts: Classification("label", len(facts.labels["label"])),
            best=("top1", "max"),
            tiny=FinetuneConfig(
                model=tiny_model(),
                augment=NONE,
                clf_hidden_dim=16,
                label_smoothing=0.0,
                freeze_encoders=False,
                freeze_backbone=False,
                freeze_all_except_head=False,
                unfreeze_backbone_layers=0,
                unfreeze_encoder_layers=0,
            ),
            present=answers.present,
            fresh=("classifier.", "absent."),
            cacheable=is_frozen,
            **_shared("finetune"),
        ),
    },
    final="finetune",
    labels=data.labels,
    evaluate=evaluation.evaluate,
    headline=("top1", evaluation.top1),
)
