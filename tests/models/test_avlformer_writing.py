"""Captions from kept keys and values against encoding everything again each step, exhaustive search, and chances counted."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from models.avlformer.bert import Bert, Context
from models.avlformer.config import Decoding
from models.avlformer.writing import Cache, Words, spell, write
from tests.models.toy_avlformer import CONFIG, build, joint, peer_of

VOCAB, NUM, CLIPS = 12, 6, 8
WORDS = Words(cls=2, sep=3, mask=4, stop=5, vocab_size=VOCAB)
GREEDY = Decoding(
    max_length=9, beams=1, length_penalty=1.0, repetition_penalty=1.0, sample=False, temperature=1.0, top_k=0, top_p=1.0,
    seed=0,
)  # fmt: skip
ROWS = torch.arange(CLIPS)


def scene(vocab_size: int = VOCAB) -> tuple[Bert, Tensor, Tensor]:
    """A model that ends some captions and not others, features of clips, and which are present; the last clip has none."""
    bert = build(vocab_size=vocab_size)
    with torch.no_grad():
        bert.decoder.weight.mul_(3)
        bert.decoder.bias[WORDS.sep] += 1
    torch.manual_seed(5)
    present = torch.rand(CLIPS, NUM) < 0.7
    present[-1] = False
    return bert, 2 * torch.randn(CLIPS, NUM, CONFIG.hidden_size), present


def changed(**change) -> Decoding:
    return dataclasses.replace(GREEDY, **change)


class Naive:
    """One clip's log-probabilities after any beginning, from transformers' layers over the whole joint sequence."""

    def __init__(self, bert: Bert, features: Tensor, present: Tensor, penalty: float = 1.0, vocab: int = VOCAB) -> None:
        self.bert, self.peer, self.features, self.present = bert, peer_of(bert), features[None], present[None]
        self.penalty, self.known = penalty, {}
        self.allowed = [word for word in range(vocab) if word not in (0, WORDS.cls, WORDS.mask)]

    @torch.no_grad()
    def after(self, tokens: tuple[int, ...]) -> Tensor:
        """(V,), of the word after `tokens`."""
        if tokens not in self.known:
            ids = torch.tensor([[*tokens, WORDS.mask]])
            visible = torch.ones(1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
            places = torch.arange(ids.shape[1])[None]
            states = joint(self.peer, self.features, ids, places, visible, self.present, None)
            logits = self.bert.answer(states[-1][0, ids.shape[1] - 1])
            for word in set(tokens):
                logits[word] = logits[word] / self.penalty if logits[word] > 0 else logits[word] * self.penalty
            self.known[tokens] = logits.log_softmax(-1)
        return self.known[tokens]

    def best(self, tokens: tuple[int, ...]) -> int:
        return max(self.allowed, key=lambda word: self.after(tokens)[word].item())

    def finished(self, tokens: tuple[int, ...], length: int) -> tuple[list[int], float]:
        """A caption without its [SEP] -> its row as `write` has it, and its confidence."""
        if len(tokens) == length - 1 and self.best(tokens) != WORDS.sep and WORDS.stop in tokens:
            tokens = tokens[: len(tokens) - tokens[::-1].index(WORDS.stop)]
        whole = (*tokens, WORDS.sep)
        logs = [self.after(whole[:place])[whole[place]].item() for place in range(1, len(whole))]
        return [*whole] + [0] * (length - len(whole)), math.exp(sum(logs) / len(logs))


def greedy_again(naive: Naive, length: int) -> tuple[int, ...]:
    tokens: tuple[int, ...] = (WORDS.cls,)
    while len(tokens) < length - 1 and (word := naive.best(tokens)) != WORDS.sep:
        tokens = (*tokens, word)
    return tokens


def beams_again(naive: Naive, decoding: Decoding) -> tuple[int, ...]:
    """Beam search from its definition, with lists; it never stops early."""
    beams, ended = [((WORDS.cls,), 0.0)], []
    for length in range(1, decoding.max_length):
        last = length == decoding.max_length - 1
        found = [
            (tokens, word, score + naive.after(tokens)[word].item())
            for tokens, score in beams
            for word in ([WORDS.sep] if last else naive.allowed)
        ]
        found = sorted(found, key=lambda item: -item[2])[: 2 * decoding.beams]
        beams = []
        for tokens, word, score in found:
            if len(beams) == decoding.beams:
                break
            if word == WORDS.sep:
                ended.append((tokens, score / length**decoding.length_penalty))
            else:
                beams.append(((*tokens, word), score))
    return max(ended, key=lambda item: item[1])[0]


def all_captions(words: list[int], length: int) -> Iterator[tuple[int, ...]]:
    for num in range(length - 1):
        for caption in itertools.product(words, repeat=num):
            yield (WORDS.cls, *caption)


# --- exactness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_writing_is_that_of_encoding_everything_again(penalty: float) -> None:
    bert, features, present = scene()
    decoding = changed(repetition_penalty=penalty)
    tokens, confidence = write(bert, bert.read(features, present, None), decoding, WORDS, ROWS)
    assert tokens.dtype == torch.int64 and tokens.shape == (CLIPS, 9)
    ends = set()
    for clip in range(CLIPS):
        naive = Naive(bert, features[clip], present[clip], penalty)
        row, sure = naive.finished(greedy_again(naive, 9), 9)
        assert tokens[clip].tolist() == row
        assert confidence[clip].item() == pytest.approx(sure, abs=1e-4)
        ends.add(row.index(WORDS.sep))
    assert len(ends) > 2


@pytest.mark.parametrize(("beams", "power", "penalty"), [(2, 1.0, 1.0), (3, 0.0, 1.0), (3, 2.0, 1.5), (5, 0.7, 1.0)])
def test_beams_write_what_a_search_that_encodes_everything_again_finds(
    beams: int, power: float, penalty: float
) -> None:
    bert, features, present = scene()
    decoding = changed(beams=beams, length_penalty=power, repetition_penalty=penalty, max_length=6)
    tokens, confidence = write(bert, bert.read(features, present, None), decoding, WORDS, ROWS)
    for clip in range(0, CLIPS, 3):
        naive = Naive(bert, features[clip], present[clip], penalty)
        row, sure = naive.finished(beams_again(naive, decoding), 6)
        assert tokens[clip].tolist() == row
        assert confidence[clip].item() == pytest.approx(sure, abs=1e-4)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_beams_wide_enough_find_the_best_of_all_captions(power: float) -> None:
    bert, features, present = scene()
    words = dataclasses.replace(WORDS, vocab_size=7)  # [UNK], [SEP] and two words can be written
    decoding = changed(beams=27, length_penalty=power, max_length=5)
    tokens, _ = write(bert, bert.read(features[:2], present[:2], None), decoding, words, ROWS[:2])
    for clip in range(2):
        naive = Naive(bert, features[clip], present[clip], vocab=7)

        def score(caption: tuple[int, ...], naive: Naive = naive) -> float:
            return math.log(naive.finished(caption, 99)[1]) * len(caption) ** (1 - power)

        best = max(all_captions([1, 5, 6], 5), key=score)
        assert tokens[clip].tolist() == naive.finished(best, 5)[0]


def test_kept_keys_and_values_are_exact_when_beams_change_places() -> None:
    bert, features, present = scene()
    cache = Cache(bert, bert.read(features, present, None), 3, 6, WORDS.mask)
    paths = torch.full((CLIPS, 3, 1), WORDS.cls)
    for place in range(5):
        with torch.no_grad():
            logs = cache.step(paths[:, :, place], place).log_softmax(-1)
        for clip in (0, 4, CLIPS - 1):
            naive = Naive(bert, features[clip], present[clip])
            for beam in range(3):
                expected = naive.after(tuple(paths[clip, beam].tolist()))
                torch.testing.assert_close(logs[clip, beam], expected, rtol=1e-4, atol=1e-4)
        parent = torch.randint(3, (CLIPS, 3))
        cache.follow(parent)
        paths = torch.cat(
            [paths.gather(1, parent[:, :, None].expand_as(paths)), torch.randint(VOCAB, (CLIPS, 3, 1))], 2
        )


@pytest.mark.parametrize("beams", [1, 3])
def test_a_caption_does_not_depend_on_the_batch(beams: int) -> None:
    bert, features, present = scene()
    decoding = changed(beams=beams)
    together, sure = write(bert, bert.read(features, present, None), decoding, WORDS, ROWS)
    for clip in range(CLIPS):
        one = slice(clip, clip + 1)
        alone, own = write(bert, bert.read(features[one], present[one], None), decoding, WORDS, ROWS[one])
        assert torch.equal(alone[0], together[clip])
        torch.testing.assert_close(own[0], sure[clip])


# --- ends and what is never written --------------------------------------------------------------------------------------


def forced(**bias: float) -> tuple[Bert, Context]:
    """A model that says words by their biases alone, and one clip."""
    bert, features, present = scene()
    with torch.no_grad():
        bert.decoder.weight.zero_()
        bert.decoder.bias.zero_()
        for name, value in bias.items():
            bert.decoder.bias[int(name[1:])] = value
    return bert, bert.read(features[:1], present[:1], None)


@pytest.mark.parametrize("beams", [1, 2])
def test_padding_cls_and_mask_are_never_written(beams: int) -> None:
    bert, context = forced(_0=50, _2=50, _4=50, _11=49, _7=5)
    words = dataclasses.replace(WORDS, vocab_size=11)
    for sample in [False, True] if beams == 1 else [False]:
        tokens, _ = write(bert, context, changed(beams=beams, sample=sample), words, ROWS[:1])
        assert not set(tokens[0, 1:-1].tolist()) & {0, 2, 4, 11}
        assert tokens[0, 0] == WORDS.cls and tokens[0, -1] == WORDS.sep


@pytest.mark.parametrize("beams", [1, 2])
def test_a_caption_that_does_not_end_is_cut_after_its_last_full_stop(beams: int) -> None:
    bert, context = forced(_7=2, _5=1, _8=0, _3=-9)
    decoding = changed(beams=beams, repetition_penalty=8.0)  # 7, then what was not said yet: the full stop
    tokens, confidence = write(bert, context, decoding, WORDS, ROWS[:1])
    row = tokens[0].tolist()
    assert row[:4] == [WORDS.cls, 7, 5, WORDS.sep] and not any(row[4:])
    logits, logs = bert.decoder.bias.clone(), []
    for word in (7, 5, WORDS.sep):
        logs.append(logits.log_softmax(-1)[word].item())
        logits[word] /= 8
    assert confidence.item() == pytest.approx(math.exp(sum(logs) / 3), rel=1e-4)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("stop", [5, -1])
def test_a_caption_without_a_full_stop_ends_at_the_last_place(beams: int, stop: int) -> None:
    bert, context = forced(_7=9, _3=-1)
    words = dataclasses.replace(WORDS, stop=stop)
    tokens, confidence = write(bert, context, changed(beams=beams), words, ROWS[:1])
    assert tokens[0].tolist() == [WORDS.cls, *[7] * 7, WORDS.sep]
    logs = bert.decoder.bias.log_softmax(-1)
    assert confidence.item() == pytest.approx(math.exp((7 * logs[7] + logs[WORDS.sep]).item() / 8), rel=1e-4)


def scripted(*steps: dict[int, float]) -> tuple[Bert, Context, list[int]]:
    """A model that gives words of a step the shares said, others what is left; all alike after the last. It counts steps."""
    bert, features, present = scene()
    calls: list[int] = []

    def answer(hidden: Tensor) -> Tensor:
        shares = steps[len(calls)] if len(calls) < len(steps) else {}
        rest = (1 - sum(shares.values())) / (VOCAB - len(shares))
        calls.append(len(calls))
        logits = torch.full((*hidden.shape[:2], VOCAB), rest).log()
        for word, share in shares.items():
            logits[:, :, word] = math.log(share)
        return logits

    bert.answer = answer
    return bert, bert.read(features, present, None), calls


def written(bert: Bert, context: Context, decoding: Decoding) -> list[int]:
    """The first clip's words up to [SEP]."""
    row = write(bert, context, decoding, WORDS, ROWS)[0][0].tolist()
    return row[1 : row.index(WORDS.sep)]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_caption_that_ends_by_itself_at_the_last_place_is_not_cut(beams: int) -> None:
    bert, context, _ = scripted({7: 0.9}, {5: 0.9}, {8: 0.9}, {WORDS.sep: 0.9})
    assert written(bert, context, changed(beams=beams, max_length=5)) == [7, 5, 8]


