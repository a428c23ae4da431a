"""avlformer: what is seen and heard in a clip, told in sentences (Video Swin, PaSST and BERT; FAVDBench's AVLFormer)."""

from __future__ import annotations

from models.avlformer import answers, data, evaluation, explain, imported, model, weights
from models.avlformer.config import FinetuneConfig
from models.family import Family, Phase

FAMILY = Family(
    title="AVLFormer: audible descriptions of videos",
    phases={
        "finetune": Phase(
            Config=FinetuneConfig,
            clip=data.clip,
            transform=data.transform,
            build=model.Finetune,
            metrics=lambda config, facts: evaluation.CaptionMetrics(facts),
            best=("cider_d", "max"),
            tiny=model.tiny(),
            present=answers.present,
            exports={"coco": answers.coco, "by_id": answers.by_id},
            explain=explain.explain,
            pretrained=weights.names,
            load_pretrained=weights.load,
            parameter_groups=model.parameter_groups,
        ),
    },
    final="finetune",
    labels=data.labels,
    evaluate=evaluation.evaluate,
    headline=("cider_d", evaluation.cider),
    read_config=imported.read_config,
)
