"""videotag's poolings, losses and modules against loops, closed forms and what specifications count."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from models.family import Batch, Facts, InputError
from models.videotag import losses, model, pooling
from models.videotag.config import TaggerConfig
from models.videotag.tsn import Tsn, TsnScores, tiny_tsn

FACTS = Facts({"tag": ["a", "b", "c", "d"]}, -5.0, 4.0, {"tag": [3, 2, 1, 0]}, 5)
POOLINGS = ["peephole", "lstm", "nextvlad", "transformer", "mean"]


def config(pooling: str = "peephole", **changes: Any) -> TaggerConfig:
    """The tiny config with another pooling; changes of the model's values too."""
    tiny = model.tiny_tagger()
    own = {key: changes.pop(key) for key in list(changes) if hasattr(tiny.model, key)}
    values: dict[str, Any] = {"feature_dim": 12, "pooling": pooling}
    return replace(tiny, model=replace(tiny.model, **values | own), **changes)


def batch(num: int = 3, dim: int = 12, most: int = 6) -> Batch:
    """Clips of 1 to 6 frames, the second without sound."""
    generator = torch.Generator().manual_seed(7)
    length = torch.tensor([1, 6, 4, 3][:num])
    times = 0.4 * torch.arange(most).expand(num, -1) * (torch.arange(most) < length[:, None])
    found = {
        "features": torch.randn(num, most, dim, generator=generator), "length": length, "times": times,
        "wave": 0.1 * torch.randn(num, 32000, generator=generator), "has_audio": torch.arange(num) != 1,
        "wave_length": torch.tensor([32000, 0, 18000, 1000][:num]),
        "tags": (torch.rand(num, 4, generator=generator) < 0.5).float(),
    }  # fmt: skip
    found["features"] *= pooling.inside(found["features"], length)[:, :, None]
    return found


def perturbed(module: nn.Module) -> nn.Module:
    """With no parameter or statistic at a value that hides a mistake."""
    torch.manual_seed(3)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "var" in name else 0.3 * torch.randn_like(value))
    return module


# --- poolings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POOLINGS)
def test_a_padded_batch_is_each_clip_alone(kind: str) -> None:
    module, whole = perturbed(model.Tagger(config(kind), FACTS)).eval(), batch()
    whole["features"] = whole["features"] + 9.0 * ~pooling.inside(whole["features"], whole["length"])[:, :, None]
    with torch.no_grad():
        together = module(whole)
        for i in range(3):
            alone = {key: value[i : i + 1] for key, value in whole.items()}
            for key, value in module(alone).items():
                torch.testing.assert_close(value[0], together[key][i])
            num = int(whole["length"][i])
            cut = alone | {"features": alone["features"][:, :num], "times": alone["times"][:, :num]}
            torch.testing.assert_close(module(cut)["logits"][0], together["logits"][i])


@pytest.mark.parametrize("kind", POOLINGS)
def test_bf16_is_near(kind: str) -> None:
    module, given = perturbed(model.Tagger(config(kind, segment_frames=0), FACTS)), batch()
    exact = module(given)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        near = module(given)["loss"]
    near.backward()
    torch.testing.assert_close(near, exact, rtol=0.03, atol=0.03)
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters() if parameter.grad is not None)


def scalar_lstm(module: pooling.PeepholeLSTM, rows: Tensor, way: int) -> Tensor:
    """(T, D) -> (T, H) of one direction, number by number."""
    size, weights = module.size, module.project.weight.chunk(2)[way].tolist()
    recurrent, bias = module.recurrent[way].tolist(), module.bias[way].tolist()
    hidden, cell, out = [0.0] * size, [0.0] * size, []

    def gate(name: int, k: int, row: list[float]) -> float:
        column = name * size + k
        given = sum(w * x for w, x in zip(weights[column], row, strict=True))
        return given + sum(h * recurrent[j][column] for j, h in enumerate(hidden)) + bias[column]

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    for row in rows.tolist():
        new = [[gate(name, k, row) for k in range(size)] for name in range(4)]
        for k in range(size):
            enter = sigmoid(new[1][k] + bias[4 * size + k] * cell[k])
            forget = sigmoid(new[2][k] + bias[5 * size + k] * cell[k])
            cell[k] = forget * cell[k] + enter * math.tanh(new[0][k])
        hidden = [sigmoid(new[3][k] + bias[6 * size + k] * cell[k]) * math.tanh(cell[k]) for k in range(size)]
        out.append(hidden)
    return torch.tensor(out)


