"""How captions are written: word by word from keys and values that are kept, and from wordpieces back to text.

A step feeds the last word and a [MASK] in the place after it, and the word is what the [MASK] answers. The [MASK]'s own keys
and values are written over by the word that takes its place, so each step is exact and costs two tokens a beam.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from models.avlformer.bert import Bert, Context, Layer
from models.avlformer.config import Decoding

PAD = 0
LOOK = 8  # steps on an accelerator between two looks at whether all captions are done: a look waits for the device
SPECIAL = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
CONTRACTION = re.compile(r"(?<=\w) ' (?=(?:s|t|m|d|ll|re|ve)\b)")


@dataclass(frozen=True)
class Words:
    """Wordpieces that mean something to who writes, by id; 0 is [PAD]."""

    cls: int
    sep: int
    mask: int
    stop: int  # the full stop, -1 = the vocabulary has none
    vocab_size: int


class Cache:
    """Keys and values of the features and of what each beam wrote, place after place, beam after beam within a place.

    When beams change places nothing is moved: `tree` (B, beams, length, beams) says in which beam's column lies the word
    that a beam has in a place.
    """

    def __init__(self, bert: Bert, context: Context, beams: int, length: int, mask: int) -> None:
        batch, self.num = context.present.shape
        self.bert, self.present, self.mask = bert, context.present, mask
        self.keys = [self.room(part, beams * length) for part in context.keys]
        self.values = [self.room(part, beams * length) for part in context.values]
        self.own = torch.eye(beams, dtype=torch.bool, device=self.present.device).expand(batch, -1, -1)
        self.tree = self.own[:, :, None].repeat(1, 1, length, 1)

    def room(self, features: Tensor, num: int) -> Tensor:
        """(B, heads, N, D / heads) -> (B, heads, N + num, D / heads)."""
        return torch.cat([features, features.new_zeros(*features.shape[:2], num, features.shape[3])], 2)

    def visible(self, place: int) -> Tensor:
        """(B, 1, 2 beams, N + (place + 2) beams) bool, of the last words and then of the [MASK]s."""
        features = self.present[:, None].expand(-1, self.own.shape[1], -1)
        before = torch.cat([features, self.tree[:, :, : place + 1].flatten(2)], 2)
        last = torch.cat([before, torch.zeros_like(self.own)], 2)
        return torch.cat([last, torch.cat([before, self.own], 2)], 1)[:, None]

    def step(self, last: Tensor, place: int) -> Tensor:
        """The words (B, beams) at `place`, known from now on -> logits (B, beams, V) float32 of those after them."""
        self.tree[:, :, place] = self.own
        beams = last.shape[1]
        ids = torch.cat([last, torch.full_like(last, self.mask)], 1)
        places = torch.cat([torch.full_like(last, place), torch.full_like(last, place + 1)], 1)
        x, mask = self.bert.embed(ids, places), self.visible(place)
        start, end = self.num + place * beams, self.num + (place + 2) * beams
        for part, keys, values in zip(self.bert.layers, self.keys, self.values, strict=True):
            layer = cast(Layer, part)
            keys[:, :, start:end], values[:, :, start:end] = layer.offer(x)
            x = layer(x, keys[:, :, :end], values[:, :, :end], mask)
        return self.bert.answer(x[:, beams:]).float()

    def follow(self, parent: Tensor) -> None:
        """Beam b goes on from what beam parent[:, b] (B, beams) wrote."""
        self.tree = self.tree.gather(1, parent[:, :, None, None].expand_as(self.tree))


@dataclass
class Draft:
    """What is written so far, beam by beam: (B, beams, length) each."""

    tokens: Tensor  # int64, [PAD] where nothing is yet
    said: Tensor  # log-probability of each
    ends: Tensor  # log-probability of [SEP] in each place

    @staticmethod
    def start(batch: int, beams: int, length: int, words: Words, device: torch.device) -> Draft:
        """[CLS] alone."""
        empty = torch.zeros(batch, beams, length, device=device)
        tokens = empty.long()
        tokens[:, :, 0] = words.cls
        return Draft(tokens, empty.clone(), empty.clone())

    def take(self, parent: Tensor) -> Draft:
        """Beams parent (B, K) -> K beams."""
        index = parent[:, :, None].expand(-1, -1, self.tokens.shape[2])
        return Draft(*(part.gather(1, index) for part in (self.tokens, self.said, self.ends)))

    def where(self, chosen: Tensor, other: Draft) -> Draft:
        """This one's clips where `chosen` (B,), the other's elsewhere."""
        pairs = ((self.tokens, other.tokens), (self.said, other.said), (self.ends, other.ends))
        return Draft(*(mine.where(chosen[:, None, None], their) for mine, their in pairs))


def penalised(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Logits (B, beams, V) of words among `tokens` (B, beams, length) divided by `penalty`, or times it below 0.

    Keskar et al. 2019, and as `transformers` has it for negative logits.
    """
    if penalty == 1:
        return logits
    said = torch.zeros_like(logits, dtype=torch.bool).scatter_(2, tokens, True)
    said[:, :, PAD] = False
    return torch.where(said, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def barred(words: Words, num: int, device: torch.device) -> Tensor:
    """(V,) minus infinity for what is never written, 0 for the rest."""
    bar = torch.zeros(num)
    bar[[PAD, words.cls, words.mask]] = -torch.inf
    bar[words.vocab_size :] = -torch.inf
    return bar.to(device)


def chances(rows: Tensor, decoding: Decoding) -> Tensor:
    """(B, max_length) float32 in [0, 1): each clip's own numbers, from the seed and its row alone."""
    drawn = [
        np.random.default_rng((decoding.seed, row)).random(decoding.max_length, np.float32) for row in rows.tolist()
    ]
    return torch.from_numpy(np.stack(drawn))


def draw(logits: Tensor, chance: Tensor, decoding: Decoding) -> Tensor:
    """Words (B, 1) of logits (B, 1, V) at temperature, among the top_k likeliest and of those the top_p: chance (B,) picks.

    The likeliest stands first, and the picked one is where the running sum of probabilities first exceeds the chance.
    """
    likely, order = (logits / decoding.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if decoding.top_k:
        likely = likely[:, :, : decoding.top_k]
        likely = likely / likely.sum(-1, keepdim=True)
    before = likely.cumsum(-1) - likely
    likely = likely.where((before < decoding.top_p) & (likely > 0), 0)
    total = likely.cumsum(-1)
    place = torch.searchsorted(total, total[:, :, -1:] * chance[:, None, None], right=True)
    last = (likely > 0).sum(-1, keepdim=True) - 1  # where the sum's rounding lets the chance exceed it
    return order.gather(2, place.minimum(last))[:, :, 0]


def finish(draft: Draft, end: Tensor, cut: Tensor, words: Words) -> tuple[Tensor, Tensor]:
    """Tokens (B, length) with [SEP] at `end` (B,), and the confidence (B,); a caption that is `cut` ends a sentence.

    The confidence is exp of the mean log-probability of the words and of [SEP] after them.
    """
    tokens, said, ends = draft.tokens[:, 0], draft.said[:, 0], draft.ends[:, 0]
    place = torch.arange(tokens.shape[1], device=tokens.device)
    last_stop = ((tokens == words.stop) & (place > 0) & (place < end[:, None])).long().mul(place).amax(1)
    end = torch.where(cut & (last_stop > 0), last_stop + 1, end)[:, None]
    tokens = torch.where(place < end, tokens, torch.where(place == end, words.sep, PAD))
    total = said.where((place > 0) & (place < end), 0).sum(1) + ends.gather(1, end)[:, 0]
    return tokens, (total / end[:, 0]).exp()


def all_done(done: Tensor, place: int) -> bool:
    """Whether nothing is left to write, as far as was looked."""
    return (done.device.type == "cpu" or place % LOOK == 0) and bool(done.all())


def one_by_one(cache: Cache, decoding: Decoding, words: Words, chance: Tensor | None) -> tuple[Draft, Tensor, Tensor]:
    """The likeliest word each time, or one drawn by `chance` (B, length): the draft, its ends (B,), which are cut (B,)."""
    batch, length, device = len(cache.present), decoding.max_length, cache.present.device
    bar = barred(words, cache.bert.decoder.out_features, device)
    draft = Draft.start(batch, 1, length, words, device)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    end = torch.full((batch,), length - 1, device=device)
    for place in range(1, length):
        logits = cache.step(draft.tokens[:, :, place - 1], place - 1)
        logits = penalised(logits, draft.tokens, decoding.repetition_penalty)
        logp = logits.log_softmax(-1)
        word = (logits + bar).argmax(-1) if chance is None else draw(logits + bar, chance[:, place], decoding)
        draft.tokens[:, :, place] = word
        draft.said[:, :, place] = logp.gather(2, word[:, :, None])[:, :, 0]
        draft.ends[:, :, place] = logp[:, :, words.sep]
        ended = (word == words.sep)[:, 0] & ~done
        end = torch.where(ended, place, end)
        done = done | ended
        if all_done(done, place):
            break
    return draft, end, ~done


@dataclass
class Best:
    """The best caption of each clip that ended."""

    draft: Draft  # one beam
    score: Tensor  # (B,)
    end: Tensor  # (B,) where its [SEP] stands
    cut: Tensor  # (B,) bool: it had to end there

    def offer(self, draft: Draft, score: Tensor, parent: Tensor, forced: Tensor, place: int) -> None:
        """Beams parent (B, K) of `draft` end at `place` and have `score` (B, K), minus infinity for one that goes on."""
        found, which = score.max(1, keepdim=True)
        parent, better = parent.gather(1, which), found[:, 0] > self.score
        self.draft = draft.take(parent).where(better, self.draft)
        self.score = torch.where(better, found[:, 0], self.score)
        self.end = torch.where(better, place, self.end)
        self.cut = torch.where(better, forced.gather(1, parent)[:, 0], self.cut)


def by_beams(cache: Cache, decoding: Decoding, words: Words) -> tuple[Draft, Tensor, Tensor]:
    """The best ended caption that a beam search finds: its draft, end (B,), and whether it had to end there (B,) bool.

    A caption's score is its log-probability, [SEP] included, divided by length ** length_penalty, [SEP] counted. Each step
    looks at the 2 · beams best words of all beams; a clip is done when no beam can become better any more than its best:
    log-probabilities only fall.
    """
    batch, beams, length, device = len(cache.present), decoding.beams, decoding.max_length, cache.present.device
    num, power = cache.bert.decoder.out_features, decoding.length_penalty
    bar = barred(words, num, device)
    only_end = torch.full_like(bar, -torch.inf)
    only_end[words.sep] = 0.0
    draft, score = Draft.start(batch, beams, length, words, device), torch.zeros(batch, beams, device=device)
    score[:, 1:] = -torch.inf  # all beams begin with [CLS]: one of them is enough
    none = torch.full((batch,), -torch.inf, device=device)
    best = Best(
        draft.take(torch.zeros(batch, 1, dtype=torch.long, device=device)),
        none,
        torch.full_like(none, length - 1).long(),
        none > 0,
    )
    for place in range(1, length):
        last = place == length - 1
        logits = penalised(
            cache.step(draft.tokens[:, :, place - 1], place - 1), draft.tokens, decoding.repetition_penalty
        )
        logp = logits.log_softmax(-1)
        draft.ends[:, :, place] = logp[:, :, words.sep]
        top, index = (score[:, :, None] + logp + (only_end if last else bar)).flatten(1).topk(2 * beams)
        parent, word = index // num, index % num
        # A beam ends but once, so at least `beams` go on. An end counts that stands before the last of those.
        ended = word == words.sep
        counts = ended & ((~ended).cumsum(1) < beams)
        forced = ((logp + bar).argmax(-1) != words.sep) & last
        best.offer(draft, (top / place**power).where(counts, -torch.inf), parent, forced, place)
        going = ended.int().argsort(dim=1, stable=True)[:, :beams]
        parent, score = parent.gather(1, going), top.gather(1, going)
        draft = draft.take(parent)
        draft.tokens[:, :, place] = word.gather(1, going)
        draft.said[:, :, place] = logp.flatten(1).gather(1, index.gather(1, going))
        cache.follow(parent)
        possible = torch.maximum(score[:, 0] / (place + 1) ** power, score[:, 0] / (length - 1) ** power)
        if all_done(best.score >= possible, place):
            break
    return best.draft, best.end, best.cut


@torch.no_grad()
def write(bert: Bert, context: Context, decoding: Decoding, words: Words, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Captions of a batch: tokens (B, max_length) int64, [CLS] ... [SEP] and then 0, and each one's confidence (B,) in (0, 1].

    `bert` is in evaluation mode, `context` what it read; `rows` (B,) int64 numbers the clips for drawing, which depends on
    nothing else of the batch. Confidence is exp(mean log-probability of what was written, [SEP] included), by the model after
    the repetition penalty, whatever the temperature. A caption that would not end by max_length ends after its last full
    stop, or there where it has none. [PAD], [CLS] and [MASK] are never written.
    """
    cache = Cache(bert, context, decoding.beams, decoding.max_length, words.mask)
    if decoding.beams > 1:
        return finish(*by_beams(cache, decoding, words), words)
    chance = chances(rows, decoding).to(context.present.device) if decoding.sample else None
    return finish(*one_by_one(cache, decoding, words, chance), words)


def spell(tokens: Sequence[int], names: Sequence[str]) -> str:
    """A caption's text: wordpieces by their `names`, special ones dropped, parts of a word and punctuation joined."""
    parts = [names[token] for token in tokens]
    text = " ".join(part for part in parts if part not in SPECIAL).replace(" ##", "")
    return CONTRACTION.sub("'", re.sub(r" (?=[.?!,](?:\s|$))", "", text))
