"""PaSST: its spectrum against torchaudio's, its ViT against one written out again, and which patches it reads."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional

from models.passt import PATCH, PaSST, Spectrum, kept, mel_bank


def noise(num_samples: int, clips: int = 1) -> Tensor:
    return torch.randn(clips, num_samples, generator=torch.Generator().manual_seed(0)) * 0.1


def kaldi(sample_rate: int, size: int, bins: int, low: float, high: float) -> Tensor:
    """(size / 2 + 1, mel) of torchaudio, whose bank has no place for the highest frequency."""
    bank, _ = torchaudio.compliance.kaldi.get_mel_banks(bins, size, float(sample_rate), low, high, 100.0, -500.0, 1.0)
    return functional.pad(bank, (0, 1)).T


# --- the spectrum --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample_rate", "size", "bins", "top"),
    [(32000, 1024, 128, 15000.0), (16000, 512, 32, 7000.0), (48000, 2048, 64, 15000.0)],
)
def test_the_mel_bank_is_kaldis(sample_rate: int, size: int, bins: int, top: float) -> None:
    expected = kaldi(sample_rate, size, bins, 0.0, top)
    torch.testing.assert_close(Spectrum(sample_rate, bins).filters, expected, rtol=0, atol=5e-5)


def test_ten_seconds_have_the_published_shape() -> None:
    assert Spectrum(32000, 128)(noise(320_000)).shape == (1, 128, 1000)


def test_it_is_the_published_formula() -> None:
    wave = noise(16_000, clips=2)
    emphasised = functional.conv1d(wave[:, None], torch.tensor([[[-0.97, 1.0]]]))[:, 0]
    window = torch.hann_window(800, periodic=False)
    power = torch.stft(emphasised, 1024, 320, 800, window, center=True, return_complex=True).abs().square()
    mel = torch.einsum("bft,fm->bmt", power, kaldi(32000, 1024, 128, 0.0, 15000.0))
    expected = ((mel + 1e-5).log() + 4.5) / 5
    torch.testing.assert_close(Spectrum(32000, 128)(wave), expected, rtol=1e-4, atol=1e-4)


def test_each_clip_can_have_ends_of_its_own() -> None:
    spectrum, wave = Spectrum(32000, 32), noise(9_600)
    ends = torch.tensor([[0.0, 15000.0], [9.0, 14001.0]])
    found = spectrum(wave.expand(2, -1), ends)
    torch.testing.assert_close(found[:1], spectrum(wave), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1:], spectrum(wave, ends[1]))
    expected = kaldi(32000, 1024, 32, 9.0, 14001.0)
    torch.testing.assert_close(mel_bank(ends[1], 32000, 1024, 32), expected, rtol=0, atol=1e-4)


def test_a_tone_is_loudest_in_the_filter_around_it() -> None:
    tone = torch.sin(2 * torch.pi * 2000 * torch.arange(32_000) / 32_000)[None]
    edges = torch.linspace(0, 1127 * float(np.log1p(15000 / 700)), 130)
    around = (edges[1:-1] - 1127 * float(np.log1p(2000 / 700))).abs().argmin()
    assert Spectrum(32000, 128)(tone)[0, :, 50].argmax() == around


def test_frames_are_counted_by_their_middle() -> None:
    counts = Spectrum(32000, 128).num_frames(torch.tensor([0, 1, 320, 321, 160_000, 320_000]))
    assert counts.tolist() == [0, 1, 1, 2, 500, 1000]


def test_half_precision_around_it_changes_nothing() -> None:
    spectrum, wave = Spectrum(16000, 32), noise(8_000)
    with torch.autocast("cpu", torch.bfloat16):
        inside = spectrum(wave)
    assert torch.equal(inside, spectrum(wave))


# --- the ViT -------------------------------------------------------------------------------------------------------------


def small() -> PaSST:
    """A grid of 3 x 5 patches."""
    torch.manual_seed(0)
    passt = PaSST(num_mel_bins=36, num_frames=60, hidden_size=8, num_layers=2, num_heads=2, stride=10)
    for parameter in passt.parameters():
        nn.init.normal_(parameter, std=0.3)
    return passt


def test_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        passt = PaSST(128, 1000, 768, 12, 12, 10)
    assert passt.grid == (12, 99)
    # The published body counts the norm of a classifier that tokens never pass.
    assert sum(parameter.numel() for parameter in passt.parameters()) + 2 * 768 == 85_343_232


def test_patchout_leaves_the_published_tokens() -> None:
    passt = PaSST(128, 1000, 8, 1, 2, 10)
    found = passt(torch.randn(2, 128, 1000), kept(12, 4, None), kept(99, 40, None))
    assert found.shape == (2, 473, 8)


def by_definition(passt: PaSST, spectrum: Tensor, patches: list[tuple[int, int]]) -> Tensor:
    """(1 + patches, D) of one spectrum (mel, frames), written out again."""
    tokens = [passt.tokens[i] + passt.places[i] for i in range(2)]
    for row, column in patches:
        top, left = 10 * row, 10 * column
        patch = spectrum[top : top + PATCH, left : left + PATCH].flatten()
        tokens.append(passt.patch.weight @ patch + passt.patch.bias + passt.pitch[row] + passt.time[column])
    x = torch.stack(tokens)
    for block in cast(Any, passt.blocks):
        normed = functional.layer_norm(x, (8,), block.norm1.weight, block.norm1.bias, 1e-6)
        rows, heads = normed @ block.attn.qkv.weight.T + block.attn.qkv.bias, []
        for at in (0, 4):
            q, k, v = (rows[:, at + start : at + start + 4] for start in (0, 8, 16))
            heads.append((q @ k.T / 2).softmax(-1) @ v)
        x = x + torch.cat(heads, 1) @ block.attn.proj.weight.T + block.attn.proj.bias
        normed = functional.layer_norm(x, (8,), block.norm2.weight, block.norm2.bias, 1e-6)
        x = x + functional.gelu(normed @ block.fc1.weight.T + block.fc1.bias) @ block.fc2.weight.T + block.fc2.bias
    return functional.layer_norm(x, (8,), passt.norm.weight, passt.norm.bias, 1e-6)[1:]


def test_it_is_a_vit_over_the_patches_that_are_read() -> None:
    passt, spectrum = small(), torch.randn(2, 36, 60)
    found = passt(spectrum, torch.tensor([0, 2]), torch.tensor([1, 2, 4]))
    patches = [(0, 1), (0, 2), (0, 4), (2, 1), (2, 2), (2, 4)]
    for clip in range(2):
        torch.testing.assert_close(found[clip], by_definition(passt, spectrum[clip], patches), rtol=1e-4, atol=1e-5)


def test_clips_can_read_patches_of_their_own() -> None:
    passt, spectrum = small(), torch.randn(2, 36, 60)
    rows, columns = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0, 3], [2, 4]])
    found = passt(spectrum, rows, columns)
    for clip in range(2):
        torch.testing.assert_close(found[clip], passt(spectrum[clip : clip + 1], rows[clip], columns[clip])[0])


def test_a_training_step_compiles_without_a_break() -> None:
    passt, spectrum, wave = small(), Spectrum(3200, 36), noise(1920, clips=2)
    given = torch.tensor([[0.0, 600.0], [5.0, 580.0]]), torch.tensor([0, 2]), torch.tensor([[0, 3], [2, 4]])

    def step(wave: Tensor, ends: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return passt(spectrum(wave, ends), rows, columns)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = compiled(wave, *given)
    found.sum().backward()
    assert passt.time.grad is not None and passt.time.grad.isfinite().all()
    torch.testing.assert_close(found, step(wave, *given))


# --- which patches -------------------------------------------------------------------------------------------------------


def test_in_evaluation_what_is_read_is_evenly_spread() -> None:
    found = kept(99, 40, None)
    gaps = found.diff()
    assert len(found) == 59
    assert set(gaps.tolist()) == {1, 2}
    assert found[0] + found[-1] == 98  # as far from one end as from the other
    assert kept(7, 0, None).tolist() == list(range(7))


def test_in_training_each_patch_has_the_same_chance() -> None:
    rng, counts = np.random.default_rng(0), torch.zeros(12)
    for _ in range(3000):
        found = kept(12, 4, rng)
        assert len(found) == 8 and (found.diff() > 0).all()
        counts[found] += 1
    # 2000 each are expected, with a standard deviation of sqrt(3000 * 2/3 * 1/3) = 26.
    assert (counts - 2000).abs().max() < 5 * 26


def test_patches_that_begin_after_a_sound_has_ended_are_not_heard() -> None:
    passt, rows, columns = small(), torch.tensor([0, 2]), torch.tensor([0, 2, 4])  # these begin at 0, 20, 40
    found = passt.heard(torch.tensor([0, 1, 20, 21, 60]), rows, columns)
    times = [[False] * 3, [True, False, False], [True, False, False], [True, True, False], [True] * 3]
    assert found.tolist() == [row * 2 for row in times]
