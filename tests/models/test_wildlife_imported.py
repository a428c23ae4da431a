"""The original system's config.yaml: every key it documents has its place, others are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.family import InputError
from models.wildlife.imported import JOINT, NEEDLESS, PLAIN, read_config
from tasks import params

# As its guide prints it.
CONFIG = """
paths:
  raw_data: /films/data/raw
  video_frames: /films/data/processed/video_frames
  mel_spectrograms: /films/data/processed/mel_spectrograms
  results: ./results
model:
  video_feature_dim: 768
  audio_feature_dim: 512
  fusion_hidden_dim: 512
  fusion_num_layers: 2
  fusion_num_heads: 8
  dropout: 0.1
  video_encoder:
    model_name: "MCG-NJU/videomae-base-finetuned-kinetics"
    pretrained: true
    freeze_backbone: false
  audio_encoder:
    model_name: "resnet18"
    pretrained: true
    freeze_backbone: true
    input_channels: 1
training:
  num_epochs: 50
  batch_size: 8
  learning_rate: 1e-4
  weight_decay: '1e-5'
dataloader:
  num_workers: 4
  pin_memory: true
"""


def sections(config: dict[str, Any]) -> dict[str, Any]:
    return dict(read_config(config).sections)


def test_the_documented_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    imported = read_config(params.read(tmp_path / "config.yaml"))
    assert imported.preset == "seed"
    assert imported.sections == {
        "download": {"source": "/films/data", "format": "wildlife"},
        "wildlife": {
            "model": {
                "fusion_hidden_dim": 512,
                "fusion_num_layers": 2,
                "fusion_num_heads": 8,
                "dropout": 0.1,
                "video_feature_dim": 768,
                "video_encoder": {
                    "freeze_backbone": False,
                    "num_layers": 12,
                    "num_heads": 12,
                    "model_name": "MCG-NJU/videomae-base-finetuned-kinetics",
                },
                "audio_encoder": {
                    "freeze_backbone": True,
                    "model_name": "resnet18",
                    "pretrained": "timm/resnet18.tv_in1k",
                },
            },
            "finetune": {"epochs": 50, "batch_size": 8, "lr": 1e-4, "weight_decay": 1e-5, "num_workers": 4},
        },
    }
    assert sorted(note.partition(" ")[0] for note in imported.notes) == sorted(NEEDLESS)


def test_every_documented_key_is_dealt_with() -> None:
    assert not set(PLAIN) & set(NEEDLESS) and not JOINT & set(NEEDLESS) and not JOINT & set(PLAIN)
    assert read_config({}).sections == {} and not read_config({}).notes


def test_unknown_keys_are_named() -> None:
    notes = read_config({"training": {"warmup": 3}, "preprocessing": {"audio": {"n_mels": 128}}}).notes
    assert notes == [
        "warning: training.warmup is not known and was left out",
        "warning: preprocessing.audio.n_mels is not known and was left out",
    ]


def test_random_weights_and_other_sizes() -> None:
    model = {"video_encoder": {"model_name": "MCG-NJU/videomae-large"}, "audio_encoder": {"model_name": "resnet50"}}
    made = sections({"model": model})["wildlife"]["model"]
    assert (made["video_feature_dim"], made["video_encoder"]["num_layers"]) == (1024, 24)
    assert made["audio_encoder"]["pretrained"] == "timm/resnet50.tv_in1k"
    for encoder in model.values():
        encoder["pretrained"] = False  # type: ignore[assignment]
    made = sections({"model": model})["wildlife"]["model"]
    assert made["video_encoder"]["model_name"] == made["audio_encoder"]["pretrained"] == "none"
    assert made["video_encoder"]["num_heads"] == 16, "the sizes stay the named checkpoint's"
    imported = read_config({"model": {"video_encoder": {"model_name": "./weights/mine"}}})
    assert any("./weights/mine tells no size" in note for note in imported.notes)


@pytest.mark.parametrize(
    "paths",
    [
        {"raw_data": "data/raw", "video_frames": "elsewhere/video_frames"},
        {"raw_data": "data/films"},
        {"video_frames": "data/processed/video_frames"},
    ],
)
def test_scattered_folders_are_not_guessed_at(paths: dict[str, str]) -> None:
    imported = read_config({"paths": paths})
    assert imported.sections == {}
    assert "warning: paths were left out" in imported.notes[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate is 'fast'; it must be a number"),
        ({"training": {"batch_size": 8.5}}, "training.batch_size is 8.5; it must be a whole number"),
        ({"training": {"batch_size": True}}, "must be a whole number"),
        ({"model": {"dropout": [0.1]}}, r"model.dropout is \[0.1\]; it must be a number"),
        ({"model": {"video_encoder": {"freeze_backbone": "no"}}}, "must be true or false"),
        ({"model": {"audio_encoder": {"pretrained": 1}}}, "pretrained is 1; it must be true or false"),
        ({"model": {"audio_encoder": {"model_name": "vgg"}}}, "it must be resnet18, resnet34 or resnet50"),
    ],
)
def test_wrong_values_name_their_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_config(config)
