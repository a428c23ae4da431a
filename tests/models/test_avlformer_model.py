"""avlformer's losses against attention written out for one clip and one word at a time, and what training and writing share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from models.avlformer import model as avlformer
from models.avlformer.bert import Bert, Layer
from models.avlformer.config import FinetuneConfig
from models.avlformer.explain import explain
from models.avlformer.model import Finetune, questions
from models.family import Batch, Facts, InputError
from tasks.engine import memory

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FACTS = Facts({"wordpiece": [*SPECIAL, ".", *(f"w{i}" for i in range(9))]}, 0.0, 1.0)
MASK = 4
VIDEO, SOUND = 16, 5  # tokens of a clip
# A clip with both, one without sound, one without picture, one whose sound ends early.
HAS_VIDEO, HAS_AUDIO = torch.tensor([True, True, False, True]), torch.tensor([True, False, True, True])
TEXT = torch.tensor([[2, 6, 7, 8, 5, 3, 0], [2, 9, 3, 0, 0, 0, 0], [2, 6, 9, 10, 11, 5, 3], [2, 12, 5, 13, 5, 3, 0]])
ASKED = torch.tensor([[2, 3, 5], [1, 0, 0], [1, 4, 6], [2, 3, 0]])
READ = torch.tensor([[2, 6, 4, 13, 5, 3, 0], [2, 4, 3, 0, 0, 0, 0], [2, 4, 9, 10, 11, 5, 7], [2, 12, 4, 4, 5, 3, 0]])


def config(**changes: Any) -> FinetuneConfig:
    """The tiny one, whose patches of sound are 2 x 2 of 2 x 3; changes of the model and of decoding too."""
    tiny = avlformer.tiny()
    own = replace(tiny.model, audio=replace(tiny.model.audio, patchout_time=1))
    own = replace(own, **{key: changes.pop(key) for key in list(changes) if hasattr(own, key)})
    inside = {key: changes.pop(key) for key in list(changes) if hasattr(tiny.decoding, key)}
    return replace(tiny, **{"model": own, "decoding": replace(tiny.decoding, **inside), "sparse_weight": 0.3} | changes)


def build(seed: int = 0, **changes: Any) -> Finetune:
    """A module none of whose parameters is where it started."""
    torch.manual_seed(seed)
    module = Finetune(config(**changes), FACTS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        if module.links is not None:
            module.links.weight.copy_(torch.randn_like(module.links.weight))
    return module


def clips(num: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    length = torch.tensor([6400, 0, 6400, 1500])
    wave = 0.3 * torch.randn(4, 6400, generator=generator) * (torch.arange(6400) < length[:, None])
    frames = torch.randint(0, 256, (4, 2, 3, 32, 32), generator=generator).byte() * HAS_VIDEO[:, None, None, None, None]
    batch = {
        "frames": frames, "wave": wave, "wave_length": length, "has_video": HAS_VIDEO, "has_audio": HAS_AUDIO,
        "rows": torch.arange(2).expand(4, -1), "columns": torch.tensor([[0, 2], [0, 1], [1, 2], [0, 2]]),
        "text": TEXT, "asked": ASKED, "read": READ, "num_words": (TEXT != 0).sum(1) - 1,
        "num_asked": (ASKED != 0).sum(1), "row": torch.arange(4),
    }  # fmt: skip
    return {key: value[:num] for key, value in batch.items()}


# --- attention written out -----------------------------------------------------------------------------------------------


def tokens_of(module: Finetune, batch: Batch, row: int) -> tuple[Tensor, Tensor]:
    """What there is of a clip, (N, D), and which of all tokens these are, (N,)."""
    found, places = [], []
    if batch["has_video"][row]:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = (batch["frames"][row] / 255 - mean[:, None, None]) / std[:, None, None]
        found.append(module.video_proj(module.video(pixels[None])[0]))
        places += range(VIDEO)
    if batch["has_audio"][row]:
        rows, columns = batch["rows"][row], batch["columns"][row]
        x = module.audio_proj(module.audio(module.spectrum(batch["wave"][row : row + 1]), rows, columns)[0])
        x = x / (x.square().mean(1, keepdim=True).sqrt() + 1e-6)
        frames = -(-int(batch["wave_length"][row]) // 160)
        heard = [0] + [1 + i for i, (_, column) in enumerate(pairs(rows, columns)) if column * 10 < frames]
        kept = range(SOUND) if module.config.model.legacy else heard
        found.append(x[list(kept)])
        places += [VIDEO + place for place in kept]
    return module.features(torch.cat(found)), torch.tensor(places)


def pairs(rows: Tensor, columns: Tensor) -> list[tuple[int, int]]:
    return [(row, column) for row in rows.tolist() for column in columns.tolist()]


def added_to_links(module: Finetune) -> Tensor:
    """(N, N), of the mask A = I + (1 - I) sigmoid(W)."""
    assert module.links is not None
    num = len(module.links.weight)
    open_ = torch.eye(num) + (1 - torch.eye(num)) / (1 + torch.exp(-module.links.weight))
    return (1 - open_) * -10000 if module.config.model.legacy else open_.log()


def written_out(bert: Bert, features: Tensor, added: Tensor, words: list[int]) -> Tensor:
    """(L, V) log-probabilities at each of `words`, which see the features and the words before them."""
    state, num, length = bert.state_dict(), len(features), len(words)
    embedded = state["words.weight"][words] + state["positions.weight"][:length] + state["segments.weight"][0]
    x = torch.cat([features, norm(embedded, bert.norm)])
    mask = torch.full((num + length, num + length), -torch.inf)
    mask[:num, :num] = added
    mask[num:, :num] = 0
    for i in range(length):
        mask[num + i, num : num + i + 1] = 0
    for part in bert.layers:
        layer = cast(Layer, part)
        parts = [nn.functional.linear(x, own.weight, own.bias) for own in (layer.query, layer.key, layer.value)]
        heads = []
        for q, k, v in zip(*(part.chunk(layer.num_heads, 1) for part in parts), strict=True):
            score = q @ k.T / q.shape[1] ** 0.5 + mask
            share = (score - score.max(1, keepdim=True).values).exp()
            heads.append(share / share.sum(1, keepdim=True) @ v)
        x = norm(x + layer.proj(torch.cat(heads, 1)), layer.norm1)
        x = norm(x + layer.fc2(gelu(layer.fc1(x))), layer.norm2)
    logits = bert.decoder(norm(gelu(bert.head.dense(x[num:])), bert.head.norm))
    return logits - logits.exp().sum(1, keepdim=True).log()


def norm(x: Tensor, part: nn.LayerNorm) -> Tensor:
    x = x - x.mean(1, keepdim=True)
    return x / (x.square().mean(1, keepdim=True) + 1e-12).sqrt() * part.weight + part.bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def surprise(log: Tensor, word: int, smoothing: float) -> float:
    return -((1 - smoothing) * log[word] + smoothing * log.mean()).item()


@torch.no_grad()
def expected(module: Finetune, batch: Batch) -> dict[str, float]:
    """The losses, word by word: each asked one alone behind the clean words before it, or as FAVDBench has it."""
    legacy, smoothing = module.config.model.legacy, module.config.label_smoothing
    foretold, named = [], []
    for row in range(len(batch["text"])):
        features, places = tokens_of(module, batch, row)
        added = added_to_links(module)[places][:, places]
        text = [word for word in batch["text"][row].tolist() if word]
        read = batch["read"][row].tolist()[: len(text)] if legacy else text
        logs = written_out(module.bert, features, added, read)
        foretold += [surprise(logs[i], read[i + 1], smoothing) for i in range(len(read) - 1)]
        for place in (place for place in batch["asked"][row].tolist() if place):
            own = logs if legacy else written_out(module.bert, features, added, [*text[:place], MASK])
            named.append(surprise(own[place], text[place], smoothing))
    weights = module.links.weight  # pyright: ignore[reportOptionalMemberAccess]
    openness = sum(weights[i, j].sigmoid().item() for i in range(len(weights)) for j in range(len(weights)) if i != j)
    parts = {"lm": sum(foretold) / len(foretold), "mask": sum(named) / len(named), "sparse": openness / weights.numel()}
    own = module.config
    loss = own.lm_weight * parts["lm"] + (1 - own.lm_weight) * parts["mask"] + own.sparse_weight * parts["sparse"]
    return {"loss": loss} | {f"loss_{name}": value for name, value in parts.items()}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_losses_word_by_word(legacy: bool, smoothing: float) -> None:
    module, batch = build(legacy=legacy, label_smoothing=smoothing, lm_weight=0.3).train(), clips()
    if legacy:
        with torch.no_grad():  # links so open that the closed ones do not hide a mistake: -10000 (1 - A) of about -1
            module.links.weight.add_(9)  # pyright: ignore[reportOptionalMemberAccess]
    losses = module(batch)
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(expected(module, batch), rel=2e-4)


def test_without_links_all_features_see_one_another() -> None:
    module, batch = build(mask="none").train(), clips()
    losses = module(batch)
    assert "loss_sparse" not in losses and module.links is None
    wide = build(mask="learned").train()
    wide.load_state_dict(module.state_dict(), strict=False)
    with torch.no_grad():
        wide.links.weight.fill_(30.0)  # pyright: ignore[reportOptionalMemberAccess]
    torch.testing.assert_close(wide(batch)["loss_lm"], losses["loss_lm"])
    torch.testing.assert_close(wide(batch)["loss_mask"], losses["loss_mask"])


def test_hard_links_are_all_or_nothing_in_evaluation_alone() -> None:
    soft, hard, batch = build().eval(), build(mask="hard").eval(), clips()
    torch.testing.assert_close(soft.train()(batch)["loss"], hard.train()(batch)["loss"])
    assert not torch.allclose(soft.eval().context(batch).keys[-1], hard.eval().context(batch).keys[-1])


# --- who sees whom -------------------------------------------------------------------------------------------------------


def test_a_word_depends_on_those_before_it_alone() -> None:
    module, batch = build().eval(), clips(1) | {"asked": torch.arange(7)[None]}
    with torch.no_grad():
        context = module.context(batch)
        foretold, named = module.logits(batch, context)
        for place in range(1, 6):
            changed = batch | {"text": batch["text"].clone()}
            changed["text"][0, place] = 14
            after, asked = module.logits(changed, context)
            torch.testing.assert_close(after[0, :place], foretold[0, :place], rtol=1e-4, atol=1e-5)
            # The [MASK] in the word's own place does not see that word.
            torch.testing.assert_close(asked[0, : place + 1], named[0, : place + 1], rtol=1e-4, atol=1e-5)
            assert (after[0, place:] - foretold[0, place:]).abs().amax(1).min() > 1e-4
            later = (asked[0, place + 1 : 6] - named[0, place + 1 : 6]).abs().amax(1)
            assert (later > 1e-4).all()


def test_what_one_is_asked_changes_no_other_answer() -> None:
    module, batch = build().eval(), clips(1)
    with torch.no_grad():
        context = module.context(batch)
        foretold, named = module.logits(batch, context)
        for i, place in enumerate(ASKED[0].tolist()):
            alone, own = module.logits(batch | {"asked": torch.tensor([[place]])}, context)
            torch.testing.assert_close(alone, foretold, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own[:, 0], named[:, i], rtol=1e-4, atol=1e-5)


def test_questions_one_by_one() -> None:
    text, asked = torch.tensor([[2, 6, 7, 3, 0]]), torch.tensor([[2, 3, 0]])
    ids, places, visible = questions(text, asked, MASK)
    assert ids.tolist() == [[2, 6, 7, 3, 0, 4, 4, 4]]
    assert places.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0]]
    seen = [row.nonzero()[:, 0].tolist() for row in visible[0]]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 5], [0, 1, 2, 6], [7]]


# --- batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_pieces_of_a_batch_have_its_loss_and_gradient(size: int, legacy: bool) -> None:
    batch = clips()
    batch |= {f"total_{key}": batch[f"num_{key}"].sum().float() for key in ("words", "asked")}
    batch["total_clips"] = torch.tensor(4.0)
    found: list[tuple[float, list[Tensor]]] = []
    for pieces in ([batch], memory.split(batch, size)):
        module, loss = build(legacy=legacy).train(), torch.tensor(0.0)
        for piece in pieces:
            loss = loss + module(piece)["loss"] * len(piece["row"]) / 4
        trained = [p for p in module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, trained, materialize_grads=True)
        found.append((loss.item(), list(gradients)))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    alone = {key: value for key, value in batch.items() if not key.startswith("total_")}
    assert build(legacy=legacy).train()(alone)["loss"].item() == pytest.approx(found[0][0]), "it counts for itself"


def test_a_clip_in_a_batch_is_the_clip_alone() -> None:
    module, batch = build().eval(), clips()
    with torch.no_grad():
        whole = module(batch)
        for row in range(4):
            alone = module({key: value[row : row + 1] for key, value in batch.items()})
            assert alone["tokens"][0].tolist() == whole["tokens"][row].tolist()
            assert alone["confidence"].item() == pytest.approx(whole["confidence"][row].item(), rel=1e-4)


def test_bf16_is_near() -> None:
    module, batch = build().train(), clips()
    exact = module(batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        near = module(batch)["loss"]
    near.backward()
    torch.testing.assert_close(near, exact, rtol=0.03, atol=0.03)
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters() if parameter.grad is not None)


# --- what a clip lacks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("lost", ["video", "audio", "both"])
def test_a_clip_that_lacks_a_modality_can_be_learned(lost: str, legacy: bool) -> None:
    module, batch = build(legacy=legacy).train(), clips(1)
    for kind in ("video", "audio"):
        if lost in (kind, "both"):
            batch[f"has_{kind}"] = torch.tensor([False])
    loss = module(batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        assert gradient is None or gradient.isfinite().all(), name
        if gradient is not None and (
            name.startswith(f"{lost}") or (lost == "both" and name.startswith(("video", "audio")))
        ):
            assert gradient.abs().max() == 0, f"{name} learns of what is not there"
    module.eval()
    seen = explain(module, batch)
    shares = {kind: float(seen[f"{kind}_attention"].sum()) for kind in ("video", "audio")}
    for kind, share in shares.items():
        assert (share == 0) == (lost in (kind, "both"))
    assert module(batch)["confidence"].isfinite().all()


def test_silence_behind_a_short_sound_is_not_listened_to() -> None:
    module = build().eval()
    batch = {key: value[3:] for key, value in clips().items()}
    assert module.context(batch).present[0, VIDEO:].tolist() == [True, True, False, True, False]
    assert explain(module, batch)["audio_attention"][0, :, 1:].eq(0).all()
    assert build(legacy=True).eval().context(batch).present.all(), "FAVDBench listens to it"


# --- writing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_training_and_writing_agree_on_each_word(legacy: bool) -> None:
    module, batch = build(5, legacy=legacy, max_length=12).eval(), clips()
    with torch.no_grad():
        told = module(batch)
        tokens = told["tokens"]
        assert len({int(row.count_nonzero()) for row in tokens}) > 1, "captions of several lengths"
        asked = torch.arange(1, 12).expand(4, -1) * (tokens[:, 1:] > 0)
        _, named = module.logits(batch | {"text": tokens, "asked": asked}, module.context(batch))
        logs = named.log_softmax(-1).gather(2, tokens[:, 1:, None])[:, :, 0] * (tokens[:, 1:] > 0)
    sure = (logs.sum(1) / (tokens[:, 1:] > 0).sum(1)).exp()
    torch.testing.assert_close(told["confidence"], sure, rtol=1e-4, atol=1e-6)


def test_evaluation_gives_the_same_answers_each_time() -> None:
    for legacy in (False, True):
        module, batch = build(legacy=legacy).eval(), clips()
        first, second = module(batch), module(batch)
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert first["has_sound"].tolist() == HAS_AUDIO.tolist()


def test_captions_that_are_explained_are_those_that_were_drawn() -> None:
    module = build(sample=True, temperature=3.0).eval()
    batch = clips() | {"row": torch.tensor([11, 3, 7, 0])}
    told = module(batch)["tokens"][:, 1:]
    assert torch.equal(explain(module, batch)["tokens"], told)
    turned = {key: value.flip(0) for key, value in batch.items()}
    assert torch.equal(explain(module, turned)["tokens"], told.flip(0)), "a clip's draw is its row's"
    other = explain(module, batch | {"row": torch.arange(4)})["tokens"]
    assert not torch.equal(other, told)


# --- parts ---------------------------------------------------------------------------------------------------------------


def test_frozen_parts_learn_nothing() -> None:
    tiny = config().model
    frozen = build(video=replace(tiny.video, freeze=True), audio=replace(tiny.audio, freeze=True)).train()
    frozen(clips())["loss"].backward()
    still = {name.split(".")[0] for name, p in frozen.named_parameters() if p.grad is None and not p.requires_grad}
    assert still == {"video", "audio"}
    assert all(p.grad is not None for p in frozen.audio_proj.parameters())


def test_video_swin_has_a_rate_of_its_own() -> None:
    rules = avlformer.parameter_groups(config(backbone_lr=0.05))
    assert [(prefix, rule.lr) for prefix, rule in rules.items()] == [("video.", 0.05)]
    names = [name for name, _ in build().named_parameters() if name.startswith("video.")]
    assert names and not any(name.startswith("video_proj") for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_prob": 0.0}, "avlformer.finetune.mask_prob is 0.0; it must be above 0 and at most 1"),
        ({"parts": ["noun", "colour"]}, "parts is .*; it must be some of noun, verb"),
        ({"beams": 2, "sample": True}, "decoding.sample is True; it must be false with more than one beam"),
        ({"max_length": 513}, "decoding.max_length is 513; it must be from 3 to 512"),
        ({"lm_weight": 1.5}, "lm_weight is 1.5; it must be from 0 to 1"),
    ],
)
def test_values_out_of_range_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**changes)
