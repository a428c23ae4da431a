"""Weights of the original and of torchvision into videotag, and back: against torchvision itself and by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from models.family import Facts, InputError
from models.videotag import weights
from models.videotag.config import TaggerConfig
from models.videotag.model import Tagger, tiny_tagger
from models.videotag.tsn import Tsn, tiny_tsn

FACTS = Facts({"tag": ["dog", "cat", "bee"]}, 0.0, 1.0)
THEIRS = "cat\nfox\ndog\nbat\nbat"


def bytes_of(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def as_paddle(net: nn.Module) -> dict[str, Tensor]:
    """A ResNet's state as the original would have written it, keys made by the rules of its source one by one."""
    found = {}
    for key, value in net.state_dict().items():
        if key.startswith("fc.") or key.endswith("num_batches_tracked"):
            continue
        parts = key.split(".")
        kind = {"weight": "scale", "bias": "offset", "running_mean": "mean", "running_var": "variance"}[parts[-1]]
        if parts[0] in ("conv1", "bn1"):
            found["conv1_weights" if parts[0] == "conv1" else f"bn_conv1_{kind}"] = value
            continue
        stage, j = int(parts[0][-1]) + 1, int(parts[1])
        many = len(getattr(net, parts[0])) > 8
        block = f"{stage}a" if j == 0 else f"{stage}b{j}" if many else f"{stage}{'abcdefgh'[j]}"
        if parts[2] == "downsample":
            found[f"res{block}_branch1_weights" if parts[3] == "0" else f"bn{block}_branch1_{kind}"] = value
            continue
        branch = "abc"[int(parts[2][-1]) - 1]
        name = f"res{block}_branch2{branch}_weights" if "conv" in parts[2] else f"bn{block}_branch2{branch}_{kind}"
        found[name] = value
    return found


@pytest.mark.parametrize(("depth", "num"), [(50, 265), (101, 520), (152, 775)])
def test_every_key_of_a_resnet_has_its_place(depth: int, num: int) -> None:
    with torch.device("meta"):
        net = getattr(torchvision.models, f"resnet{depth}")()
    keys = weights.resnet_keys(depth)
    wanted = {key for key in net.state_dict() if not key.startswith("fc.") and not key.endswith("num_batches_tracked")}
    assert keys.keys() == wanted
    assert len(set(keys.values())) == num == len(wanted)
    assert set(as_paddle(net)) == set(keys.values())


def test_names_of_blocks() -> None:
    keys = weights.resnet_keys(101)
    assert keys["layer3.22.conv2.weight"] == "res4b22_branch2b_weights"
    assert keys["layer3.0.bn1.running_var"] == "bn4a_branch2a_variance"
    assert keys["layer4.2.conv3.weight"] == "res5c_branch2c_weights"
    assert keys["layer1.0.downsample.1.bias"] == "bn2a_branch1_offset"
    assert weights.resnet_keys(50)["layer3.5.conv1.weight"] == "res4f_branch2a_weights"


def test_the_originals_tsn_is_torchvisions_resnet() -> None:
    torch.manual_seed(0)
    net = torchvision.models.resnet101().eval()
    head = torch.randn(2048, 5), torch.randn(5)
    state = as_paddle(net) | {"fc_0.w_0": head[0], "fc_0.b_0": head[1], "labels": bytes_of(THEIRS)}
    config = tiny_tsn()
    config = replace(config, model=replace(config.model, depth=101, head="name"))
    module = Tsn(config, FACTS).eval()
    before = module.fc.weight.detach().clone()
    report = weights.load_tsn(module, "model", state)
    assert [len(report.loaded), report.dropped] == [522, []]
    assert all(key.endswith("num_batches_tracked") for key in report.fresh) and len(report.fresh) == 104
    assert report.classes == ["class 0 dog: from 2 dog", "class 1 cat: from 0 cat", "class 2 bee: fresh"]
    assert report.lines()[-3:] == report.classes
    assert torch.equal(module.fc.weight[:2], head[0].T[[2, 0]]) and torch.equal(module.fc.weight[2], before[2])
    frames = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    net.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        pixels = ((frames / 255 - mean) / deviation).to(memory_format=torch.channels_last)  # else it rounds otherwise
        torch.testing.assert_close(module.extract(frames), net(pixels))
    back = weights.tsn_to_paddle(module)
    assert all(torch.equal(back[key], value) for key, value in state.items() if not key.startswith(("fc_0", "labels")))
    assert back["fc_0.w_0"].shape == (2048, 3)