@pytest.mark.parametrize("num", [1, 5])
def test_peepholes_number_by_number(num: int) -> None:
    module = cast("pooling.PeepholeLSTM", perturbed(pooling.PeepholeLSTM(3, 2)))
    rows = torch.randn(num, 3, generator=torch.Generator().manual_seed(num))
    with torch.no_grad():
        found = module(nn.functional.pad(rows, (0, 0, 0, 2))[None], torch.tensor([num]))[0, :num]
    torch.testing.assert_close(found[:, :2], scalar_lstm(module, rows, 0))
    torch.testing.assert_close(found[:, 2:], scalar_lstm(module, rows.flip(0), 1).flip(0))


def test_the_fused_lstm_is_pytorchs_over_packed_clips() -> None:
    module = cast("pooling.FusedLSTM", perturbed(pooling.FusedLSTM(3, 2)))
    reference = nn.LSTM(3, 2, batch_first=True, bidirectional=True)
    state = dict(module.ahead.state_dict())
    reference.load_state_dict(state | {f"{name}_reverse": v for name, v in module.back.state_dict().items()})
    x, length = torch.randn(3, 5, 3), torch.tensor([5, 1, 3])
    packed = nn.utils.rnn.pack_padded_sequence(x, length, batch_first=True, enforce_sorted=False)
    wanted, _ = nn.utils.rnn.pad_packed_sequence(reference(packed)[0], batch_first=True)
    found = module(x, length) * pooling.inside(x, length)[:, :, None]
    torch.testing.assert_close(found, wanted)


def test_the_originals_size() -> None:
    big = replace(
        config("peephole", audio=False, feature_dim=2048, embedding_size=1024, lstm_size=512), segment_frames=0
    )
    big = replace(big, model=replace(big.model, hidden=[8192, 4096]))
    with torch.device("meta"):
        module = model.Tagger(big, Facts({"tag": [str(i) for i in range(3396)]}, 0.0, 1.0))
    assert sum(parameter.numel() for parameter in module.parameters()) == 64_266_564


def test_nextvlad_in_loops() -> None:
    """Lin et al. 2018, eq. 3 to 7, one clip, frame, group and cluster at a time, in evaluation."""
    given = config("nextvlad", clusters=3, groups=2, embedding_size=16).model
    module = cast("pooling.NextVlad", perturbed(pooling.NextVlad(given, 4, 3, 2))).eval()
    x, length = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([5, 2])

    def norm(layer: pooling.RowNorm, row: Tensor) -> Tensor:
        return (row - layer.running_mean) / (layer.running_var + 1e-5).sqrt() * layer.weight + layer.bias

    with torch.no_grad():
        for clip in range(2):
            residuals = torch.zeros(3, 4)
            for row in x[clip, : int(length[clip])]:
                wide = module.expand(row)
                assigned = norm(module.assign_norm, module.assign(wide)).view(2, 3)
                for g in range(2):
                    attention = module.attend(wide)[g].sigmoid()
                    for k in range(3):
                        share = assigned[g].softmax(0)[k]
                        residuals[k] += attention * share * (wide[4 * g : 4 * g + 4] - module.centers[k])
            unit = torch.stack([row / row.norm() for row in residuals]).flatten()
            reduced = norm(module.reduce_norm, module.reduce.weight @ norm(module.vlad_norm, unit))
            gate = (module.gate[2](module.gate[0](reduced).relu())).sigmoid()
            torch.testing.assert_close(module(x, length)[clip], reduced * gate)