@pytest.mark.parametrize("beams", [1, 4])
def test_writing_ends_when_no_caption_can_become_better(beams: int) -> None:
    bert, context, calls = scripted({7: 0.99}, {WORDS.sep: 0.99})
    assert written(bert, context, changed(beams=beams, max_length=10)) == [7]
    assert len(calls) == 2


def test_a_caption_that_a_beam_chose_to_end_is_not_cut() -> None:
    bert, context, _ = scripted({5: 0.99}, {7: 0.99}, {8: 0.55, WORDS.sep: 0.44})
    assert written(bert, context, changed(beams=2)) == [5, 7]


@pytest.mark.parametrize(("beams", "found"), [(2, [7]), (3, [])])
def test_an_end_counts_if_it_stands_before_the_last_beam_that_goes_on(beams: int, found: list[int]) -> None:
    bert, context, _ = scripted({7: 0.4, 8: 0.3, WORDS.sep: 0.2}, {WORDS.sep: 0.09})
    assert written(bert, context, changed(beams=beams)) == found


def test_beams_go_on_while_a_longer_caption_can_still_be_better() -> None:
    bert, context, _ = scripted({WORDS.sep: 0.55, 7: 0.3}, {8: 0.999}, {9: 0.999}, {WORDS.sep: 0.999})
    assert written(bert, context, changed(beams=2)) == [7, 8, 9]


