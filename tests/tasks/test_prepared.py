"""Clips that the original system prepared go through the stages as they are; broken and foreign ones are found."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from models.family import Batch, ClipSpec, InputError, Sample
from models.transforms import fit_mel
from tasks import clean, storage, stores
from tasks.data import manifest, prepared
from tasks.data.clip_files import ClipError, checksum, files_of
from tasks.data.loader import open_split
from tasks.datasets import wildlife
from tasks.subset import Subset, subset

LENIENT = clean.Clean(0.0, 7, False, False, False, 2, 1.0)
STORES = stores.Stores(8, 0, 64, 95, 16000, "pcm16", 2, 1, "processes", 0.0)
ALL = Subset("all", 1, 0, 0, "none", 1)
CLIPS = 6


class Bomb:
    """What a malicious pickle does when it is loaded."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def write_clip(processed: Path, name: str, seed: int, frames: int = 5, mels: int = 12) -> None:
    rng = np.random.default_rng(seed)
    for folder in ("video_frames", "mel_spectrograms"):
        (processed / folder).mkdir(parents=True, exist_ok=True)
    pictures = torch.from_numpy(rng.integers(0, 256, (3, frames, 8, 10)).astype(np.float32) / 255)
    torch.save(pictures, processed / "video_frames" / f"{name}.pt")
    np.save(processed / "mel_spectrograms" / f"{name}.npy", rng.standard_normal((mels, 20 + seed)) * 3 - 40)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose dataset is the data folder of a seed project with six good clips."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("download: {animals: {format: wildlife}}\n")
    raw = tmp_path / "data/animals/raw"
    rows = [
        wildlife.row(f"a/{k}.mp4", "fox", "resting", "test" if k > 3 else "train", prepared=True) for k in range(CLIPS)
    ]
    wildlife.write(pd.DataFrame(rows), raw)
    for k in range(CLIPS):
        write_clip(raw / "processed", f"a_{k}", k)
    return tmp_path


def prepare() -> None:
    subset("animals", ALL)
    clean.clean("animals", LENIENT)
    stores.stores("animals", STORES)


def transform(sample: Sample) -> Batch:
    assert sample.frames is not None and sample.mel is not None and sample.wave is None
    mel, length = fit_mel(sample.mel, 30, 12, sample.id)
    return {"frames": torch.from_numpy(sample.frames), "mel": mel, "mel_length": length}


def test_they_reach_the_loader_as_they_are(project: Path) -> None:
    prepare()
    table = manifest.read("animals")
    assert table["path"].tolist()[0] == "raw/processed/video_frames/a_4.pt"
    assert table[["frames", "width", "height", "has_audio"]].drop_duplicates().values.tolist() == [[5, 10, 8, True]]
    raw = project / "data/animals/raw/processed"
    clips = open_split("animals", "train", ClipSpec(3, 16000, 1.0, takes_mel=True), transform, 1)
    assert len(clips) == 4
    for row, name in enumerate(clips.ids):
        item = clips[0, row]
        pictures = torch.load(raw / f"video_frames/{name}.pt", weights_only=True)
        mel = np.load(raw / f"mel_spectrograms/{name}.npy")
        torch.testing.assert_close(item["frames"].permute(3, 0, 1, 2) / 255.0, pictures[:, [0, 2, 4]])
        np.testing.assert_array_equal(item["mel"][: mel.shape[1]].numpy(), mel.T.astype(np.float32))
        assert item["mel_length"] == mel.shape[1] and not item["mel"][mel.shape[1] :].any()
    made = project / "data/animals/stores"
    assert (made / "video_frames/a_0.pt").samefile(raw / "video_frames/a_0.pt")


def test_the_mean_of_the_training_spectrograms_is_in_their_own_units(project: Path) -> None:
    prepare()
    stats = json.loads((project / "data/animals/stores/stats.json").read_text())
    mels = [np.load(project / f"data/animals/raw/processed/mel_spectrograms/a_{k}.npy") for k in range(4)]
    values = np.concatenate([mel.ravel() for mel in mels])
    assert stats["mel_mean"] == pytest.approx(values.mean(), abs=1e-5)
    assert stats["mel_std"] == pytest.approx(values.std(), abs=1e-5)
    assert stats["clips"] == 6 and stats["without_sound"] == 0


def test_the_same_files_give_the_same_stores(project: Path) -> None:
    prepare()
    before = storage.folder_digest(project / "data/animals/stores")
    stores.stores("animals", replace(STORES, workers=2))
    assert storage.folder_digest(project / "data/animals/stores") == before


def test_a_phase_that_hears_waveforms_refuses(project: Path) -> None:
    prepare()
    with pytest.raises(InputError, match="prepared elsewhere and this phase hears waveforms"):
        open_split("animals", "train", ClipSpec(3, 16000, 1.0), transform, 1)
    clips = open_split("animals", "train", ClipSpec(3, 16000, 0.0), lambda sample: {"frames": torch.zeros(1)}, 1)
    assert len(clips) == 4