def test_batch_norm_over_the_rows_that_are_there() -> None:
    ours, theirs = pooling.RowNorm(3), nn.BatchNorm1d(3, momentum=0.1)
    x, there = torch.randn(7, 3), torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool()
    torch.testing.assert_close(ours(x, there)[there], theirs(x[there]))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, 0.9 + 0.1 * x[there].var(0, correction=0))


def test_dropout_as_paddle_has_it() -> None:
    x = torch.ones(400, 50)
    legacy, own = pooling.Dropout(0.3, legacy=True), pooling.Dropout(0.3, legacy=False)
    assert set(legacy(x).unique().tolist()) == {0.0, 1.0} and legacy(x).mean().item() == pytest.approx(0.7, abs=0.02)
    assert own(x).mean().item() == pytest.approx(1.0, abs=0.02)
    torch.testing.assert_close(legacy.eval()(x), 0.7 * x)
    assert torch.equal(own.eval()(x), x)


def test_half_the_states_is_half_the_weights_that_read_them() -> None:
    """Scaling in evaluation is what inverted dropout does with 0.5 times the attention's and the first layer's weights."""
    given = {"audio": False, "dropout": 0.5, "segment_frames": 0}
    legacy = perturbed(model.Tagger(config(legacy_dropout=True, **given), FACTS)).eval()
    own = model.Tagger(config(**given), FACTS).eval()
    state = legacy.state_dict()
    for key in ("branches.frames.attend.score.weight", "hidden.0.weight"):
        state[key] = 0.5 * state[key]
    own.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(own(batch())["logits"], legacy(batch())["logits"])


# --- losses --------------------------------------------------------------------------------------------------------------


def test_losses_of_one_answer_in_closed_form() -> None:
    p = 0.7
    logit = torch.tensor([math.log(p / (1 - p))])
    for tag in (0.0, 1.0, 0.25):
        tags = torch.tensor([tag])
        wanted = -tag * 0.25 * 0.3**2 * math.log(p) - (1 - tag) * 0.75 * p**2 * math.log(0.3)
        assert losses.focal(logit, tags, 0.25, 2.0).item() == pytest.approx(wanted, abs=1e-6)
        wanted = -tag * 0.3**1 * math.log(p) - (1 - tag) * (p - 0.05) ** 4 * math.log(1 - p + 0.05)
        assert losses.asymmetric(logit, tags, 1.0, 4.0, 0.05).item() == pytest.approx(wanted, abs=1e-6)
    easy = torch.tensor([-4.0])
    assert losses.asymmetric(easy, torch.zeros(1), 0.0, 4.0, 0.05).item() == 0, "below the margin"
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logit, torch.ones(1))
    torch.testing.assert_close(losses.asymmetric(logit, torch.ones(1), 0.0, 0.0, 0.0)[0], plain)
    torch.testing.assert_close(losses.focal(logit, torch.ones(1), 0.5, 0.0)[0], 0.5 * plain)


def test_sum_and_mean_of_a_step() -> None:
    """A sum is that over all clips of the step: the engine's means over its pieces give it back."""
    mean, total = (model.Tagger(config(sum_loss=sums, audio=False), FACTS) for sums in (False, True))
    total.load_state_dict(mean.state_dict())
    given = batch(4)
    streams = mean.streams(given)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(
        mean.classify(streams), given["tags"], reduction="none"
    )
    torch.testing.assert_close(mean(given)["loss"], wanted.mean())
    torch.testing.assert_close(total(given)["loss"], wanted.sum())
    given["total_clips"] = torch.tensor(4.0)
    pieces = [{k: v[i : i + 2] if v.ndim else v for k, v in given.items()} for i in (0, 2)]
    torch.testing.assert_close(sum(total(piece)["loss"] for piece in pieces) / 2, wanted.sum())


