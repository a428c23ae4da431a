"""The original system's config.yaml as values of params.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from models.config_values import Convert, converted, integer, number, put, switch
from models.family import Imported, InputError

# Width, layers and heads of the published VideoMAEs, by the word in their name (Tong et al. 2022).
SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}
PREPARED = {"video_frames": "processed/video_frames", "mel_spectrograms": "processed/mel_spectrograms"}

# Key of config.yaml -> key of params.yaml below `wildlife`, and what the value must be.
PLAIN: dict[str, tuple[str, Convert]] = {
    "model.fusion_hidden_dim": ("model.fusion_hidden_dim", integer),
    "model.fusion_num_layers": ("model.fusion_num_layers", integer),
    "model.fusion_num_heads": ("model.fusion_num_heads", integer),
    "model.dropout": ("model.dropout", number),
    "model.video_encoder.freeze_backbone": ("model.video_encoder.freeze_backbone", switch),
    "model.audio_encoder.freeze_backbone": ("model.audio_encoder.freeze_backbone", switch),
    "training.num_epochs": ("finetune.epochs", integer),
    "training.batch_size": ("finetune.batch_size", integer),
    "training.learning_rate": ("finetune.lr", number),
    "training.weight_decay": ("finetune.weight_decay", number),
    "dataloader.num_workers": ("finetune.num_workers", integer),
}
# Read together with others, below.
JOINT = {
    "model.video_encoder.model_name",
    "model.video_encoder.pretrained",
    "model.audio_encoder.model_name",
    "model.audio_encoder.pretrained",
    *(f"paths.{key}" for key in ("raw_data", *PREPARED)),
}
# What needs no value here, and why.
NEEDLESS = {
    "model.video_feature_dim": "the width is the checkpoint's own",
    "model.audio_feature_dim": "the width is the ResNet's own",
    "model.audio_encoder.input_channels": "a spectrogram has one channel",
    "dataloader.pin_memory": "memory is pinned wherever there is a GPU",
    "paths.results": "results go to artifacts/wildlife",
}


def read_config(config: Mapping[str, Any]) -> Imported:
    """What config.yaml says, to be laid over the preset `seed`, which holds what the original's code fixes.

    Keys that are not known are named in the notes. InputError for a value that its key cannot have.
    """
    values = _flatten(config)
    sections: dict[str, Any] = {}
    notes = [f"{key} was left out: {why}" for key, why in NEEDLESS.items() if key in values]
    for key, value in values.items():
        if key in PLAIN:
            place, convert = PLAIN[key]
            put(sections, f"wildlife.{place}", converted(key, value, convert))
        elif key not in NEEDLESS and key not in JOINT:
            notes.append(f"warning: {key} is not known and was left out")
    _read_encoders(values, sections, notes)
    _read_paths(values, sections, notes)
    return Imported(preset="seed", sections=sections, notes=notes)


def _read_encoders(values: Mapping[str, Any], sections: dict[str, Any], notes: list[str]) -> None:
    """Names and sizes of both encoders; random weights where `pretrained` is false."""
    key = "model.video_encoder"
    name = values.get(f"{key}.model_name")
    if name is not None:
        size = next((word for word in SIZES if word in str(name).lower()), None)
        if size is None:
            notes.append(f"warning: {key}.model_name {name} tells no size, that of a base VideoMAE is set; check it")
        width, layers, heads = SIZES[size or "base"]
        put(sections, "wildlife.model.video_feature_dim", width)
        put(sections, "wildlife.model.video_encoder.num_layers", layers)
        put(sections, "wildlife.model.video_encoder.num_heads", heads)
        put(sections, "wildlife.model.video_encoder.model_name", str(name))
    if not converted(f"{key}.pretrained", values.get(f"{key}.pretrained", True), switch):
        put(sections, "wildlife.model.video_encoder.model_name", "none")
    key = "model.audio_encoder"
    name = values.get(f"{key}.model_name", "resnet18")
    if name not in ("resnet18", "resnet34", "resnet50"):
        raise InputError(f"{key}.model_name is {name!r}; it must be resnet18, resnet34 or resnet50")
    pretrained = converted(f"{key}.pretrained", values.get(f"{key}.pretrained", True), switch)
    if any(known.startswith(f"{key}.") for known in values):
        put(sections, "wildlife.model.audio_encoder.model_name", name)
        put(sections, "wildlife.model.audio_encoder.pretrained", f"timm/{name}.tv_in1k" if pretrained else "none")


def _read_paths(values: Mapping[str, Any], sections: dict[str, Any], notes: list[str]) -> None:
    """The folder that holds raw/metadata and processed/ as the source of the dataset."""
    given = {
        key: PurePosixPath(str(values[f"paths.{key}"]).replace("\\", "/"))
        for key in ("raw_data", *PREPARED)
        if f"paths.{key}" in values
    }
    if not given:
        return
    raw = given.get("raw_data")
    wanted = raw and {"raw_data": raw, **{key: raw.parent / place for key, place in PREPARED.items()}}
    if raw is None or raw.name != "raw" or given != wanted:
        notes.append(
            "warning: paths were left out: they must be DATA/raw, DATA/processed/video_frames and "
            "DATA/processed/mel_spectrograms of one folder DATA; link them so and set download's source to it"
        )
        return
    put(sections, "download.source", str(raw.parent))
    put(sections, "download.format", "wildlife")


def _flatten(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Values by their dotted keys; what is null is not there."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{where}{key}.")
        elif value is not None:
            flat[f"{where}{key}"] = value
    return flat