def test_every_defect_goes_to_quarantine_with_its_reason(project: Path) -> None:
    pictures, sounds = (project / f"data/animals/raw/processed/{kind}" for kind in ("video_frames", "mel_spectrograms"))
    (pictures / "a_0.pt").unlink()
    (sounds / "a_1.npy").unlink()
    (pictures / "a_2.pt").write_bytes(pickle.dumps(Bomb()))
    np.save(sounds / "a_3.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    torch.save(torch.rand(3, 5, 8, 10) * 255, pictures / "a_4.pt")
    subset("animals", ALL)
    line = clean.clean("animals", LENIENT)
    listed = pd.read_csv(project / "data/animals/clean/quarantine.csv", dtype=str).set_index("id")
    assert listed["reason"].to_dict() == {
        "a_0": "missing", "a_1": "missing", "a_2": "foreign", "a_3": "foreign", "a_4": "wrong range",
    }  # fmt: skip
    assert listed["detail"]["a_1"] == "there is no mel_spectrograms/a_1.npy"
    assert "1 clips usable" in line and not (project / "exploded").exists()


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (torch.rand(3, 8, 10), "wrong shape"),
        (torch.rand(1, 5, 8, 10), "wrong shape"),
        (torch.rand(3, 0, 8, 10), "wrong shape"),
        (torch.zeros(3, 5, 8, 10, dtype=torch.uint8), "wrong shape"),
        ({"frames": torch.rand(3, 5, 8, 10)}, "wrong shape"),
        (torch.full((3, 5, 8, 10), torch.nan), "wrong range"),
        (Bomb(), "foreign"),
    ],
)
def test_pictures_that_are_none(tmp_path: Path, made: object, reason: str) -> None:
    write_clip(tmp_path, "x", 1)
    path = tmp_path / "video_frames/x.pt"
    torch.save(made, path)
    with pytest.raises(ClipError) as error:
        prepared.probe(path)
    assert error.value.reason == reason and "\n" not in str(error.value)
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (np.zeros(12), "wrong shape"),
        (np.zeros((2, 12, 20)), "wrong shape"),
        (np.zeros((12, 20), np.int16), "wrong shape"),
        (np.zeros((12, 0)), "wrong shape"),
        (np.full((12, 20), np.inf), "wrong range"),
    ],
)
def test_sounds_that_are_none(tmp_path: Path, made: np.ndarray, reason: str) -> None:
    write_clip(tmp_path, "x", 1)
    np.save(tmp_path / "mel_spectrograms/x.npy", made)
    with pytest.raises(ClipError) as error:
        prepared.probe(tmp_path / "video_frames/x.pt")
    assert error.value.reason == reason


@pytest.mark.parametrize("size", [0, 5, 300, 1500])
def test_files_cut_short(tmp_path: Path, size: int) -> None:
    write_clip(tmp_path, "x", 1)
    path = tmp_path / "video_frames/x.pt"
    os.truncate(path, size)
    with pytest.raises(ClipError, match=r"empty|unreadable|foreign"):
        prepared.probe(path)
    os.truncate(tmp_path / "mel_spectrograms/x.npy", size)
    with pytest.raises(ClipError, match="foreign"):
        prepared.open_sound(tmp_path / "mel_spectrograms/x.npy")


def test_older_files_half_precision_and_a_channel_axis_are_read_too(tmp_path: Path) -> None:
    write_clip(tmp_path, "x", 1)
    path, sound = files_of(tmp_path / "video_frames/x.pt")
    before, mel, digest = prepared.decode(path, [0, 4]), prepared.decode_sound(sound), checksum(path)
    pictures = torch.load(path, weights_only=True)
    torch.save(pictures, path, _use_new_zipfile_serialization=False)
    np.save(sound, np.load(sound)[None])
    np.testing.assert_array_equal(prepared.decode(path, [0, 4]), before)
    np.testing.assert_array_equal(prepared.decode_sound(sound), mel)
    assert checksum(path) != digest
    torch.save(pictures.half(), path)
    assert np.abs(prepared.decode(path, [0, 4]).astype(int) - before).max() <= 1
    probe = prepared.probe(path)
    assert (probe.frames, probe.width, probe.height, probe.still, probe.silent) == (5, 10, 8, False, False)


def test_still_and_silent_ones_are_told(tmp_path: Path) -> None:
    write_clip(tmp_path, "x", 1)
    path, sound = files_of(tmp_path / "video_frames/x.pt")
    torch.save(torch.rand(3, 1, 8, 10).expand(3, 5, 8, 10).clone(), path)
    np.save(sound, np.full((12, 20), -80.0))
    assert prepared.probe(path).still and prepared.probe(path).silent


def test_media_are_brought_with_their_sound(project: Path) -> None:
    subset("animals", replace(ALL, media="link"))
    assert (project / "data/animals/subset/processed/mel_spectrograms/a_5.npy").is_file()
    assert clean.listed_clips("animals")["path"][0] == "subset/processed/video_frames/a_0.pt"


def test_a_spectrogram_of_another_size_is_refused() -> None:
    with pytest.raises(
        InputError, match="clip x: the spectrogram has 31 frames of 12 mel bins, the model takes up to 30"
    ):
        fit_mel(np.zeros((31, 12), np.float32), 30, 12, "clip x")
    with pytest.raises(InputError, match="set num_mel_bins to 12"):
        fit_mel(np.zeros((20, 12), np.float32), 30, 64, "clip x")
