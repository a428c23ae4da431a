"""The training engine against closed forms and against itself without the feature under test."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models.family import Batch, InputError, ParameterGroup
from tasks.data.batches import GlobalBatches, TensorClips, stack
from tasks.engine import distributed, loop, memory, optim
from tasks.engine.run import Task, build_run
from tests.tasks import toy_training as toy

HERE = distributed.Place(torch.device("cpu"))


def weights(work: Path, **given: Any) -> dict[str, torch.Tensor]:
    toy.train_here(work, **given)
    return toy.last_weights(work)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=0)


# --- optimizer --------------------------------------------------------------------------------------------------------


def test_schedule_is_linear_then_half_a_cosine() -> None:
    rates = [optim.learning_rate(step, 10, 4, 1.0, 0.1) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[7] == pytest.approx(0.1 + 0.9 * 0.5)  # half way
    assert rates[9] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 5 / 6)))
    assert optim.learning_rate(10, 10, 4, 1.0, 0.1) == pytest.approx(0.1)


def test_schedule_is_linear_up_and_down() -> None:
    """FAVDBench's of 70,200 steps, 7,020 of them warm-up: (S - s) / (S - W) afterwards (specs/avlformer.md §3)."""
    rates = [
        optim.learning_rate(step, 70_200, 7_020, 1e-4, 0.0, "linear") for step in (0, 7_019, 7_020, 38_610, 70_199)
    ]
    assert rates == pytest.approx([1e-4 / 7_020, 1e-4, 1e-4, 0.5e-4, 1e-4 / 63_180])


def test_warmup_longer_than_the_run_is_cut_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = toy.train_here(tmp_path, warmup_epochs=50.0, epochs=2, lr=1e-2)
    assert (
        "warning: a warm-up of 250 steps is longer than the run; it is cut to the run's 10" in capsys.readouterr().out
    )
    assert [row["lr"] for row in fitted.history] == [pytest.approx(5e-3), pytest.approx(1e-2)]


def test_schedule_laid_over_more_epochs_than_are_trained(tmp_path: Path) -> None:
    """AdaTAD's: 100 steps an epoch, 5 epochs of warm-up, a cosine over 100 epochs of which 60 are trained."""
    train = TensorClips({"x": torch.zeros(200, 8), "y": torch.zeros(200, 2)})
    changes = {"epochs": 60, "schedule_epochs": 100, "batch_size": 2, "warmup_epochs": 5.0, "lr": 1.0, "min_lr": 0.0}
    run = build_run(replace(toy.build_task(), train=train), toy.settings(**changes), HERE, tmp_path, lambda: False)
    assert run.steps == 6000
    rates = {0: 1 / 500, 499: 1.0, 500: 1.0, 4000: 0.70, 6000: 0.377}
    assert {step: run.rate(step) for step in rates} == pytest.approx(rates, abs=2e-3)
    assert run.rate(6000) == pytest.approx(0.5 * (1 + math.cos(math.pi * 5500 / 9500)))


def test_decay_only_on_weights_of_two_dimensions() -> None:
    groups = optim.build_optimizer(toy.Regressor(), 1e-3, 0.3, 0.9, {}).param_groups
    assert [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in groups] == [(0.3, {2}), (0.0, {1})]
    assert sum(len(g["params"]) for g in groups) == 6, "frozen parameters are no business of the optimizer"


def test_a_group_has_a_rate_and_a_decay_of_its_own() -> None:
    rules = {"layers.1": ParameterGroup(2.0, decay_all=True), "layers": ParameterGroup(0.5, decay_all=False)}
    module = toy.Regressor()
    optimizer = optim.build_optimizer(module, 1e-3, 0.3, 0.9, rules)
    optim.set_rate(optimizer, 1e-2)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    expected = {
        "layers.0.weight": (5e-3, 0.3), "layers.0.bias": (5e-3, 0.0), "layers.1.weight": (2e-2, 0.3),
        "layers.1.bias": (2e-2, 0.3), "head.weight": (1e-2, 0.3), "head.bias": (1e-2, 0.0),
    }  # fmt: skip
    assert {name: found.get(id(p)) for name, p in module.named_parameters() if p.requires_grad} == expected


