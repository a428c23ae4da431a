"""Weights that cannot be had: a fallback where the phase has one and only the network is to blame, an error otherwise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import VideoMAEConfig, VideoMAEModel

import models
from models.family import Facts, InputError, UnreachableError
from tasks import jobs, params, train
from tasks.engine.run import Training

PHASE = models.load("wildlife").phases["finetune"]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def job(**change) -> jobs.Job:
    """The tiny phase with other values of its video encoder."""
    model = PHASE.tiny.model
    encoder = dataclasses.replace(model.video_encoder, freeze_backbone=True, **change)
    config = dataclasses.replace(PHASE.tiny, model=dataclasses.replace(model, video_encoder=encoder))
    settings = params.phase("wildlife", "finetune", Training)[2]
    facts = Facts({"species": ["fox", "wolf"], "activity": ["resting"]}, -5.0, 4.0)
    return jobs.Job("wildlife", "finetune", PHASE, config, settings, "animals", facts)


def test_the_bundle_tells_what_was_built_instead(capsys: pytest.CaptureFixture[str]) -> None:
    done, module, origin, lines = train.start(job(model_name="someone/videomae", fallback="cnn3d"))
    assert "WARNING: someone/videomae: not in the Hugging Face cache" in capsys.readouterr().out
    assert done.config.model.video_encoder.kind == "cnn3d"
    assert origin["pretrained"] == {"video": "none: fallback, as someone/videomae could not be had", "audio": "none"}
    assert lines == ["starting from random weights"]
    assert all(
        parameter.requires_grad for parameter in module.video_encoder.parameters()
    )  # frozen it would never learn


def test_without_a_fallback_it_ends() -> None:
    with pytest.raises(UnreachableError, match="HF_HUB_OFFLINE is set"):
        train.start(job(model_name="someone/videomae", fallback="error"))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "models/videomae", "videomae.safetensors"])
def test_a_wrong_path_is_an_error_all_the_same(name: str) -> None:
    with pytest.raises(InputError, match="no such folder") as caught:
        train.start(job(model_name=name, fallback="cnn3d"))
    assert not isinstance(caught.value, UnreachableError)


def test_weights_that_are_here_need_no_fallback(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    shape = {"image_size": 16, "patch_size": 8, "num_frames": 2, "tubelet_size": 1}
    VideoMAEModel(VideoMAEConfig(**sizes, **shape)).save_pretrained(tmp_path / "videomae")
    done, _, origin, lines = train.start(job(model_name=str(tmp_path / "videomae"), fallback="cnn3d"))
    assert done.config.model.video_encoder.kind == "videomae"
    assert origin["pretrained"]["video"].startswith(f"{tmp_path / 'videomae'}@")
    assert "2 fresh, 0 dropped" in lines[0]  # a checkpoint without a classifier has no final norm
