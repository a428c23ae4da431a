"""Every family is covered because it exists: its params, its tiny config, a step, a round trip, and that it can learn."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import models
from models.family import Facts, Phase
from models.weights import load_matching
from tasks import params
from tasks.engine.loop import Training
from tests.toy_phases import CLIPS, PHASES, batch_of, facts_of


@pytest.fixture(params=PHASES, ids=lambda pair: "-".join(pair))
def case(request: pytest.FixtureRequest) -> tuple[str, str, Phase]:
    family, name = request.param
    return family, name, models.load(family).phases[name]


@pytest.fixture
def facts(case: tuple[str, str, Phase]) -> Facts:
    return facts_of(case[0])


def test_its_section_of_params_is_valid(case: tuple[str, str, Phase]) -> None:
    params.phase(case[0], case[1], Training)


def test_the_final_phase_answers_people(case: tuple[str, str, Phase]) -> None:
    family = models.load(case[0])
    assert family.phases[family.final].present is not None
    assert not case[2].teacher or list(family.phases).index(case[2].teacher) < list(family.phases).index(case[1])


def test_config_has_no_defaults(case: tuple[str, str, Phase]) -> None:
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(case[2].Config))


def test_no_parameter_is_a_single_number_which_fsdp_could_not_shard(case: tuple[str, str, Phase], facts: Facts) -> None:
    assert all(parameter.ndim for parameter in case[2].build(case[2].tiny, facts).parameters())


def test_forward_and_backward_are_finite_and_reach_what_trains(case: tuple[str, str, Phase], facts: Facts) -> None:
    phase = case[2]
    module = phase.build(phase.tiny, facts).train()
    losses = module(batch_of(case[0], phase, facts, training=True, silent=1))
    assert all(torch.isfinite(value).all() for value in losses.values())
    losses["loss"].backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


def test_evaluation_gives_one_prediction_a_clip(case: tuple[str, str, Phase], facts: Facts) -> None:
    phase = case[2]
    module = phase.build(phase.tiny, facts).eval()
    batch = batch_of(case[0], phase, facts, training=False, silent=1)
    with torch.no_grad():
        predictions = module(batch)
    assert all(len(value) == CLIPS for value in predictions.values())
    metric = phase.metrics(phase.tiny, facts)
    metric.update(predictions, batch)
    assert phase.best[0] in metric.compute()
    if phase.present is not None:
        merged = phase.merge(phase.tiny, predictions) if phase.merge else predictions
        assert len(phase.present(merged, facts)) == CLIPS


def test_what_it_shows_are_maps_from_0_to_1(case: tuple[str, str, Phase], facts: Facts) -> None:
    phase = case[2]
    if phase.explain is None:
        pytest.skip("it shows nothing")
    found = phase.explain(
        phase.build(phase.tiny, facts).eval(), batch_of(case[0], phase, facts, training=False, silent=1)
    )
    assert all(len(value) == CLIPS for value in found.values())
    if "video_attention" in found:
        seen, heard = found["video_attention"].sum(2), found["audio_attention"].sum(2)
        assert (seen > 0).any() and (heard > 0).any() and (seen + heard <= 1 + 1e-6).all()
        assert (heard[1] == 0).all(), "nothing to listen to"
        return
    assert (found["video_relevance"].ndim, found["audio_relevance"].ndim) == (4, 3)
    for key, value in found.items():
        assert (value >= 0).all() and (value <= 1 + 1e-6).all(), key
    assert (found["audio_relevance"][1] == 0).all(), "nothing to listen to"
    assert (found["video_relevance"].flatten(1).amax(1) == 1).all()


def test_evaluation_does_not_depend_on_the_neighbours_in_the_batch(case: tuple[str, str, Phase], facts: Facts) -> None:
    phase = case[2]
    module = phase.build(phase.tiny, facts).eval()
    batch = batch_of(case[0], phase, facts, training=False)
    with torch.no_grad():
        whole = module(batch)
        alone = module({key: value[:1] for key, value in batch.items()})
    for key, value in alone.items():
        torch.testing.assert_close(value[0], whole[key][0], rtol=1e-4, atol=1e-5)


def test_weights_survive_a_round_trip(case: tuple[str, str, Phase], facts: Facts) -> None:
    phase = case[2]
    torch.manual_seed(0)
    first = phase.build(phase.tiny, facts).eval()
    torch.manual_seed(1)
    second = phase.build(phase.tiny, facts).eval()
    report = load_matching(second, first.state_dict())
    assert not report.fresh
    assert not report.dropped
    batch = batch_of(case[0], phase, facts, training=False)
    with torch.no_grad():
        for key, value in first(batch).items():
            torch.testing.assert_close(second(batch)[key], value)


def test_it_starts_from_the_phase_before(case: tuple[str, str, Phase], facts: Facts) -> None:
    family, name, phase = case
    phases = list(models.load(family).phases)
    before = phases.index(name) - 1
    if before < 0 or phase.teacher or phase.clip(phase.tiny).features:
        pytest.skip("the first phase, a student and what learns from features start from nothing")
    earlier = models.load(family).phases[phases[before]]
    report = load_matching(phase.build(phase.tiny, facts), earlier.build(earlier.tiny, facts).state_dict(), phase.fresh)
    assert report.loaded
    assert all(key.startswith(phase.fresh) for key in report.fresh)


def test_it_learns_a_batch_by_heart(case: tuple[str, str, Phase], facts: Facts) -> None:
    phase = case[2]
    torch.manual_seed(0)
    module = phase.build(phase.tiny, facts).train()
    batch = batch_of(case[0], phase, facts, training=True)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(60):
        loss = module(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_step_has_no_graph_break(case: tuple[str, str, Phase], facts: Facts) -> None:
    phase = case[2]
    module = phase.build(phase.tiny, facts).train()
    batch = batch_of(case[0], phase, facts, training=True)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch)["loss"], module(batch)["loss"])