def test_a_group_trains_at_its_rate_to_the_end(tmp_path: Path) -> None:
    """A group at half the rate moves as it would, had the whole run that rate; logs tell the phase's."""
    task = replace(toy.build_task(), parameter_groups={"layers.0.bias": ParameterGroup(0.5, decay_all=False)})
    start = toy.build_task().module.state_dict()["layers.0.bias"]
    fitted = loop.fit(
        task, toy.settings(epochs=1, batch_size=42, clip_grad=0.0), HERE, tmp_path / "a", lambda m, s: None
    )
    whole = toy.train_here(tmp_path / "b", epochs=1, batch_size=42, clip_grad=0.0)
    moved = [toy.last_weights(tmp_path / name)["layers.0.bias"] - start for name in "ab"]
    torch.testing.assert_close(2 * moved[0], moved[1])
    assert fitted.history[0]["lr"] == whole.history[0]["lr"]


def test_average_of_weights_in_closed_form() -> None:
    module = nn.Linear(1, 1, bias=False)
    seen = [0.0, 1.0, 5.0, -2.0]
    nn.init.constant_(module.weight, seen[0])
    average = optim.MovingAverage(module.state_dict(), 0.8)
    for value in seen[1:]:
        nn.init.constant_(module.weight, value)
        average.update()
    expected = 0.8**3 * seen[0] + 0.2 * (0.8**2 * seen[1] + 0.8 * seen[2] + seen[3])
    assert average.state["weight"].item() == pytest.approx(expected, abs=1e-6)
    with average.in_place():
        assert module.weight.item() == pytest.approx(expected, abs=1e-6)
    assert module.weight.item() == seen[-1]


def test_clipping_scales_all_gradients_together() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert optim.clip(parameters, 0.0).item() == 5.0
    assert parameters[1].grad.item() == 4.0
    assert optim.clip(parameters, 1.0).item() == 5.0
    assert [parameters[0].grad[0].item(), parameters[1].grad.item()] == pytest.approx([0.6, 0.8], abs=1e-5)


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_accumulation_is_the_whole_batch(tmp_path: Path, micro_batch: int) -> None:
    whole, pieces = weights(tmp_path / "a"), weights(tmp_path / "b", micro_batch=micro_batch)
    assert_close(pieces, whole)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_loss_over_a_count_of_the_whole_batch_does_not_know_pieces(tmp_path: Path, micro_batch: int) -> None:
    whole = weights(tmp_path / "a", kind=toy.Counted)
    assert_close(weights(tmp_path / "b", kind=toy.Counted, micro_batch=micro_batch), whole)
    average, train = 4.0, toy.build_task().train
    for keys in GlobalBatches(toy.NUM_TRAIN, 8, 5, 0, 15):  # moved once a step, by all clips of the step
        average = 0.5 * average + 0.5 * sum(int(train[key]["num_items"]) for key in keys)
    assert whole["average"].item() == pytest.approx(average)


@pytest.mark.parametrize("micro_batch", [2, 3])
def test_contrastive_accumulation_compares_all_clips_of_the_batch(tmp_path: Path, micro_batch: int) -> None:
    whole = weights(tmp_path / "a", kind=toy.Pairs)
    pieces = weights(tmp_path / "b", kind=toy.Pairs, micro_batch=micro_batch)
    assert_close(pieces, whole)
    apart = weights(tmp_path / "c", kind=toy.Pairs, batch_size=2)
    assert not torch.allclose(apart["left.0.weight"], whole["left.0.weight"], atol=1e-3), "the test would see nothing"


def test_gradient_caching_draws_the_same_dropout_twice() -> None:
    torch.manual_seed(0)
    module, clips = toy.Pairs(dropout=0.5), toy.clips(6, 1)
    micros = memory.split(stack([clips[0, row] for row in range(6)]), 2)
    torch.manual_seed(7)
    memory.cached_gradients(module, module, micros, HERE.device, amp=False)
    cached, drawn = {key: p.grad for key, p in module.named_parameters()}, torch.rand(1)
    module.zero_grad()
    torch.manual_seed(7)
    parts = [module(micro, part="embeddings") for micro in micros]
    module.joint_loss({key: torch.cat([part[key] for part in parts]) for key in parts[0]})["loss"].backward()
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(cached[key], parameter.grad)
    assert torch.equal(drawn, torch.rand(1)), "random numbers go on as if each micro-batch had been seen once"