def test_the_first_answers_are_as_frequent_as_the_tags() -> None:
    module = model.Tagger(config(prior_bias=True), FACTS)
    torch.testing.assert_close(module.output.bias.sigmoid(), torch.tensor([3.5, 2.5, 1.5, 0.5]) / 6)
    with pytest.raises(InputError, match="no count of clips for each tag"):
        model.Tagger(config(prior_bias=True), Facts(FACTS.labels, 0.0, 1.0))


def test_mixed_clips() -> None:
    x = torch.tensor([[1.0, 2.0, 0.0], [5.0, 0.0, 0.0], [7.0, 8.0, 9.0]])[:, :, None]
    found, length = model.mixed(x, torch.tensor([2, 1, 3]), torch.tensor([0.25, 0.5, 1.0]))
    assert length.tolist() == [3, 2, 3]
    assert found[:, :, 0].tolist() == [[0.25 + 5.25, 0.5 + 6, 9], [3, 2, 0], [7, 8, 9]]
    tags = model.blend(torch.eye(3), torch.tensor([0.25, 0.5, 1.0]))
    assert tags.tolist() == [[0.25, 0, 0.75], [0.5, 0.5, 0], [0, 0, 1]]


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("loss", ["bce", "asymmetric"])
def test_a_step_reaches_everything_in_one_graph(kind: str, loss: str) -> None:
    module = model.Tagger(config(kind, loss=loss), FACTS)
    given = batch() | {"mix": torch.tensor([0.3, 0.6, 0.9])}
    module(given)["loss"].backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if loss == "bce":
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(given)["loss"], module(given)["loss"])


# --- sound and segments --------------------------------------------------------------------------------------------------


def test_a_spectrum_a_second() -> None:
    given = batch()
    tagger = model.Tagger(config(), FACTS)
    assert tagger.spectra is not None
    found, length = tagger.spectra(given)
    assert found.shape == (3, 2, 16) and length.tolist() == [2, 0, 2]
    mel = (tagger.spectra.mel(given["wave"]) + 5.0) / 4.0
    torch.testing.assert_close(found[0], torch.stack([mel[0, :100].mean(0), mel[0, 100:].mean(0)]))
    valid = (18000 - 400) // 160 + 1
    torch.testing.assert_close(found[2], torch.stack([mel[2, :100].mean(0), mel[2, 100:valid].mean(0)]))
    assert not found[1].any()


def test_hidden_sound_changes_nothing_but_its_branch() -> None:
    module, given = perturbed(model.Tagger(config(), FACTS)).eval(), batch()
    with torch.no_grad():
        silent = module(given | {"has_audio": torch.zeros(3, dtype=torch.bool)})["logits"]
        other = module(given | {"wave": 1 - given["wave"], "has_audio": torch.zeros(3, dtype=torch.bool)})["logits"]
        heard = module(given)["logits"]
    assert torch.equal(silent, other)
    assert torch.equal(silent[1], heard[1]) and not torch.allclose(silent[0], heard[0])


def test_a_segment_is_a_clip_of_its_own() -> None:
    module, given = perturbed(model.Tagger(config(audio=False, segment_frames=2, topk=3), FACTS)).eval(), batch()
    with torch.no_grad():
        found = module(given)
        part = {"features": given["features"][1:2, 2:4], "length": torch.tensor([2]), "times": given["times"][1:2, 2:4]}
        alone = module(part)["logits"][0].sigmoid().sort(descending=True)
    torch.testing.assert_close(found["segment_scores"][1, 1], alone.values[:3])
    assert torch.equal(found["segment_classes"][1, 1], alone.indices[:3])
    torch.testing.assert_close(found["segment_starts"], torch.tensor([[0, 0, 0], [0, 0.6, 1.4], [0, 0.6, 0]]))
    torch.testing.assert_close(found["segment_ends"], torch.tensor([[0.5, 0, 0], [0.6, 1.4, 2.2], [0.6, 1.4, 0]]))
    assert not found["segment_scores"][0, 1:].any()