def test_torchvisions_own_state_and_what_does_not_fit() -> None:
    torch.manual_seed(0)
    state = torchvision.models.resnet18(num_classes=2).state_dict()
    module = Tsn(tiny_tsn(), FACTS)
    report = weights.load_tsn(module, "model", state)
    assert report.dropped == ["fc.bias", "fc.weight"] and set(report.fresh) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, state[key]) for key, value in module.resnet.state_dict().items())
    config = replace(tiny_tsn(), model=replace(tiny_tsn().model, head="id"))
    report = weights.load_tsn(Tsn(config, FACTS), "model", state)
    assert report.classes == ["class 0 dog: from 0", "class 1 cat: from 1", "class 2 bee: fresh"]
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({}, "neither a ResNet of torchvision nor"),
        ({"conv1_weights": torch.ones(1)}, "50 layers at least"),
        ({key: value for key, value in state.items() if key != "bn1.bias"}, "it lacks bn1.bias"),
        (state | {"layer4.2.conv1.weight": torch.ones(1)}, r"it has layer4.2.conv1.weight and 0 more"),
        (state | {"conv1.weight": torch.ones(64, 1, 7, 7)}, r"conv1.weight is \(64, 1, 7, 7\)"),
    ]
    for wrong, words in cases:
        with pytest.raises(InputError, match=words):
            weights.load_tsn(module, "model", wrong)


# --- tagger --------------------------------------------------------------------------------------------------------------

D, E, H, F1, F2, C = 6, 5, 4, 7, 8, 5


def tagger_config(**changes: Any) -> TaggerConfig:
    config = tiny_tagger()
    model = replace(
        config.model, feature_dim=D, embedding_size=E, lstm_size=H, hidden=[F1, F2], audio=False, dropout=0.5,
        legacy_dropout=True, head="name",
    )  # fmt: skip
    return replace(config, model=replace(model, **changes), segment_frames=0)


def original(peepholes: bool = True) -> dict[str, Tensor]:
    """Random weights of the original's tagger, with its shapes."""
    generator = torch.Generator().manual_seed(4)
    shapes = {
        "rgb_fc.w_0": (D, E), "rgb_fc.b_0": (E,), "rgb_weight.w_0": (2 * H, 1), "fc1.w_0": (2 * H, F1), "fc1.b_0": (F1,),
        "fc2.w_0": (F1, F2), "fc2.b_0": (F2,), "output.w_0": (F2, C), "output.b_0": (C,),
    }  # fmt: skip
    for way in ("forward", "backward"):
        shapes |= {
            f"rgb_fc_{way}.w_0": (E, 4 * H),
            f"rgb_lstm_{way}.w_0": (H, 4 * H),
            f"rgb_lstm_{way}.b_0": (1, 7 * H),
        }
    state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    for way in ("forward", "backward"):
        state[f"rgb_lstm_{way}.b_0"][:, 4 * H :] *= peepholes
    return state | {"labels": bytes_of(THEIRS)}


def by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """(T, D) -> (C,) logits of the original in evaluation, number by number from its formulas."""
    embedded = (x @ state["rgb_fc.w_0"] + state["rgb_fc.b_0"]).tanh()

    def direction(way: str, rows: Tensor) -> list[Tensor]:
        bias = state[f"rgb_lstm_{way}.b_0"][0]
        h, c, seen = torch.zeros(H), torch.zeros(H), []
        p_i, p_f, p_o = bias[4 * H : 5 * H], bias[5 * H : 6 * H], bias[6 * H :]
        for row in rows:
            gates = row @ state[f"rgb_fc_{way}.w_0"] + h @ state[f"rgb_lstm_{way}.w_0"] + bias[: 4 * H]
            new, i, f, o = (gates[k * H : (k + 1) * H] for k in range(4))
            i, f = (i + p_i * c).sigmoid(), (f + p_f * c).sigmoid()
            c = f * c + i * new.tanh()
            h = (o + p_o * c).sigmoid() * c.tanh()
            seen.append(h)
        return seen

    ahead, back = direction("forward", embedded), direction("backward", embedded.flip(0))[::-1]
    states = 0.5 * torch.stack([torch.cat(pair) for pair in zip(ahead, back, strict=True)])
    shares = (states @ state["rgb_weight.w_0"]).softmax(0)
    x = ((shares * states).sum(0) @ state["fc1.w_0"] + state["fc1.b_0"]).relu()
    return (x @ state["fc2.w_0"] + state["fc2.b_0"]).tanh() @ state["output.w_0"] + state["output.b_0"]