@pytest.mark.parametrize("kind", ["Regressor", "Pairs"])
def test_out_of_memory_halves_the_micro_batch_and_restarts_the_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"dropout": 0.4}
    plain = weights(tmp_path / "a", kind=getattr(toy, kind), options=options, micro_batch=2)
    forward = nn.Module.__call__

    def failing(module: nn.Module, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(module, getattr(toy, kind)) and module.training and len(batch.get("row", [])) > 3:
            torch.rand(3)  # what was drawn before memory ran out must not count
            raise torch.OutOfMemoryError("pretended")
        return forward(module, batch, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", failing)
    halved = weights(tmp_path / "b", kind=getattr(toy, kind), options=options)
    assert all(torch.equal(halved[key], value) for key, value in plain.items())
    assert "out of memory: going on with micro-batches of 2" in capsys.readouterr().out


def test_out_of_memory_with_one_clip_is_one_line(tmp_path: Path) -> None:
    class Greedy(toy.Regressor):
        def forward(self, batch: Batch) -> Batch:
            raise torch.OutOfMemoryError("pretended")

    with pytest.raises(InputError, match="with a single clip"):
        toy.train_here(tmp_path, kind=Greedy)


def test_frozen_parts_rest_and_stay_what_they_were(tmp_path: Path) -> None:
    task = toy.build_task(dropout=0.5)
    modes: list[tuple[bool, ...]] = []
    module: Any = task.module
    module.frozen.register_forward_hook(lambda *_: modes.append(tuple(m.training for m in module.frozen.modules())))
    before = {key: value.clone() for key, value in module.frozen.state_dict().items()}
    loop.fit(task, toy.settings(epochs=2), HERE, tmp_path, lambda metrics, step: None)
    assert modes and not any(any(mode) for mode in modes)
    assert module.dropout.training and module.layers.training
    assert all(torch.equal(value, before[key]) for key, value in module.frozen.state_dict().items())


def test_weights_chosen_are_the_averaged_ones_of_the_best_epoch(tmp_path: Path) -> None:
    fitted = toy.train_here(tmp_path, ema_decay=0.95, epochs=4, lr=5e-2)
    errors = [row["val_error"] for row in fitted.history]
    assert fitted.epoch == 1 + errors.index(min(errors)) and fitted.metrics["error"] == min(errors)
    assert fitted.metrics["count"] == toy.NUM_VAL
    module, clips = toy.Regressor(), toy.clips(toy.NUM_VAL, 3)
    module.load_state_dict(fitted.weights)
    batch = stack([clips[0, row] for row in range(toy.NUM_VAL)])
    error = (module.eval()(batch)["y"] - batch["y"]).square().sum().item() / toy.NUM_VAL
    assert error == pytest.approx(min(errors), rel=1e-5)


def test_evaluation_does_not_disturb_training(tmp_path: Path) -> None:
    often = weights(tmp_path / "a", options={"dropout": 0.3}, epochs=4, eval_interval=1)
    seldom = weights(tmp_path / "b", options={"dropout": 0.3}, epochs=4, eval_interval=3)
    assert all(torch.equal(often[key], value) for key, value in seldom.items())


def test_evaluation_begins_where_it_is_wanted(tmp_path: Path) -> None:
    fitted = toy.train_here(tmp_path, epochs=7, eval_from=3, eval_interval=2)
    assert [row["epoch"] for row in fitted.history if "val_error" in row] == [4, 6, 7]


def test_no_epochs_score_and_keep_the_weights_that_are_there(tmp_path: Path) -> None:
    for _ in range(2):  # as after a kill before the bundle was written
        fitted = toy.train_here(tmp_path, epochs=0)
        assert [(row["epoch"], row["step"]) for row in fitted.history] == [(0, 0)]
        assert fitted.metrics["count"] == toy.NUM_VAL and fitted.metrics["error"] == fitted.history[0]["val_error"]
        start = toy.build_task().module.state_dict()
        assert all(torch.equal(value, start[key]) for key, value in fitted.weights.items())


def test_bf16_trains_in_bf16_and_predicts_in_float32(tmp_path: Path) -> None:
    task, kinds = toy.build_task(), set()
    module: Any = task.module
    module.head.register_forward_hook(lambda layer, inputs, output: kinds.add(output.dtype))
    fitted = loop.fit(task, toy.settings(amp=True, epochs=2), HERE, tmp_path, lambda metrics, step: None)
    assert kinds == {torch.bfloat16}
    assert all(value.dtype in (torch.float32, torch.int64) for value in fitted.weights.values())


def test_log_has_losses_rate_norm_and_speed(tmp_path: Path) -> None:
    logged: dict[int, dict[str, float]] = {}
    loop.fit(
        toy.build_task(), toy.settings(epochs=1), HERE, tmp_path, lambda m, step: logged.setdefault(step, {}).update(m)
    )
    assert {"train/loss", "train/loss_square", "train/lr", "train/grad_norm", "train/samples_per_second",
            "train/data_wait_share", "train/peak_memory_gb"} == set(logged[2])  # fmt: skip
    assert {"val/error", "val/count"} == set(logged[5])
    assert 0 <= logged[4]["train/data_wait_share"] <= 1


def test_history_has_means_over_the_epoch(tmp_path: Path) -> None:
    losses: list[float] = []
    task = toy.build_task()
    task.module.register_forward_hook(
        lambda module, inputs, output: losses.append(output["loss"].item()) if module.training else None
    )
    fitted = loop.fit(task, toy.settings(epochs=2), HERE, tmp_path, lambda metrics, step: None)
    assert [row["step"] for row in fitted.history] == [5, 10]
    assert fitted.history[1]["train_loss"] == pytest.approx(sum(losses[5:]) / 5)


# --- what cannot work -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no longer a number at step 7") as error:
        toy.train_here(tmp_path, options={"nan_at": 7})
    assert "\n" not in str(error.value)
    assert all(value.isfinite().all() for value in toy.last_weights(tmp_path).values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 43}, "42 clips, fewer than one batch of 43"),
        ({"epochs": -1}, "epochs is -1"),
        ({"log_interval": 0}, "log_interval is 0"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"schedule_epochs": 2}, r"schedule_epochs is 2; it must be null or at least epochs \(3\)"),
    ],
)
def test_a_dead_start_is_one_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        toy.train_here(tmp_path, **changes)


