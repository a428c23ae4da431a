"""adatad's weights: transformers' VideoMAE as the judge of what all layouts mean, strictness, OpenTAD, and frozen bases."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEModel

from models.adatad.backbone import Backbone
from models.adatad.config import BackboneConfig, DetectorConfig
from models.adatad.detector import Detector
from models.adatad.weights import load, load_backbone
from models.embed import sincos_in_turn
from models.family import InputError, LoadReport
from models.weights import frozen_digest, frozen_state, trained_state
from tasks.pretrained import load_state

SMALL = BackboneConfig(
    model_name="none",
    mode="adapter",
    dim=16,
    num_layers=2,
    num_heads=2,
    mlp_dim=24,
    patch_size=8,
    tubelet=2,
    chunk_frames=4,
    frame_size=16,
    pretrained_grid=2,
    adapter_dim=4,
    first_adapter=1,
    drop_path=0.0,
    checkpointing=False,
    chunks_at_once=0,
)
State = dict[str, Tensor]


def build(**change) -> Backbone:
    return Backbone(dataclasses.replace(SMALL, **change)).eval()


@pytest.fixture(scope="module")
def peer() -> VideoMAEModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    pictures = {"image_size": 16, "patch_size": 8, "num_frames": 4, "tubelet_size": 2}
    model = VideoMAEModel(VideoMAEConfig(layer_norm_eps=1e-6, use_mean_pooling=True, **sizes, **pictures))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def features(peer: VideoMAEModel, frames: Tensor) -> Tensor:
    """(dim, steps) as transformers has them: of one window (T, 3, S, S), chunk by chunk."""
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    tokens = peer(((frames / 255 - mean) / deviation).unflatten(0, (-1, 4))).last_hidden_state
    return tokens.reshape(-1, 4, 16).mean(1).T


# --- the four layouts ----------------------------------------------------------------------------------------------------


def renamed(state: State, blocks: str, pairs: list[tuple[str, str]]) -> State:
    found = {}
    for key, value in state.items():
        name = key.replace("encoder.layer.", blocks)
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        found[name] = value
    return found


def joined(state: State, stem: str, first: str, second: str) -> State:
    """With queries, keys and values in one tensor, as outside transformers."""
    pairs = [
        ("embeddings.patch_embeddings.projection", stem),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.output.dense", "attn.proj"),
        ("intermediate.dense", first),
        ("output.dense", second),
        ("attention.attention.query.bias", "attn.q_bias"),
        ("attention.attention.value.bias", "attn.v_bias"),
    ]
    found = renamed({key: value for key, value in state.items() if "attention.attention" not in key}, "blocks.", pairs)
    biases = {key: value for key, value in state.items() if "attention.attention" in key and key.endswith("bias")}
    found |= renamed(biases, "blocks.", pairs)
    for i in range(2):
        rows = [state[f"encoder.layer.{i}.attention.attention.{row}.weight"] for row in ("query", "key", "value")]
        found[f"blocks.{i}.attn.qkv.weight"] = torch.cat(rows)
    return found


def layouts(peer: VideoMAEModel) -> dict[str, State]:
    """One model in all layouts, with the heads and norms that such files have."""
    new = dict(peer.state_dict())
    old = [("attention.attention.query.bias", "attention.attention.q_bias")]
    old += [("attention.attention.value.bias", "attention.attention.v_bias")]
    norm = {"fc_norm.weight": torch.ones(16), "fc_norm.bias": torch.zeros(16)}
    head = {"head.weight": torch.zeros(3, 16), "head.bias": torch.zeros(3)}
    backbone = joined(new, "patch_embed.projection", "mlp.layers.0.0", "mlp.layers.1") | norm
    backbone["pos_embed"] = sincos_in_turn(8, 16)[None]
    mmaction = {f"backbone.{key}": value for key, value in backbone.items()}
    return {
        "mmaction2": mmaction | {"cls_head.fc_cls.weight": torch.zeros(3, 16)},
        "original": joined(new, "patch_embed.proj", "mlp.fc1", "mlp.fc2") | norm | head,
        "transformers 4": renamed(new, "encoder.layer.", old),
        "transformers 5": new,
        "transformers 5, a classifier": {f"videomae.{key}": value for key, value in new.items()} | norm,
    }


KINDS = ["mmaction2", "original", "transformers 4", "transformers 5", "transformers 5, a classifier"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_features_of_transformers(kind: str, peer: VideoMAEModel) -> None:
    module, state = build(), layouts(peer)[kind]
    report = load_backbone(module, state)
    frames = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(module(frames[None])[0], features(peer, frames), rtol=1e-4, atol=1e-4)
    assert {*report.loaded, *report.fresh} == set(module.state_dict())
    assert all(key.startswith("adapters.") for key in report.fresh)
    beside = {"mmaction2": 4, "original": 4, "transformers 5, a classifier": 2}
    assert len(report.dropped) == beside.get(kind, 0)
    assert all("norm." in key or "head." in key or "pos_embed" in key for key in report.dropped)


@pytest.mark.parametrize("wrapper", ["state_dict", "module", "model", "state_dict_ema", ""])
def test_wrapped_files_are_opened(wrapper: str, peer: VideoMAEModel, tmp_path: Path) -> None:
    state = layouts(peer)["original"]
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "weights.pth")
    module = build()
    load_backbone(module, load_state(str(tmp_path / "weights.pth"))[0])
    assert torch.equal(module.patch.bias, state["patch_embed.proj.bias"])


def test_averaged_weights_go_before_the_last_ones(peer: VideoMAEModel, tmp_path: Path) -> None:
    state = layouts(peer)["mmaction2"]
    last = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"state_dict": last, "state_dict_ema": state}, tmp_path / "weights.pth")
    assert load_state(str(tmp_path / "weights.pth"))[0]["backbone.patch_embed.projection.bias"].any()


def test_positions_are_the_resized_table_and_not_transformers_own_for_small_pictures() -> None:
    table = build(frame_size=16, pretrained_grid=4).positions
    assert table.shape == build().positions.shape
    assert not torch.allclose(table, build().positions, atol=0.1)


def test_report_says_every_key() -> None:
    report = LoadReport(
        ["patch.weight", "blocks.0.fc1.0", "blocks.10.fc1.0", "blocks.2.fc1.0"], ["scale.1"], ["head.bias"]
    )
    assert report.lines() == [
        "loaded patch.weight",
        "loaded blocks.{0,2,10}.fc1.0",
        "fresh scale.1",
        "dropped head.bias",
    ]


# --- what does not fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 32}, r"its tokens have 16 channels and adatad\.model\.backbone\.dim is 32"),
        ({"num_layers": 1}, r"it has \S+\.1\.\S+ and \d+ more tensors that have no place here"),
        ({"num_layers": 3}, r"it lacks \S+\.2\.\S+ and \d+ more tensors"),
        ({"patch_size": 4}, r"its patches are \(3, 2, 8, 8\) and here \(3, 2, 4, 4\)"),
        ({"mlp_dim": 64}, r"is \(24, 16\) and blocks\.0\.fc1\.weight \(64, 16\) here"),
    ],
)
def test_another_size_is_refused(kind: str, change: dict, message: str, peer: VideoMAEModel) -> None:
    module = build(**change)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_backbone(module, layouts(peer)[kind])
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items()), "nothing is half loaded"


def test_what_is_not_known_is_refused(peer: VideoMAEModel) -> None:
    state = layouts(peer)["mmaction2"]
    for change, message in [
        ({"backbone.blocks.0.gamma_1": torch.ones(16)}, r"it has backbone\.blocks\.0\.gamma_1"),
        ({"backbone.pos_embed": torch.zeros(1, 8, 16)}, "not VideoMAE's table of fixed positions"),
        ({"backbone.pos_embed": torch.zeros(1, 18, 16)}, r"pretrained_grid 2; give adatad\.model"),
        ({"backbone.patch_embed.projection.weight": torch.zeros(16, 3, 8, 8)}, r"its patches are \(3, 8, 8\)"),
    ]:
        with pytest.raises(InputError, match=message):
            load_backbone(build(), state | change)
    with pytest.raises(InputError, match=r"no VideoMAE: it has none of patch_embed\.projection\.weight with"):
        load_backbone(build(), {"layer1.weight": torch.zeros(1)})


def test_a_number_of_heads_that_was_never_trained_is_refused() -> None:
    with torch.device("meta"):
        module = build(dim=384, num_heads=16, num_layers=1)
    state = {"patch_embed.proj.weight": torch.zeros(384, 3, 2, 8, 8), "blocks.0.attn.q_bias": torch.zeros(384)}
    with pytest.raises(InputError, match=r"num_heads is 16; VideoMAE with 384 channels has 6"):
        load_backbone(module, state)


# --- OpenTAD -------------------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """As much of the phase's module as has weights."""

    def __init__(self, classes: int = 5, **change) -> None:
        super().__init__()
        self.backbone = build(**change)
        self.detector = Detector(
            DetectorConfig(dim=12, num_heads=2, mlp_dim=20, stem_layers=2, num_levels=6, drop_path=0.1), 16, classes
        )