def test_segments_hear_their_seconds() -> None:
    x = torch.arange(1.0, 6.0)[None, :, None]
    starts, ends = torch.tensor([[0.0, 1.5, 4.2, 0.0]]), torch.tensor([[1.5, 3.0, 9.0, 0.0]])
    found, num = model.heard(x, torch.tensor([5]), starts, ends)
    assert num.tolist() == [2, 2, 1, 0]
    assert [row[:n, 0].tolist() for row, n in zip(found, num, strict=True)] == [[1, 2], [2, 3], [5], []]


def test_times_that_jump_back() -> None:
    """The original's features of a short clip come round again."""
    times = torch.tensor([[0.0, 0.5, 1.0, 0.0, 0.5]])
    step = model.frame_step(times, torch.tensor([5]))
    torch.testing.assert_close(step, torch.tensor([0.5]))
    starts, ends = model.spans(nn.functional.pad(times, (0, 1)).view(1, 3, 2), torch.tensor([[2, 2, 1]]), step)
    torch.testing.assert_close(starts, torch.tensor([[0.0, 0.0, 0.25]]))
    torch.testing.assert_close(ends, torch.tensor([[0.75, 1.25, 0.75]]))


# --- TSN -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_consensus_is_on_features(loss: Literal["softmax", "bce"]) -> None:
    module = Tsn(replace(tiny_tsn(), loss=loss), FACTS).eval()
    frames = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    tags = torch.tensor([[0, 1.0, 0, 0], [0, 0, 0, 1]])
    with torch.no_grad():
        logits = module({"frames": frames})["logits"]
        features = torch.stack([module.extract(clip).mean(0) for clip in frames])
        torch.testing.assert_close(logits, module.fc(features), rtol=1e-4, atol=1e-5)
        probability = logits.softmax(1) if loss == "softmax" else logits.sigmoid()
        wanted = -probability[[0, 1], [1, 3]].log().mean()
        if loss == "bce":
            wanted = -torch.where(tags > 0, probability, 1 - probability).log().mean()
        torch.testing.assert_close(module.loss(logits, tags)["loss"], wanted)
    bound = module.fc.weight.abs().max().item()
    assert 0.9 * 512**-0.5 < bound <= 512**-0.5


def test_pictures_go_channels_last_through_weights_as_they_are_stored() -> None:
    module, last = Tsn(tiny_tsn(), FACTS).train(), []
    for block in (module.resnet.relu, module.resnet.layer1, module.resnet.layer4):
        block.register_forward_hook(
            lambda _, given, out: last.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    frames = torch.randint(0, 256, (2, 2, 3, 64, 64), dtype=torch.uint8)
    module({"frames": frames, "tags": torch.eye(4)[:2]})["loss"].backward()
    assert last == [True] * 3
    assert all(p.is_contiguous() and p.grad is not None and p.grad.is_contiguous() for p in module.parameters())


def test_scores_of_tsn() -> None:
    rng = np.random.default_rng(0)
    logits, tags = rng.standard_normal((30, 7)).astype(np.float32), (rng.random((30, 7)) < 0.3).astype(np.float32)
    tags[:, 6] = 0
    scores = TsnScores(tiny_tsn(), FACTS)
    for part in (slice(0, 11), slice(11, 30)):
        scores.update({"logits": torch.from_numpy(logits[part])}, {"tags": torch.from_numpy(tags[part])})
    order, found = np.argsort(-logits, 1), scores.compute()
    assert found["top1"] == pytest.approx(np.mean([tags[i, order[i, 0]] for i in range(30)]))
    assert found["top5"] == pytest.approx(np.mean([tags[i, order[i, :5]].any() for i in range(30)]))
    assert found["map"] == pytest.approx(np.mean([average_precision_score(tags[:, c], logits[:, c]) for c in range(6)]))