def test_batches_that_cannot_be_shared_out_or_judged_are_one_line(tmp_path: Path) -> None:
    task = toy.build_task()
    with pytest.raises(InputError, match="make it a multiple"):
        build_run(task, toy.settings(), distributed.Place(torch.device("cpu"), 0, 3), tmp_path, lambda: False)
    empty = TensorClips({"x": torch.empty(0, 8), "y": torch.empty(0, 2)})
    with pytest.raises(InputError, match="val split is empty"):
        loop.fit(Task(task.module, task.train, empty, toy.Error, task.best), toy.settings(), HERE, tmp_path, print)
    with pytest.raises(InputError, match="not among its metrics: error, count"):
        loop.fit(Task(task.module, task.train, task.val, toy.Error, ("map", "max")), toy.settings(), HERE, tmp_path,
                 lambda metrics, step: None)  # fmt: skip
    with pytest.raises(InputError, match="every parameter is frozen"):
        optim.build_optimizer(toy.Regressor().requires_grad_(False), 1e-3, 0.0, 0.9, {})


def test_a_device_that_is_not_there_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="no GPU"), distributed.launched("cuda"):
        pass


@pytest.mark.slow
def test_compiled_training_agrees(tmp_path: Path) -> None:
    assert_close(weights(tmp_path / "a", compile=True, epochs=1), weights(tmp_path / "b", epochs=1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_utilisation_is_told(tmp_path: Path) -> None:
    logged: list[dict[str, float]] = []
    place = distributed.Place(torch.device("cuda"))
    loop.fit(toy.build_task(), toy.settings(amp=True), place, tmp_path, lambda m, step: logged.append(m))
    assert 0 < logged[0]["train/mfu"] < 1 and logged[0]["train/peak_cuda_memory_gb"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_go_to_a_gpu_beside_its_computation() -> None:
    device, sums = torch.device("cuda"), []
    batches = [{"x": torch.full((1 << 20,), float(i)).pin_memory()} for i in range(6)]
    memory.to_device(batches[0], device)["x"].sum()  # what the first use loads would wait
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 31)  # clock ticks: about a second
    for batch in batches:
        there = memory.to_device(batch, device)
        sums.append(there["x"].sum())
        del there  # its memory may be given away only when that sum is there
    memory._copying(device).synchronize()
    assert not torch.cuda.current_stream().query(), "the batches are there while the computation before them goes on"
    assert [value.item() for value in sums] == [i * float(1 << 20) for i in range(6)]


def test_clips_that_are_never_drawn_teach_nothing(tmp_path: Path) -> None:
    """Where only the first eight clips are frequent, the others' targets change nothing."""
    task = toy.build_task()
    frequencies = np.array([1.0] * 8 + [0.0] * (toy.NUM_TRAIN - 8))
    outcomes = []
    for name, value in (("as they are", None), ("spoiled", math.nan)):
        assert isinstance(task.train, TensorClips)
        tensors = {key: tensor.clone() for key, tensor in task.train.tensors.items()}
        if value is not None:
            tensors["y"][8:] = value
        changed = replace(toy.build_task(), train=TensorClips(tensors), frequencies=frequencies)
        loop.fit(changed, toy.settings(epochs=2), HERE, tmp_path / name, lambda metrics, step: None)
        outcomes.append(toy.last_weights(tmp_path / name))
    assert_close(*outcomes)
