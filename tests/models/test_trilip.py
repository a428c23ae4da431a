"""AudioScore's curve and formulas, and TriLip's published layout with a small CLIP."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from models.caption_judges import audible_sentence, audio_score, clip_score, curve, legacy_audio_score
from models.family import InputError
from models.trilip import TriLip, load_published

WIDTH, HIDDEN = 8, 12


def small_clip() -> CLIPModel:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 20, "max_position_embeddings": 6, "eos_token_id": 19, "bos_token_id": 18}
    vision = sizes | {"image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).eval()


class Ear(nn.Module):
    """Tokens of 4 samples each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 10)

    def forward(self, wave: Tensor) -> Tensor:
        return self.layer(wave.unfold(1, 4, 4))


def published(clip: CLIPModel) -> dict[str, Tensor]:
    """A file of the published layout."""
    state = {"vl_model.visual.proj": clip.visual_projection.weight.detach().T.half()}
    state |= {f"a_model.net.{key}": torch.randn_like(value) for key, value in Ear().state_dict().items()}
    state |= {"a_model.linear.weight": torch.randn(WIDTH, 10), "a_model.linear.bias": torch.randn(WIDTH)}
    state |= {"logit_scale1": torch.tensor(2.0), "logit_scale2": torch.tensor(3.0)}
    for name in ("vis", "txt", "aud"):
        state[f"{name}_scaler.w_1.weight"], state[f"{name}_scaler.w_1.bias"] = (
            torch.randn(HIDDEN, WIDTH),
            torch.randn(HIDDEN),
        )
        state[f"{name}_scaler.w_2.weight"], state[f"{name}_scaler.w_2.bias"] = (
            torch.randn(WIDTH, HIDDEN),
            torch.randn(WIDTH),
        )
        state[f"{name}_scaler.layer_norm.weight"], state[f"{name}_scaler.layer_norm.bias"] = torch.randn(2, WIDTH)
    return {f"module.{key}": value for key, value in state.items()}


def head(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A head by the published tensors and PyTorch's functions."""
    w = {key.split("_scaler.")[1]: value for key, value in state.items() if f"{name}_scaler" in key}
    y = functional.linear(x, w["w_1.weight"], w["w_1.bias"]).clamp(min=0)
    y = functional.linear(y, w["w_2.weight"], w["w_2.bias"]) + x
    return functional.layer_norm(y, (WIDTH,), w["layer_norm.weight"], w["layer_norm.bias"], 1e-6)


@pytest.mark.parametrize(
    ("logit", "score"),
    [(48, 35.556), (49, 42.886), (50, 50.000), (51, 56.694), (55, 77.494), (75, 99.537), (100, 100)],
)
def test_the_curve_of_the_published_code(logit: float, score: float) -> None:
    one, none = torch.tensor([1.0]), torch.tensor([0.0])
    assert legacy_audio_score(one, one, none, torch.tensor([2.0 * logit, 0])).item() == pytest.approx(score, abs=6e-4)


def test_the_curve_of_the_paper_is_a_half_at_0_and_1_at_1() -> None:
    assert curve(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.5, 1], abs=2e-4)


def test_clip_score_is_the_cosine_and_never_below_nothing() -> None:
    image, text = torch.tensor([[2.0, 0], [1, 0], [1, 0]]), torch.tensor([[3.0, 0], [1, 1], [-1, 0]])
    assert clip_score(image, text).tolist() == pytest.approx([2.5, 2.5 / math.sqrt(2), 0])


def test_audio_score_compares_the_sound_with_caption_and_frame() -> None:
    east, north = torch.tensor([1.0, 0]), torch.tensor([0.0, 1])
    expected = [curve(torch.tensor(s)).item() for s in (1.0, 0.75, 0.5, 0.25)]
    found = [audio_score(east, east, east), audio_score(north, east, east), audio_score(east, east, north)]
    assert [*map(float, found), float(audio_score(north, -east, east))] == pytest.approx(expected)


def test_legacy_audio_score_weighs_dot_products() -> None:
    image, text, audio = torch.tensor([30.0, 0]), torch.tensor([1.0, 1]), torch.tensor([0.0, 9])
    logit = (2.0 * 31 / 2 + 4.0 * 10 / 2) / 2
    expected = 100 * math.exp(-0.693179 * (math.exp(-20 * (logit / 100 - 0.5)) - math.exp(-10)))
    assert float(legacy_audio_score(image, text, audio, torch.tensor([2.0, 4.0]))) == pytest.approx(expected, rel=1e-5)


def test_the_last_sentence_is_the_audible_one() -> None:
    assert audible_sentence("a man sings. the crowd is loud.") == audible_sentence("a man. the crowd is loud. ")
    assert audible_sentence("") == ""


def test_the_published_layout_loads_and_embeds() -> None:
    torch.manual_seed(0)
    clip = small_clip()
    state = published(clip)
    judge = TriLip(clip, Ear(), 10, HIDDEN).eval()
    load_published(judge, state, lambda net: net)
    wave, pixels = torch.randn(2, 12), torch.randn(2, 3, 8, 8)
    ids = torch.tensor([[18, 3, 4, 19], [18, 5, 19, 19]])
    heard = functional.linear(
        functional.linear(
            wave.unfold(1, 4, 4), state["module.a_model.net.layer.weight"], state["module.a_model.net.layer.bias"]
        ),
        state["module.a_model.linear.weight"],
        state["module.a_model.linear.bias"],
    )
    with torch.inference_mode():
        torch.testing.assert_close(judge.embed_audio(wave), head(state, "aud", heard).mean(1))
        images = clip.get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(judge.embed_image(pixels), head(state, "vis", images))
        texts = clip.get_text_features(input_ids=ids, attention_mask=torch.ones_like(ids)).pooler_output
        torch.testing.assert_close(judge.embed_text(ids, torch.ones_like(ids)), head(state, "txt", texts))
    assert judge.scales.tolist() == [2, 3]


def test_a_file_of_another_clip_or_with_a_head_missing_is_refused() -> None:
    clip = small_clip()
    state = published(clip)
    with pytest.raises(InputError, match="another CLIP"):
        load_published(TriLip(small_clip(), Ear(), 10, HIDDEN), state, lambda net: net)
    del state["module.txt_scaler.w_2.bias"]
    with pytest.raises(InputError, match=r"text_head\.narrow\.bias"):
        load_published(TriLip(clip, Ear(), 10, HIDDEN), state, lambda net: net)