def opentad_detector(classes: int = 5) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of OpenTAD's ActionFormer, 12 channels wide, behind features of 16 channels."""
    shapes: dict[str, tuple[int, ...]] = {}

    def unit(name: str, inside: int) -> None:
        shapes.update(
            {f"{name}.conv.weight": (12, inside, 3), f"{name}.norm.weight": (12,), f"{name}.norm.bias": (12,)}
        )

    for i in range(2):
        unit(f"projection.embed.{i}", 12 if i else 16)
        unit(f"rpn_head.cls_convs.{i}", 12)
        unit(f"rpn_head.reg_convs.{i}", 12)
    for block in [*(f"stem.{i}" for i in range(2)), *(f"branch.{i}" for i in range(5))]:
        name = f"projection.{block}"
        norms = ["ln1", "ln2", *(f"attn.{row}_norm" for row in ("query", "key", "value"))]
        shapes |= {f"{name}.{norm}.{kind}": (12,) for norm in norms for kind in ("weight", "bias")}
        for row in ("query", "key", "value", "proj"):
            shapes |= {f"{name}.attn.{row}.weight": (12, 12, 1), f"{name}.attn.{row}.bias": (12,)}
        shapes |= {f"{name}.attn.{row}_conv.conv.weight": (12, 1, 3) for row in ("query", "key", "value")}
        shapes |= {f"{name}.mlp.0.weight": (20, 12, 1), f"{name}.mlp.0.bias": (20,)}
        shapes |= {f"{name}.mlp.3.weight": (12, 20, 1), f"{name}.mlp.3.bias": (12,)}
        shapes |= {f"{name}.drop_path_{branch}.scale": (1, 12, 1) for branch in ("attn", "mlp")}
    for level in range(6):
        shapes |= {f"neck.fpn_norms.{level}.{kind}": (12,) for kind in ("weight", "bias")}
        shapes[f"rpn_head.scale.{level}.scale"] = ()
    for head, answers in (("cls", classes), ("reg", 2)):
        shapes |= {f"rpn_head.{head}_head.weight": (answers, 12, 3), f"rpn_head.{head}_head.bias": (answers,)}
    return shapes


