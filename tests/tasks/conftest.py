"""What the tests of tasks/ share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import pytest

# Stages under test start no process that loads MLflow; the tests of tracking switch it on for themselves.
os.environ["DUET_TRACKING"] = "off"


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store to copy: MLflow takes seconds to lay out its tables."""
    from tasks import tracking

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        tracking.client()
    return path


@pytest.fixture(scope="session")
def write_clip() -> Callable[..., Path]:
    """write_clip(path, pitch=440, sound=True): one second of a growing bar and of a tone."""

    def write(path: Path, pitch: float = 440.0, sound: bool = True) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            video = container.add_stream("h264", rate=10)
            video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
            audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
            for number in range(10):
                image = np.zeros((32, 48, 3), np.uint8)
                image[:, : 4 * (number + 1)] = (200, int(pitch) % 256, 50)
                container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(video.encode())
            if audio:
                wave = 0.5 * np.sin(2 * np.pi * pitch / 16000 * np.arange(16000))
                frame = av.AudioFrame.from_ndarray(wave.astype(np.float32)[None], format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16000, 0
                container.mux(audio.encode(frame))
                container.mux(audio.encode())
        return path

    return write


@pytest.fixture(scope="session")
def write_bundle() -> Callable[..., Path]:
    """write_bundle(folder, phase="finetune", seed=0): a bundle of t3av's tiny model with random weights."""
    import torch

    import models
    from models.family import Facts
    from tasks import bundle

    facts = Facts({"label": ["a bell, ringing", "dog barking", "rain"]}, -5.0, 4.0)
    stores = {"num_frames": 8, "short_side": 32, "quality": 95, "sample_rate": 16000, "codec": "pcm16"}

    def write(folder: Path, phase: str = "finetune", seed: int = 0) -> Path:
        torch.manual_seed(seed)
        chosen = models.load("t3av").phases[phase]
        module = chosen.build(chosen.tiny, facts)
        meta = {
            "family": "t3av", "phase": phase, "config": asdict(chosen.tiny), "training": {}, "facts": asdict(facts),
            "stores": stores | {"shards": 1, "workers": 1, "max_quarantine": 0.05}, "dataset": "sounds",
            "started_from": "none", "pretrained": {}, "metrics": {}, "epoch": 0, "step": 0,
        }  # fmt: skip
        bundle.save(folder, module.state_dict(), meta, [{"epoch": 0, "loss": 1.0}])
        return folder

    return write
