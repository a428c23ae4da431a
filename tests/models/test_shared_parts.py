"""Patches, masks, losses, log-mel and weights against closed forms, naive loops and the libraries that define them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention import Block
from models.embed import resize_grid, sincos, sound_patches, video_patches, video_pictures
from models.family import InputError
from models.losses import balance, distillation, gather_rows, has_collapsed, info_nce, reconstruction
from models.masking import mask_sound, mask_video, num_visible
from models.transforms import LogMel, hide_bands, resized_crop, standardise
from models.weights import load_matching


def test_patches_go_there_and_back() -> None:
    frames = torch.randn(2, 4, 3, 16, 24)
    patches = video_patches(frames, 2, 8)
    assert patches.shape == (2, 2 * 2 * 3, 3 * 2 * 64)
    torch.testing.assert_close(video_pictures(patches, 2, 8, (2, 2, 3)), frames)


def test_one_square_of_the_picture_is_one_patch() -> None:
    frames = torch.zeros(1, 2, 3, 32, 32)
    changed = frames.clone()
    changed[:, 0, :, 8:16, 16:24] = 1.0
    touched = (video_patches(changed, 1, 8) != video_patches(frames, 1, 8)).any(-1)[0]
    assert touched.nonzero().flatten().tolist() == [1 * 4 + 2]


def test_one_square_of_the_sound_is_one_patch() -> None:
    mel = torch.zeros(1, 32, 16)
    changed = mel.clone()
    changed[:, 16:24, 8:16] = 1.0
    touched = (sound_patches(changed, 8) != sound_patches(mel, 8)).any(-1)[0]
    assert touched.nonzero().flatten().tolist() == [2 * 2 + 1]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["random", "time", "freq", "tf"]), st.floats(0.1, 0.95), st.integers(1, 8), st.integers(1, 8))
def test_a_mask_hides_exactly_its_share(mode: str, ratio: float, time: int, pitch: int) -> None:
    noise = torch.rand(3, time * pitch)
    keep, hidden = mask_sound(noise, (time, pitch), ratio, mode)  # pyright: ignore[reportArgumentType]
    assert keep.shape == (3, num_visible(time * pitch, ratio))
    assert (torch.cat([keep, hidden], 1).sort(1).values == torch.arange(time * pitch)).all()
    assert (keep.diff(dim=1) > 0).all() and (hidden.diff(dim=1) > 0).all()


def test_time_masks_are_columns() -> None:
    noise = torch.rand(5, 40)
    noise.view(5, 10, 4)[:, :, 0] = 0.3 + 1e-6 * torch.arange(10)  # columns that hardly differ are hidden whole too
    _, hidden = mask_sound(noise, (10, 4), 0.5, "time")
    masked = torch.zeros(5, 40).scatter(1, hidden, 1)
    assert set(masked.view(5, 10, 4).sum(2).flatten().tolist()) == {0, 4}


def test_a_tube_hides_the_same_places_at_all_times() -> None:
    keep, hidden = mask_video(torch.rand(4, 3 * 16), (3, 4, 4), 0.75, "tube")
    slices = hidden.view(4, 3, 12)
    assert (slices == slices[:, :1] + 16 * torch.arange(3)[:, None]).all()
    assert (torch.cat([keep, hidden], 1).sort(1).values == torch.arange(48)).all()


def test_reconstruction_is_the_closed_form() -> None:
    patches, predicted = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    for norm in (True, False):
        found = reconstruction(predicted, patches, norm)
        for b in range(2):
            errors = []
            for n in range(5):
                target = patches[b, n].numpy().astype(np.float64)
                if norm:
                    target = (target - target.mean()) / math.sqrt(target.var(ddof=1) + 1e-6)
                errors.append(float(((predicted[b, n].numpy() - target) ** 2).mean()))
            assert found[b].item() == pytest.approx(np.mean(errors), rel=1e-5)


def naive_info_nce(first: torch.Tensor, second: torch.Tensor, valid: list[bool], temperature: float) -> float:
    rows = [i for i, kept in enumerate(valid) if kept]
    total = 0.0
    for i in rows:
        for a, b in ((first, second), (second, first)):
            scores = [math.exp(float(a[i] @ b[j]) / temperature) for j in rows]
            total -= math.log(scores[rows.index(i)] / sum(scores))
    return total / 2 / len(rows)


def unit(rows: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("valid", [[True] * 6, [True, False, True, True, False, True]])
def test_info_nce_is_the_naive_loop(valid: list[bool]) -> None:
    first, second = unit(6, 0), unit(6, 1)
    found = info_nce(first, second, torch.tensor(valid), 0.1).item()
    assert found == pytest.approx(naive_info_nce(first, second, valid, 0.1), rel=1e-5)


def _gathered(rank: int, path: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    start, stop = (0, 4) if rank == 0 else (4, 6)  # unequal shares
    weight = torch.eye(8, requires_grad=True)
    first, second = (gather_rows(unit(6, seed)[start:stop] @ weight) for seed in (0, 1))
    loss = info_nce(first, second, gather_rows(torch.ones(stop - start, dtype=torch.bool)), 0.1)
    loss.backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad)
    torch.save((loss.detach(), weight.grad / 2), f"{path}.{rank}")
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_gradient_of_the_joined_batch(tmp_path: Path) -> None:
    mp.spawn(_gathered, (str(tmp_path / "meet"),), nprocs=2)
    weight = torch.eye(8, requires_grad=True)
    loss = info_nce(unit(6, 0) @ weight, unit(6, 1) @ weight, torch.ones(6, dtype=torch.bool), 0.1)
    loss.backward()
    for rank in range(2):
        found, gradient = torch.load(tmp_path / f"meet.{rank}", weights_only=True)
        torch.testing.assert_close(found, loss.detach())
        torch.testing.assert_close(gradient, weight.grad)


def test_the_collapse_alarm() -> None:
    alike = unit(1, 0).expand(16, -1)
    assert has_collapsed(alike, torch.tensor(1.0), 16) == 1
    assert has_collapsed(unit(16, 0), torch.tensor(math.log(16)), 16) == 1
    assert has_collapsed(unit(16, 0), torch.tensor(1.0), 16) == 0


@pytest.mark.parametrize(("rate", "bins"), [(16000, 128), (16000, 64), (32000, 128)])
def test_log_mel_is_kaldis(rate: int, bins: int) -> None:
    wave = 0.3 * torch.randn(2, rate, generator=torch.Generator().manual_seed(0))
    found = LogMel(rate, bins)(wave)
    for row in range(2):
        expected = torchaudio.compliance.kaldi.fbank(
            wave[row : row + 1],
            htk_compat=True,
            sample_frequency=rate,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=bins,
            dither=0.0,
            frame_shift=10,
        )
        assert found[row].shape == expected.shape
        filled = LogMel(rate, bins).filters.sum(0) > 0  # a filter narrower than an FFT bin holds nothing but noise
        torch.testing.assert_close(found[row][:, filled], expected[:, filled], rtol=1e-3, atol=1e-3)


def test_padding_is_average_sound() -> None:
    mel = torch.full((2, 10, 4), -7.0)
    out = standardise(mel, torch.tensor([10, 6]), -5.0, 4.0)
    assert (out[0] == -0.5).all()
    assert (out[1, :6] == -0.5).all()
    assert (out[1, 6:] == 0).all()
    hidden = hide_bands(out, torch.tensor([[2, 3, 1, 2], [0, 0, 0, 0]]))
    assert (hidden[0, 2:5] == 0).all()
    assert (hidden[0, :, 1:3] == 0).all()
    assert (hidden[0, 0, 0] == -0.5).all()
    torch.testing.assert_close(hidden[1], out[1])


def test_a_crop_is_the_same_for_all_frames_of_a_clip() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    out = resized_crop(np.stack([frame] * 3), 16, np.random.default_rng(1), 0.4)
    assert out.shape == (3, 3, 16, 16)
    assert (out == out[:1]).all()
    middle = resized_crop(np.stack([frame]), 20, None, 1.0)
    assert (middle[0].permute(1, 2, 0).numpy() == frame[:, 5:25]).all()


def test_positions() -> None:
    table = sincos(5, 8)
    for position in range(5):
        for k in range(4):
            assert table[position, k].item() == pytest.approx(math.sin(position / 10000 ** (k / 4)), abs=1e-6)
            assert table[position, 4 + k].item() == pytest.approx(math.cos(position / 10000 ** (k / 4)), abs=1e-6)
    square = torch.randn(16, 8)
    assert resize_grid(square, 4, 4) is square
    assert resize_grid(square, 2, 6).shape == (12, 8)


def test_keys_that_may_not_be_attended_to_change_nothing() -> None:
    torch.manual_seed(0)
    block = Block(16, 2).eval()
    x = torch.randn(1, 6, 16)
    keys = torch.tensor([[True, True, True, True, False, False]])
    other = x.clone()
    other[:, 4:] = torch.randn(1, 2, 16)
    torch.testing.assert_close(block(x, keys)[:, :4], block(other, keys)[:, :4])


def test_load_matching_reports_and_refuses() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    state = {"0.weight": torch.ones(3, 2), "0.bias": torch.zeros(3), "old.weight": torch.zeros(1)}
    report = load_matching(module, state, ("1.",))
    assert report.loaded == ["0.bias", "0.weight"]
    assert report.fresh == ["1.weight", "1.bias"]
    assert report.dropped == ["old.weight"]
    with pytest.raises(InputError, match=r"it lacks 1\.weight"):
        load_matching(module, state)
    with pytest.raises(InputError, match=r"0\.weight is \(2, 2\) there and \(3, 2\) here"):
        load_matching(module, {**state, "0.weight": torch.ones(2, 2)}, ("1.",))


def test_balanced_clips_come_equally_often_in_every_combination() -> None:
    pairs = [("fox", "resting")] * 6 + [("fox", "playing")] * 2 + [("wolf", "resting")] * 1
    clips = [{"species": species, "activity": activity} for species, activity in pairs]
    found = balance(clips, ("species", "activity"))
    sums = {pair: sum(f for p, f in zip(pairs, found, strict=True) if p == pair) for pair in set(pairs)}
    assert sums == pytest.approx(dict.fromkeys(sums, 1.0))
    unknown = [("fox", None), (None, "resting"), (None, None), ("hare", None)]
    more = clips + [{"species": species, "activity": activity} for species, activity in unknown]
    mean = {"fox": 2 / 8, "resting": 2 / 7, "none": 0.0, "all": 3 / 9}
    np.testing.assert_allclose(balance(more, ("species", "activity"))[: len(clips)], found)
    assert balance(more, ("species", "activity"))[len(clips) :] == pytest.approx(list(mean.values()))
    with pytest.raises(InputError, match="no training clip has species and activity"):
        balance(more[-2:], ("species", "activity"))


def test_distillation_is_its_formula() -> None:
    torch.manual_seed(0)
    student, teacher, temperature = torch.randn(3, 5), torch.randn(3, 5), 3.0
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    expected = temperature**2 * (p * (p / q).log()).sum(1)
    torch.testing.assert_close(distillation(student, teacher, temperature), expected)
    torch.testing.assert_close(distillation(teacher, teacher, temperature), torch.zeros(3))