# --- drawing -------------------------------------------------------------------------------------------------------------


def expected_shares(naive: Naive, decoding: Decoding) -> dict[int, float]:
    """Share of each word, from the definitions of temperature, top-k and top-p, with plain lists."""
    logs = naive.after((WORDS.cls,)) / decoding.temperature
    shares = {word: math.exp(logs[word].item()) for word in naive.allowed}
    order = sorted(shares, key=lambda word: -shares[word])[: decoding.top_k or None]
    total, kept, mass = sum(shares[word] for word in order), [], 0.0
    for word in order:
        if mass >= decoding.top_p:
            break
        kept.append(word)
        mass += shares[word] / total
    return {word: shares[word] / sum(shares[other] for other in kept) for word in kept}


@pytest.mark.parametrize(("heat", "top_k", "top_p"), [(1, 0, 1), (2, 0, 1), (0.7, 5, 1), (1.5, 0, 0.7), (2, 6, 0.8)])
def test_words_are_drawn_as_often_as_their_probabilities_say(heat: float, top_k: int, top_p: float) -> None:
    bert, features, present = scene()
    decoding = changed(sample=True, temperature=heat, top_k=top_k, top_p=top_p, max_length=3)
    num = 4000
    context = bert.read(features[:1].expand(num, -1, -1), present[:1].expand(num, -1), None)
    tokens, _ = write(bert, context, decoding, WORDS, torch.arange(num))
    shares = expected_shares(Naive(bert, features[0], present[0]), decoding)
    counts = np.bincount(tokens[:, 1].numpy(), minlength=VOCAB)
    assert set(counts.nonzero()[0]) <= set(shares)
    words = [word for word in shares if num * shares[word] >= 5]
    rare = num - counts[words].sum(), num * (1 - sum(shares[word] for word in words))
    observed, wanted = [*counts[words], rare[0]], [*(num * shares[word] for word in words), rare[1]]
    assert len(words) > 2
    fits = chisquare(np.array(observed)[np.array(wanted) > 1e-6], np.array(wanted)[np.array(wanted) > 1e-6])
    assert fits.pvalue > 0.01


