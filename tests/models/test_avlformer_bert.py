"""avlformer's BERT against transformers' with the same weights, and the links among features against their formulas."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.avlformer.bert import Bert, Context
from models.avlformer.links import Links
from tests.models.toy_avlformer import CONFIG, VOCAB, build, joint, peer_of

NUM, LENGTH = 7, 5
PRESENT = torch.tensor([[True] * NUM, [True] * 3 + [False] * (NUM - 3)])
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, -1, -1)


def given() -> tuple[Tensor, Tensor, Tensor]:
    """Features of two clips, captions and their places."""
    return (
        torch.randn(2, NUM, CONFIG.hidden_size),
        torch.randint(VOCAB, (2, LENGTH)),
        torch.arange(LENGTH).expand(2, -1),
    )


def hidden(bert: Bert, features: Tensor, ids: Tensor, places: Tensor, links: Tensor | None = None) -> Tensor:
    return bert.write(bert.embed(ids, places), CAUSAL, bert.read(features, PRESENT, links))


# --- BERT ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linked", [False, True])
def test_words_and_features_are_those_of_one_joint_sequence(linked: bool) -> None:
    bert, (features, ids, places) = build(), given()
    links = torch.randn(NUM, NUM) if linked else None
    layers = joint(peer_of(bert), features, ids, places, CAUSAL, PRESENT, links)
    context = bert.read(features, PRESENT, links)
    for layer, offered, before in zip(
        bert.layers, zip(context.keys, context.values, strict=True), layers, strict=False
    ):
        for own, expected in zip(offered, layer.offer(before[:, LENGTH:]), strict=True):
            own, expected = own.transpose(1, 2)[PRESENT], expected.transpose(1, 2)[PRESENT]
            torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
    found = bert.write(bert.embed(ids, places), CAUSAL, context)
    torch.testing.assert_close(found, layers[-1][:, :LENGTH], rtol=1e-5, atol=1e-5)


def test_the_answer_is_that_of_transformers_head() -> None:
    from transformers.models.bert.modeling_bert import BertLMPredictionHead

    bert, peer = build(), peer_of(build())
    head = BertLMPredictionHead(peer.config).eval()
    head.transform.dense.load_state_dict(bert.head.dense.state_dict())
    head.transform.LayerNorm.load_state_dict(bert.head.norm.state_dict())
    head.decoder.load_state_dict(bert.decoder.state_dict())
    x = torch.randn(2, 3, CONFIG.hidden_size)
    torch.testing.assert_close(bert.answer(x), head(x), rtol=1e-5, atol=1e-5)


def test_an_absent_feature_changes_no_word() -> None:
    bert, (features, ids, places) = build(), given()
    changed = features.clone()
    changed[1, 3:] = 1e3
    assert torch.equal(hidden(bert, features, ids, places), hidden(bert, changed, ids, places))


def test_a_clip_without_any_feature_is_read_from_its_words_alone() -> None:
    bert, (features, ids, places) = build(), given()
    words = bert.embed(ids, places)
    none = torch.zeros_like(PRESENT)
    for links in (None, torch.full((NUM, NUM), -10000.0)):
        context = bert.read(features, none, links)
        empty = Context(
            [part[:, :, :0] for part in context.keys], [part[:, :, :0] for part in context.values], none[:, :0]
        )
        found = bert.write(words, CAUSAL, context)
        torch.testing.assert_close(found, bert.write(words, CAUSAL, empty))
        assert all(part.isfinite().all() for part in context.keys)


def test_features_of_a_clip_that_has_none_see_one_another() -> None:
    bert, (features, _, _) = build(), given()
    for links in (None, torch.randn(NUM, NUM)):
        absent = bert.read(features, torch.zeros_like(PRESENT), links)
        present = bert.read(features, torch.ones_like(PRESENT), links)
        for own, expected in zip(absent.keys, present.keys, strict=True):
            torch.testing.assert_close(own, expected)


def test_a_word_that_sees_nothing_sees_itself() -> None:
    bert, (features, ids, places) = build(), given()
    context = bert.read(features, torch.zeros_like(PRESENT), None)
    words, itself = bert.embed(ids, places), torch.eye(LENGTH, dtype=torch.bool).expand(2, -1, -1)
    torch.testing.assert_close(bert.write(words, torch.zeros_like(itself), context), bert.write(words, itself, context))


def test_it_has_as_many_parameters_as_the_published_one() -> None:
    full = dataclasses.replace(CONFIG, hidden_size=768, num_layers=12, num_heads=12, intermediate_size=3072)
    with torch.device("meta"):
        bert = Bert(full, 30522)
    num = {name: sum(p.numel() for p in part.parameters()) for name, part in bert.named_children()}
    feature_layer, pooler = 512 * 768 + 768, 768 * 768 + 768  # upstream counts both among BERT's
    assert sum(num.values()) - num["head"] - num["decoder"] + feature_layer + pooler == 109_876_224
    assert num["head"] + num["decoder"] == 24_063_546


def test_tied_answers_share_the_matrix_of_the_wordpieces() -> None:
    bert = Bert(dataclasses.replace(CONFIG, tie_weights=True), VOCAB)
    assert bert.decoder.weight is bert.words.weight
    assert build().decoder.weight is not build().words.weight


@pytest.mark.parametrize(("width", "spread"), [(768, 0.02), (192, 0.04)])
def test_weights_start_as_berts_do_and_wider_apart_in_a_narrower_one(width: int, spread: float) -> None:
    config = dataclasses.replace(CONFIG, hidden_size=width, num_layers=1, num_heads=4, intermediate_size=2 * width)
    for part in Bert(config, 500).modules():
        if isinstance(part, nn.Embedding):
            assert part.weight.std().item() == pytest.approx(0.02, rel=0.1)
        if isinstance(part, nn.Linear):
            assert part.weight.std().item() == pytest.approx(spread, rel=0.1)
            assert not part.bias.any()
        if isinstance(part, nn.LayerNorm):
            assert part.eps == 1e-12 and part.weight.eq(1).all() and not part.bias.any()


@pytest.mark.parametrize(("drops", "backend"), [(0.0, "aot_eager"), (0.1, "eager")])
def test_a_training_step_compiles_in_one_piece(drops: float, backend: str) -> None:
    config = dataclasses.replace(CONFIG, num_layers=2, dropout=drops)
    bert, links = Bert(config, VOCAB).train(), Links(NUM, legacy=False)
    features, ids, places = given()

    def loss(features: Tensor, ids: Tensor) -> Tensor:
        context = bert.read(features, PRESENT, links.bias(hard=False))
        logits = bert.answer(bert.write(bert.embed(ids, places), CAUSAL, context))
        return functional.cross_entropy(logits.flatten(0, 1), ids.flatten()) + links.openness()

    compiled, grads = torch.compile(loss, backend=backend, fullgraph=True), []
    for step in (loss, compiled):
        torch.manual_seed(1)
        bert.zero_grad()
        links.zero_grad()
        step(features, ids).backward()
        grads.append([p.grad.clone() for p in (*bert.parameters(), *links.parameters()) if p.grad is not None])
        assert all(grad.isfinite().all() for grad in grads[-1])
    for eager, own in zip(*grads, strict=True):
        torch.testing.assert_close(own, eager, rtol=1e-4, atol=1e-6)


def test_every_parameter_but_those_nobody_reads_is_trained() -> None:
    bert, (features, ids, places) = build().train(), given()
    bert.answer(hidden(bert, features, ids, places)).square().sum().backward()
    idle = {name for name, parameter in bert.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    # A softmax does not change by what is the same for all keys.
    assert all(name.endswith("key.bias") for name in idle)


# --- links ---------------------------------------------------------------------------------------------------------------


def test_corrected_links_weigh_attention_by_their_openness() -> None:
    links = Links(NUM, legacy=False)
    nn.init.normal_(links.weight)
    scores, open_ = torch.randn(NUM, NUM), links.weight.sigmoid()
    itself = torch.eye(NUM, dtype=torch.bool)
    weighed = scores.exp() * open_.masked_fill(itself, 1)
    torch.testing.assert_close((scores + links.bias(hard=False)).softmax(1), weighed / weighed.sum(1, keepdim=True))


@pytest.mark.parametrize("level", [-200.0, 0.0, 4.0])
def test_the_loss_reaches_every_corrected_link(level: float) -> None:
    bert, links, (features, ids, places) = build(), Links(NUM, legacy=False), given()
    nn.init.constant_(links.weight, level)
    context = bert.read(features, torch.ones_like(PRESENT), links.bias(hard=False))
    bert.write(bert.embed(ids, places), CAUSAL, context).square().sum().backward()
    grad = links.weight.grad
    assert grad is not None and grad.isfinite().all()
    off_diagonal = ~torch.eye(NUM, dtype=torch.bool)
    assert level == -200 or grad[off_diagonal].ne(0).all()
    assert not grad[~off_diagonal].any()


def test_legacy_links_are_favdbenchs_formula() -> None:
    links = Links(NUM, legacy=True)
    itself = torch.eye(NUM)
    mask = itself + (1 - itself) * links.weight.sigmoid()
    torch.testing.assert_close(links.bias(hard=False), (1 - mask) * -10000.0)
    torch.testing.assert_close(links.bias(hard=True), (1 - (mask >= 0.5).float()) * -10000.0)


def test_hard_links_are_whole_or_closed() -> None:
    links = Links(3, legacy=False)
    with torch.no_grad():
        links.weight.copy_(torch.tensor([[-9.0, 0.0, -0.01], [0.01, -9.0, 5.0], [-5.0, 0.5, 9.0]]))
    share = links.bias(hard=True).softmax(1)
    expected = torch.tensor([[0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3], [0, 0.5, 0.5]])
    torch.testing.assert_close(share, expected)


def test_the_sparse_loss_of_fresh_legacy_links_is_the_published_one() -> None:
    links = Links(1257, legacy=True)
    assert links.openness().item() == pytest.approx(0.4995, abs=1e-3)
    itself = torch.eye(1257)
    assert links.openness().item() == pytest.approx(
        ((1 - itself) * links.weight.sigmoid()).abs().mean().item(), rel=1e-5
    )


def test_fresh_corrected_links_are_open() -> None:
    assert Links(50, legacy=False).bias(hard=False).min() > -0.03
