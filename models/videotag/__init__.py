"""videotag: many tags a video (TSN's features of frames, attention over an LSTM; Baidu's VideoTag)."""

from __future__ import annotations

from models.family import Family, Phase
from models.videotag import answers, data, evaluation, model, tsn, weights
from models.videotag.config import TaggerConfig, TsnConfig

FAMILY = Family(
    title="VideoTag: tags of videos",
    phases={
        "tsn": Phase(
            Config=TsnConfig,
            clip=data.tsn_clip,
            transform=data.tsn_transform,
            build=tsn.Tsn,
            metrics=tsn.TsnScores,
            best=("map", "max"),
            tiny=tsn.tiny_tsn(),
            features=data.feature_spec,
            pretrained=weights.names,
            load_pretrained=weights.load_tsn,
        ),
        "tagger": Phase(
            Config=TaggerConfig,
            clip=data.tagger_clip,
            transform=data.tagger_transform,
            build=model.Tagger,
            metrics=lambda config, facts: evaluation.TagMetrics(config.topk),
            best=("gap", "max"),
            tiny=model.tiny_tagger(),
            present=answers.present,
            calibrate=answers.calibrate,
            exports={"jsonl": answers.export, "original": answers.original},
            pretrained=weights.names,
            load_pretrained=weights.load_tagger,
        ),
    },
    final="tagger",
    labels=data.labels,
    evaluate=evaluation.evaluate,
    headline=("gap_20", evaluation.global_precision),
)