def test_what_is_drawn_depends_on_seed_and_row_alone() -> None:
    bert, features, present = scene()
    decoding = changed(sample=True, temperature=2.0)

    def drawn(clips: list[int], rows: list[int], seed: int = 0) -> list[list[int]]:
        context = bert.read(features[clips], present[clips], None)
        return write(bert, context, dataclasses.replace(decoding, seed=seed), WORDS, torch.tensor(rows))[0].tolist()

    together = drawn([0, 1, 2, 3], [10, 11, 12, 13])
    assert drawn([2, 0], [12, 10]) == [together[2], together[0]]
    assert drawn([3], [13]) == [together[3]]
    again = drawn([0] * 4, [10, 11, 12, 13])
    assert len({tuple(row) for row in again}) > 1
    assert drawn([0, 1, 2, 3], [10, 11, 12, 13], seed=1) != together


def test_the_confidence_of_drawn_words_is_the_models_whatever_the_temperature() -> None:
    bert, features, present = scene()
    decoding = changed(sample=True, temperature=3.0, max_length=6)
    tokens, confidence = write(bert, bert.read(features, present, None), decoding, WORDS, ROWS)
    for clip in range(CLIPS):
        row = tokens[clip].tolist()
        caption = tuple(row[: row.index(WORDS.sep)])
        assert confidence[clip].item() == pytest.approx(
            Naive(bert, features[clip], present[clip]).finished(caption, 99)[1], abs=1e-4
        )


# --- spelling ------------------------------------------------------------------------------------------------------------

NAMES = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "?", "!", "'", "-"),
    *("s", "t", "don", "dog", "##gy", "run", "##ning", "a", "says"),
]


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ("[CLS] a dog ##gy says run ##ning . [SEP] [PAD] [PAD]", "a doggy says running."),
        ("[CLS] a dog ' s run , don ' t run ! [SEP]", "a dog's run, don't run!"),
        ("[CLS] a dog says ' run ' ? [SEP]", "a dog says ' run '?"),
        ("[CLS] a [UNK] dog - run . a . [SEP]", "a dog - run. a."),
        ("[CLS] [SEP]", ""),
    ],
)
def test_wordpieces_become_text(pieces: str, text: str) -> None:
    assert spell([NAMES.index(piece) for piece in pieces.split()], NAMES) == text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.sampled_from(["a", "dog", "doggy", "dog's", "don't", "running"]), min_size=1),
                          st.sampled_from([".", ",", "?", "!"])), min_size=1))  # fmt: skip
def test_what_a_tokenizer_took_apart_is_spelled_as_it_was(sentences: list[tuple[list[str], str]]) -> None:
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab={name: place for place, name in enumerate(NAMES)})
    text = " ".join(" ".join(words) + mark for words, mark in sentences)
    tokens = tokenizer(text)["input_ids"]
    assert NAMES.index("[UNK]") not in tokens
    assert spell(tokens, NAMES) == text