def opentad(peer: VideoMAEModel, place: str, adapters: int, classes: int = 5) -> State:
    """A released checkpoint; `place` says where its adapters are."""
    vit = {key.removeprefix("backbone."): v for key, v in layouts(peer)["mmaction2"].items() if "cls_head" not in key}
    for i in range(adapters):
        name = place.format(i)
        shapes = {"down_proj.weight": (4, 16), "down_proj.bias": (4,), "up_proj.weight": (16, 4), "up_proj.bias": (16,)}
        shapes |= {
            "dwconv.weight": (4, 1, 3),
            "dwconv.bias": (4,),
            "conv.weight": (4, 4, 1),
            "conv.bias": (4,),
            "gamma": (1,),
        }
        vit |= {f"{name}.{key}": torch.randn(shape) for key, shape in shapes.items()}
    state = {f"backbone.model.backbone.{key}": value for key, value in vit.items()}
    state |= {key: torch.randn(shape) for key, shape in opentad_detector(classes).items()}
    state["rpn_head.loss_normalizer"] = torch.tensor(250.0)
    return {f"module.{key}": value for key, value in state.items()}


RELEASED = [("adapter", "blocks.{}.adapter", 2), ("side", "ladders.adapters.{}", 1), ("frozen", "", 0), ("full", "", 0)]


