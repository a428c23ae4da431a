"""adatad's module: its loss over pieces of a batch, its answers in seconds, and what of it is trained how."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.adatad import targets
from models.adatad.config import Augmentation, DetectorConfig, FinetuneConfig, ModelConfig
from models.adatad.model import Finetune, interpolation, parameter_groups, tiny_model
from models.family import Batch, Facts, InputError
from tasks import params
from tasks.data.batches import TensorClips
from tasks.engine import checkpoint, distributed, loop, memory, optim
from tasks.engine.run import Task
from tasks.preset import load_preset
from tests.tasks import toy_training as toy

FACTS = Facts({"label": ["dive", "jump", "throw"]}, 0.0, 1.0)


def config(model: ModelConfig | None = None, **changes: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "model": model or tiny_model(), "augment": Augmentation(min_area=1.0, rand_ops=0, color=0.0, hue=0.0),
        "keep_threshold": 0.75, "crop_ratio": [0.9, 1.0], "overlap": 0.5, "center_radius": 1.5, "label_smoothing": 0.0,
        "normalizer": 100.0, "adapter_lr": 2.0, "min_score": 0.001, "max_per_window": 20, "max_per_video": 50,
        "nms_sigma": 0.7,
        "classifier_top": 0,
    }  # fmt: skip
    return FinetuneConfig(**values | changes)


def published() -> ModelConfig:
    """VideoMAE-S with adapters at 768 frames of 160 pixels."""
    backbone = replace(
        tiny_model().backbone, dim=384, num_layers=12, num_heads=6, mlp_dim=1536, patch_size=16, chunk_frames=16,
        frame_size=160, pretrained_grid=14, adapter_dim=96,
    )  # fmt: skip
    detector = DetectorConfig(dim=512, num_heads=4, mlp_dim=2048, stem_layers=2, num_levels=6, drop_path=0.1)
    return ModelConfig(backbone=backbone, detector=detector, window=768, scale_factor=1, max_segments=64)


def windows(num: int) -> Batch:
    """As the transform makes them: the last ones shorter than the window, none to several segments each."""
    model = tiny_model()
    start, length = 12 * torch.rand(num, 4, 1), 1 + 8 * torch.rand(num, 4, 1)
    segments = torch.cat([start, (start + length).clamp(max=model.window)], 2)
    classes = torch.randint(0, 3, (num, 4)).masked_fill(torch.arange(4) >= torch.arange(num)[:, None], -1)
    mask = torch.arange(model.window) < torch.tensor([16, 16, 16, 13, 9, 5])[-num:, None]
    at = targets.points(model.window, model.detector.num_levels)
    positive = [targets.count_positive(at, *one, 1.5) for one in zip(segments, classes, mask, strict=True)]
    return {
        "frames": torch.randint(0, 256, (num, 16, 3, 16, 16), dtype=torch.uint8), "mask": mask, "segments": segments,
        "classes": classes, "start": 3.0 * torch.arange(num), "step": torch.full((num,), 0.25),
        "duration": torch.full((num,), 15.0), "clip": torch.arange(num) // 2, "row": torch.arange(num),
        "num_positive": torch.stack(positive),
    }  # fmt: skip


def build(seed: int = 1, **changes: Any) -> Finetune:
    """A module whose adapters have left their zeros."""
    torch.manual_seed(seed)
    module = Finetune(config(**changes), FACTS)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module


# --- losses --------------------------------------------------------------------------------------------------------------


def test_loss_is_both_sums_over_the_moving_average() -> None:
    module, batch = build().train(), windows(6)
    at = targets.points(16, 3)
    wanted = targets.assign(at, batch["segments"], batch["classes"], batch["mask"], 3, 1.5)
    number = int(wanted.positive.sum())
    assert number == batch["num_positive"].sum() and number > 20
    logits, offsets, valid = module.detector(module.features(batch["frames"]), batch["mask"])
    sums = targets.loss_sums(logits, offsets, valid, wanted, 0.0)
    losses = module(batch)
    normalizer = 0.9 * 100 + 0.1 * number
    torch.testing.assert_close(losses["loss_cls"], sums[0] / normalizer)
    torch.testing.assert_close(losses["loss_reg"], sums[1] / normalizer)
    torch.testing.assert_close(losses["loss"], losses["loss_cls"] + losses["loss_reg"])
    assert module.normalizer == 100, "a forward pass moves nothing"


def test_the_average_moves_once_a_step_and_starts_from_what_was_kept() -> None:
    module = build()
    for total, expected in ((7.0, 90.7), (0.0, 81.73)):
        module.end_step({"total_positive": torch.tensor(total), "total_clips": torch.tensor(2.0)})
        assert module.normalizer.item() == pytest.approx(expected)
    again = build(seed=2)
    again.load_state_dict(module.state_dict())
    assert again.normalizer == module.normalizer


@pytest.mark.parametrize("size", [1, 4])
def test_pieces_of_a_batch_have_its_loss_and_gradient(size: int) -> None:
    batch = windows(6)
    batch |= {"total_positive": batch["num_positive"].sum(), "total_clips": torch.tensor(6.0)}
    found: list[tuple[float, list[Tensor]]] = []
    for pieces in ([batch], memory.split(batch, size)):
        module, loss = build().train(), torch.tensor(0.0)
        for piece in pieces:
            loss = loss + module(piece)["loss"] * len(piece["row"]) / 6
        found.append(
            (loss.item(), list(torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])))
        )
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    alone = {key: value for key, value in batch.items() if not key.startswith("total_")}
    assert build().train()(alone)["loss"].item() == pytest.approx(found[0][0]), "it counts for itself"


class NumAnswers:
    """How many answers there are, of windows of which each is seen once."""

    def __init__(self) -> None:
        self.number = 0.0

    def update(self, predictions: Batch, batch: Batch) -> None:
        self.number += (predictions["classes"] >= 0).sum().item()

    def compute(self) -> dict[str, float]:
        return {"answers": self.number}


def test_training_in_pieces_is_training_at_once(tmp_path: Path) -> None:
    clips = TensorClips(windows(6))
    kept = []
    for name, micro_batch in (("whole", None), ("pieces", 2)):
        task = Task(build(), clips, clips, NumAnswers, ("answers", "max"), parameter_groups=parameter_groups(config()))
        settings = toy.settings(epochs=2, batch_size=3, micro_batch=micro_batch, schedule_epochs=4, ema_decay=0.5)
        loop.fit(task, settings, distributed.Place(torch.device("cpu")), tmp_path / name, lambda metrics, step: None)
        saved = checkpoint.read(tmp_path / name, "last")
        assert saved is not None
        kept.append(saved[0])
    assert kept[0]["normalizer"] < 100
    # What all keys have in common changes no attention: its gradient is rounding alone, which AdamW makes large.
    real = [
        {key: v for key, v in each.items() if not key.endswith(("key.norm.bias", "key.project.bias"))} for each in kept
    ]
    torch.testing.assert_close(real[1], real[0], atol=1e-5, rtol=1e-5)


def test_a_step_of_a_piece_has_no_graph_break() -> None:
    """With what test_families.py does not try: a piece of a batch, branches left out, smoothed targets."""
    model = replace(tiny_model(), detector=replace(tiny_model().detector, drop_path=0.5))
    module, batch = build(model=model, label_smoothing=0.1).train(), windows(3)
    batch |= {"total_positive": torch.tensor(9.0), "total_clips": torch.tensor(6.0)}
    losses = []
    for forward in (torch.compile(module, backend="eager", fullgraph=True), module):
        torch.manual_seed(3)
        losses.append(forward(batch)["loss"])
    torch.testing.assert_close(*losses)


# --- answers -------------------------------------------------------------------------------------------------------------


def test_answers_are_sorted_and_lie_within_the_video() -> None:
    module, batch = build().eval(), windows(6)
    with torch.no_grad():
        found = module(batch)
    assert all(found[name].shape == (6, 20) for name in ("starts", "ends", "scores", "classes"))
    assert torch.equal(found["clip"], batch["clip"]) and torch.equal(found["window_start"], batch["start"])
    assert (found["scores"].diff(dim=1) <= 0).all() and found["classes"].dtype == torch.int64
    assert (found["starts"] >= 0).all() and (found["ends"] <= 15).all()
    assert torch.equal(found["scores"] > 0, found["classes"] >= 0)


def test_a_detector_that_knows_the_truth_gives_it_in_seconds() -> None:
    module, batch = build().eval(), windows(6)
    wanted = targets.assign(targets.points(16, 3), batch["segments"], batch["classes"], batch["mask"], 3, 1.5)

    class Knowing(nn.Module):
        def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return 40 * wanted.classes - 20, wanted.offsets, torch.ones_like(wanted.positive)

    module.detector = Knowing()  # pyright: ignore[reportAttributeAccessIssue]
    found = module(batch)
    for row in range(6):
        truth = batch["start"][row] + 0.25 * batch["segments"][row]
        sure = found["scores"][row] > 0.99
        assert sure.sum() == wanted.classes[row].sum().clamp(max=20)
        for segment, name in zip(
            torch.stack([found["starts"], found["ends"]], -1)[row][sure], found["classes"][row][sure], strict=True
        ):
            own = truth[batch["classes"][row] == name].clamp(max=15)
            assert (own - segment).abs().amax(1).min() < 1e-4


@pytest.mark.parametrize(("steps", "window"), [(384, 768), (8, 16), (16, 16), (32, 16), (6, 9)])
def test_features_are_interpolated_linearly(steps: int, window: int) -> None:
    features = torch.randn(2, 5, steps)
    expected = functional.interpolate(features, window, mode="linear", align_corners=False)
    torch.testing.assert_close(features @ interpolation(steps, window), expected)


# --- what is trained -----------------------------------------------------------------------------------------------------


def test_published_size_trains_337_tensors_at_two_rates() -> None:
    with torch.device("meta"):
        module = Finetune(config(published()), Facts({"label": [str(i) for i in range(20)]}, 0.0, 1.0))
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    inside = {name for name in trained if name.startswith("backbone.")}
    assert (len(trained), len(inside)) == (337, 12 * 9)
    assert sum(trained[name].numel() for name in inside) == 1_006_860
    assert all(p.ndim for p in trained.values()), "FSDP shards no scalars"
    optimizer = optim.build_optimizer(module, 1e-4, 0.05, 0.999, parameter_groups(config()))
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in trained.items():
        plain = parameter.ndim < 2 and name not in inside
        assert found[id(parameter)] == (2e-4 if name in inside else 1e-4, 0.0 if plain else 0.05), name


@pytest.mark.parametrize(
    ("name", "dim", "layers", "patch"),
    [("s", 384, 12, 16), ("b", 768, 12, 16), ("l", 1024, 24, 16), ("h", 1280, 32, 16), ("g", 1408, 40, 14)],
)
def test_presets_have_the_published_sizes(name: str, dim: int, layers: int, patch: int) -> None:
    values = load_preset("adatad", f"thumos_videomae_{name}")["adatad"]
    model = params.typed(ModelConfig, values["model"], "adatad.model")
    with torch.device("meta"):
        module = Finetune(config(model), Facts({"label": [str(i) for i in range(20)]}, 0.0, 1.0))
    mlp, hidden = {"g": 6144}.get(name, 4 * dim), dim // 4
    block = 3 * dim**2 + 2 * dim + dim**2 + dim + 2 * dim * mlp + mlp + dim + 4 * dim  # no bias of keys; two norms
    adapter = 2 * dim * hidden + hidden + dim + 4 * hidden + hidden**2 + hidden + 1
    vit = 6 * patch**2 * dim + dim + layers * block
    assert vit == {"s": 21_879_936 - 768, "b": 86_227_200 - 1536}.get(name, vit)
    assert sum(p.numel() for p in module.backbone.parameters()) == vit + layers * adapter
    trained = [p.numel() for p in module.backbone.parameters() if p.requires_grad]
    assert (len(trained), sum(trained)) == (9 * layers, layers * adapter)
    assert module.positions.shape == (1512,) and module.resize.shape == (384, 768)
    # Tokens of a chunk: 38,400 of a window of 48 chunks, but for patches of 14 pixels.
    assert module.backbone.positions.shape == (8 * (11 if name == "g" else 10) ** 2, dim)


def test_a_model_that_does_not_fit_itself_is_one_line() -> None:
    with pytest.raises(InputError, match="window is 18; it must be a multiple of"):
        Finetune(config(replace(tiny_model(), window=18)), FACTS)