def answers(module: Tagger, clips: list[Tensor]) -> Tensor:
    """Logits of clips of several lengths in one batch."""
    features = nn.utils.rnn.pad_sequence(clips, batch_first=True)
    length = torch.tensor([len(clip) for clip in clips])
    with torch.no_grad():
        return module.eval()({"features": features, "length": length, "times": torch.zeros(features.shape[:2])})[
            "logits"
        ]


@pytest.mark.parametrize("pooling", ["peephole", "lstm"])
@pytest.mark.parametrize("legacy", [True, False])
def test_the_originals_tagger_answers_the_same_here(pooling: str, legacy: bool) -> None:
    """Without legacy dropout the factor stands in the weights that read the states (its evaluation halves them)."""
    state = original(peepholes=pooling == "peephole")
    clips = [torch.randn(num, D, generator=torch.Generator().manual_seed(num)) for num in (1, 6, 3)]
    facts = Facts({"tag": ["cat", "fox", "dog", "bat #3", "bat #4"]}, 0.0, 1.0)
    module = Tagger(tagger_config(pooling=pooling, legacy_dropout=legacy), facts)
    report = weights.load_tagger(module, "model", state)
    assert not report.fresh and not report.dropped and len(report.loaded) == len(module.state_dict())
    wanted = torch.stack([by_hand(state, clip) for clip in clips])
    torch.testing.assert_close(answers(module, clips), wanted, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(wanted).all() and wanted.std() > 0.1
    back = weights.tagger_to_paddle(module)
    assert back.keys() == state.keys() - {"labels"}
    for key, value in back.items():
        torch.testing.assert_close(value, state[key])


def test_own_classes_and_what_does_not_fit() -> None:
    state = original()
    module = Tagger(tagger_config(), FACTS)
    report = weights.load_tagger(module, "model", state)
    assert report.classes == ["class 0 dog: from 2 dog", "class 1 cat: from 0 cat", "class 2 bee: fresh"]
    assert torch.equal(module.output.weight[:2], state["output.w_0"].T[[2, 0]])
    fresh = weights.load_tagger(Tagger(tagger_config(head="fresh"), FACTS), "model", state)
    assert fresh.dropped == ["output.b_0", "output.w_0"] and set(fresh.fresh) == {"output.weight", "output.bias"}
    unnamed = {key: value for key, value in state.items() if key != "labels"}
    cases: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
        ({"pooling": "lstm"}, state, "has peepholes, .* set videotag.tagger.model.pooling to peephole"),
        ({"pooling": "mean"}, state, "set videotag.tagger.model.pooling to peephole"),
        ({"lstm_size": 3}, state, "is .* here; give videotag.tagger.model"),
        ({}, {}, "no tagger of the original"),
        ({}, unnamed, "does not tell the names of its classes"),
        ({}, state | {"labels": bytes_of("a\nb")}, "none of its 2 classes has a name of ours"),
        ({}, state | {"audio_fc.w_0": torch.ones(1)}, "it has audio_fc.w_0"),
        (
            {},
            {key: value for key, value in state.items() if key != "rgb_lstm_backward.b_0"},
            "lacks rgb_lstm_backward.b_0",
        ),
    ]
    for changes, wrong, words in cases:
        with pytest.raises(InputError, match=words):
            weights.load_tagger(Tagger(tagger_config(**changes), FACTS), "model", wrong)