@pytest.mark.parametrize(("mode", "place", "adapters"), RELEASED)
def test_released_weights_fill_the_whole_module(mode: str, place: str, adapters: int, peer: VideoMAEModel) -> None:
    state, module = opentad(peer, place, adapters), Whole(mode=mode)
    assert len(opentad_detector()) == len(module.detector.state_dict()) == 229
    report = load(module, "backbone", state)
    assert report.fresh == []
    assert set(report.loaded) == set(module.state_dict())
    vit = "module.backbone.model.backbone"
    assert report.dropped == [
        *(f"{vit}.{key}" for key in ("fc_norm.bias", "fc_norm.weight", "pos_embed")),
        "module.rpn_head.loss_normalizer",
    ]
    own = module.state_dict()
    if adapters:
        first = f"{vit}.{place.format(0)}"
        assert torch.equal(own["backbone.adapters.0.depthwise.weight"][..., 0], state[f"{first}.dwconv.weight"])
        assert torch.equal(own["backbone.adapters.0.pointwise.weight"], state[f"{first}.conv.weight"][..., 0])
        assert torch.equal(own["backbone.adapters.0.down.weight"], state[f"{first}.down_proj.weight"])
    branch, theirs = "detector.branch.3", "module.projection.branch.3"
    for row in ("query", "key", "value"):
        assert torch.equal(own[f"{branch}.attn.{row}.conv.weight"], state[f"{theirs}.attn.{row}_conv.conv.weight"])
        assert torch.equal(own[f"{branch}.attn.{row}.norm.weight"], state[f"{theirs}.attn.{row}_norm.weight"])
        assert torch.equal(own[f"{branch}.attn.{row}.project.weight"], state[f"{theirs}.attn.{row}.weight"][..., 0])
    assert torch.equal(own[f"{branch}.attn.out.weight"], state[f"{theirs}.attn.proj.weight"][..., 0])
    assert torch.equal(own[f"{branch}.branch2.scale"], state[f"{theirs}.drop_path_mlp.scale"][0, :, 0])
    assert torch.equal(own["detector.classes.units.1.conv.weight"], state["module.rpn_head.cls_convs.1.conv.weight"])
    assert torch.equal(own["detector.offsets.answer.bias"], state["module.rpn_head.reg_head.bias"])
    assert own["detector.scales.5"].item() == state["module.rpn_head.scale.5.scale"].item()


def test_released_weights_for_other_classes_leave_the_answer_fresh(peer: VideoMAEModel) -> None:
    report = load(Whole(), "backbone", opentad(peer, "blocks.{}.adapter", 2, classes=20))
    assert report.fresh == ["detector.classes.answer.weight", "detector.classes.answer.bias"]
    assert {"module.rpn_head.cls_head.bias", "module.rpn_head.cls_head.weight"} <= set(report.dropped)


def test_released_weights_of_another_mode_are_refused(peer: VideoMAEModel) -> None:
    state = opentad(peer, "blocks.{}.adapter", 2)
    with pytest.raises(InputError, match=r"it lacks \S+ladders\.adapters\.0"):
        load(Whole(mode="side"), "backbone", state)
    with pytest.raises(InputError, match=r"it has \S+blocks\.0\.adapter\.conv\.bias and 17 more"):
        load(Whole(mode="full"), "backbone", state)


# --- what is trained, and the frozen base --------------------------------------------------------------------------------


def test_trained_state_lacks_the_frozen_base_alone() -> None:
    module = Whole()
    trained, frozen = trained_state(module), frozen_state(module)
    assert {*trained, *frozen} == set(module.state_dict())
    assert all(key.startswith(("backbone.adapters.", "detector.")) for key in trained)
    assert all(key.startswith(("backbone.patch.", "backbone.blocks.")) for key in frozen)
    assert len(trained) == 2 * 9 + 229
    assert not frozen_state(Whole(mode="full"))


def test_digest_is_of_the_frozen_bytes() -> None:
    module = build()
    frozen = [p for name, p in sorted(module.named_parameters()) if not name.startswith("adapters.")]
    joined = b"".join(p.detach().numpy().tobytes() for p in frozen)
    assert frozen_digest(module) == hashlib.sha256(joined).hexdigest()
    before = frozen_digest(module)
    nn.init.ones_(module.adapters[0].up.weight)
    assert frozen_digest(module) == before
    with torch.no_grad():
        module.blocks[1].fc2.bias[3] += 1e-6
    assert frozen_digest(module) != before
