"""What it costs BERT to write a caption, and to learn from one, at AVLFormer's full size.

    python benchmarks/caption.py [writing] [training] [training_without_dropout]

writing: CPU seconds of a caption of 115 wordpieces from 1,257 features, greedy and with 4 beams, from kept keys and values
against encoding all features and words again for each word, as AVLFormer's decoder does. The peer is measured at 4 of the
114 words, the parabola through them is summed over all; at those it should write the same word (greedy; of beams only the
time is taken, 4 sequences at once as there).

training: a step forward and backward of BERT and its losses for 2 clips, captions of 94 and 100 wordpieces (FAVDBench's
median and mean), a quarter of them asked for, links learned. The peer puts all 300 places of a caption and all
features into one sequence under a dense mask and computes logits of all 300. The most that live tensors came to, weights
not counted, and CPU seconds, in fp32 and under bf16 autocast. Both run once. With dropout PyTorch's CPU kernels keep more of
each layer's attention, in both; the third part tells what is left without.

BERT of 12 layers of 768, 30,522 wordpieces, random weights, float32, one thread. The peer is transformers' BertModel with
the same weights and its default attention.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler looks for a GPU and says that there is none

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertModel

from benchmarks import table
from benchmarks.table import Row, costs
from models.avlformer.bert import Bert
from models.avlformer.config import Decoding, TextConfig
from models.avlformer.links import Links
from models.avlformer.writing import Words, write

TEXT = TextConfig(
    model_name="none", hidden_size=768, num_layers=12, num_heads=12, intermediate_size=3072, max_length=300, dropout=0.1,
    tie_weights=False,
)  # fmt: skip
DECODING = Decoding(
    max_length=115, beams=1, length_penalty=1.0, repetition_penalty=1.0, sample=False, temperature=1.0, top_k=0, top_p=1.0,
    seed=0,
)  # fmt: skip
WORDS = Words(cls=101, sep=102, mask=103, stop=1012, vocab_size=30522)
FEATURES, MEASURED = 1257, (1, 38, 76, 114)  # tokens of video and audio; words at which the peer is measured
CAPTIONS, ASKED = (94, 100), 0.25  # wordpieces; share of them that is asked for
WEIGHTS = {
    "attention.self.query": "query", "attention.self.key": "key", "attention.self.value": "value",
    "attention.output.dense": "proj", "attention.output.LayerNorm": "norm1", "intermediate.dense": "fc1",
    "output.dense": "fc2", "output.LayerNorm": "norm2",
}  # fmt: skip


def build(dropout: float) -> tuple[Bert, BertModel]:
    """Ours and the peer, with one set of weights."""
    torch.manual_seed(0)
    bert = Bert(replace(TEXT, dropout=dropout), WORDS.vocab_size)
    config = BertConfig(layer_norm_eps=1e-12)  # its other sizes are those of TEXT
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    peer = BertModel(config, add_pooling_layer=False)
    own = {"word_embeddings": "words", "position_embeddings": "positions", "token_type_embeddings": "segments"}
    pairs = {f"embeddings.{name}": part for name, part in {**own, "LayerNorm": "norm"}.items()}
    for depth in range(TEXT.num_layers):
        pairs |= {f"encoder.layer.{depth}.{name}": f"layers.{depth}.{part}" for name, part in WEIGHTS.items()}
    for name, part in pairs.items():
        peer.get_submodule(name).load_state_dict(bert.get_submodule(part).state_dict())
    return bert, peer


def joint(peer: BertModel, features: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """Hidden states (B, L + N, D) of [words | features] under a dense mask; `bias` (N, N) is added among features."""
    length, num = ids.shape[1], features.shape[1]
    mask = torch.zeros(length + num, length + num)
    mask[:length, :length] = torch.full((length, length), -10000.0).triu(1)
    mask[length:, :length] = -10000.0
    if bias is not None:
        mask = torch.cat([mask[:length], torch.cat([mask[length:, :length], bias], 1)])
    mask = mask.expand(len(ids), 1, -1, -1)
    x = torch.cat(
        [peer.embeddings(input_ids=ids), functional.dropout(features, peer.config.hidden_dropout_prob, peer.training)],
        1,
    )
    for layer in peer.encoder.layer:
        found = layer(x, mask)
        x = found[0] if isinstance(found, tuple) else found
    return x


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and the result."""
    began = time.process_time()
    result = call()
    return time.process_time() - began, result


# --- writing -----------------------------------------------------------------------------------------------------------


def captioned(bert: Bert, features: Tensor, beams: int) -> Tensor:
    """(1, 115), reading included."""
    decoding = replace(DECODING, beams=beams)
    context = bert.read(features, torch.ones(features.shape[:2], dtype=torch.bool), None)
    return write(bert, context, decoding, WORDS, torch.zeros(1, dtype=torch.int64))[0]


def next_word(bert: Bert, peer: BertModel, features: Tensor, tokens: Tensor) -> int:
    """The likeliest word after `tokens` (B, L), everything encoded again; of the first sequence."""
    ids = torch.cat([tokens, torch.full_like(tokens[:, :1], WORDS.mask)], 1)
    hidden = joint(peer, features.expand(len(tokens), -1, -1), ids)[:, ids.shape[1] - 1]
    return int(bert.answer(hidden)[0].argmax())


@torch.no_grad()
def writing(quick: bool) -> Iterator[Row]:
    """Greedy and 4 beams. [SEP] and what is barred are made so unlikely that all 114 words are written."""
    torch.set_num_threads(1)
    bert, peer = build(TEXT.dropout)
    bert.eval()
    peer.eval()
    bert.decoder.bias[[0, WORDS.cls, WORDS.sep, WORDS.mask, WORDS.stop]] = -1e4
    features = torch.randn(1, 100 if quick else FEATURES, TEXT.hidden_size)
    for beams in (1, 4):
        seconds, tokens = timed(lambda beams=beams: captioned(bert, features, beams))
        given = tokens.expand(beams, -1)
        runs = [timed(lambda n=n, given=given: next_word(bert, peer, features, given[:, :n])) for n in MEASURED]
        parabola = np.polyfit(MEASURED, [run[0] for run in runs], 2)
        total = float(np.polyval(parabola, np.arange(1, DECODING.max_length)).sum())
        same = all(run[1] == tokens[0, n] for n, run in zip(MEASURED, runs, strict=True) if n < MEASURED[-1])
        note = "" if beams > 1 else "the same words" if same else "not the same words"
        title = f"avlformer writes a caption of 115 wordpieces, {'greedy' if beams == 1 else f'{beams} beams'}"
        yield costs(title, "CPU s a caption", seconds, total, "encoding all again for each word", note=note)


# --- training ----------------------------------------------------------------------------------------------------------


def captions(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Wordpieces (2, length), 0 behind each caption's end, its asked places (2, K), and which of those there are."""
    ids, draw = torch.zeros(len(CAPTIONS), length, dtype=torch.int64), torch.Generator().manual_seed(0)
    places = torch.zeros(len(CAPTIONS), round(ASKED * max(CAPTIONS)), dtype=torch.int64)
    asked = torch.zeros_like(places, dtype=torch.bool)
    for row, num in enumerate(CAPTIONS):
        ids[row, :num] = torch.randint(1000, WORDS.vocab_size, (num,), generator=draw)
        some = torch.randperm(num - 1, generator=draw)[: round(ASKED * num)] + 1
        places[row, : len(some)], asked[row, : len(some)] = some, True
    return ids, places, asked


def loss_ours(bert: Bert, links: Links, features: Tensor) -> Tensor:
    """Clean words once, and a [MASK] of its own for each asked place that sees the words before it."""
    ids, places, asked = captions(max(CAPTIONS))
    batch, length = ids.shape
    num = places.shape[1]
    everywhere = torch.arange(length).expand(batch, -1)
    words = bert.embed(
        torch.cat([ids, torch.full_like(places, WORDS.mask)], 1), torch.cat([everywhere, places], 1)
    )  # (B, L + K, D)
    before = torch.cat([everywhere, places - 1], 1)[:, :, None] >= torch.arange(length)  # (B, L + K, L)
    own = torch.cat([torch.zeros(length, num), torch.eye(num)]).bool().expand(batch, -1, -1)
    present = torch.ones(features.shape[:2], dtype=torch.bool)
    hidden = bert.write(words, torch.cat([before, own], 2), bert.read(features, present, links.bias(hard=False)))
    foretold = functional.cross_entropy(bert.answer(hidden[:, : length - 1]).mT, ids[:, 1:], ignore_index=0)
    targets = ids.gather(1, places).where(asked, 0)
    return (
        foretold
        + functional.cross_entropy(bert.answer(hidden[:, length:]).mT, targets, ignore_index=0)
        + links.openness()
    )


def loss_peer(bert: Bert, peer: BertModel, links: Links, features: Tensor) -> Tensor:
    """All places masked or not in one sequence, logits of all of them for both losses."""
    ids, places, asked = captions(TEXT.max_length)
    read = ids.scatter(1, places, torch.where(asked, WORDS.mask, ids[:, :1]))
    hidden = joint(peer, features, read, links.bias(hard=False))
    logits = bert.answer(hidden[:, : TEXT.max_length])  # (B, 300, V)
    foretold = functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], ignore_index=0)
    targets = ids.gather(1, places).where(asked, 0)
    found = logits.gather(1, places[:, :, None].expand(-1, -1, logits.shape[2]))
    return foretold + functional.cross_entropy(found.mT, targets, ignore_index=0) + links.openness()


def peak(call: Callable[[], Any]) -> float:
    """GiB of tensors that lived at once, from those made since the call began."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        call()
    kept: Any = profile.profiler
    events = [event for event in kept.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return float(np.cumsum([event.nbytes() for event in events]).max()) / 2**30


def compare(dropout: float, quick: bool) -> Iterator[Row]:
    """Memory and time of the same runs; peak() costs little time, and both the same."""
    torch.set_num_threads(1)
    bert, peer = build(dropout)
    links, features = Links(FEATURES, legacy=False), torch.randn(2, FEATURES, TEXT.hidden_size, requires_grad=True)
    bert.train()
    peer.train()
    for kind, amp in (("fp32", False), ("bf16", True))[1 if quick else 0 :]:

        def step(loss: Callable[[], Tensor], amp: bool = amp) -> tuple[float, float]:
            for module in (bert, peer, links):
                module.zero_grad()
            features.grad = None

            def whole() -> None:
                with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                    value = loss()
                value.backward()

            return timed(lambda: peak(whole))

        ours = step(lambda: loss_ours(bert, links, features))
        theirs = step(lambda: loss_peer(bert, peer, links, features))
        title = f"avlformer's BERT and losses, 2 clips, dropout {dropout:g}, {kind}"
        against = "transformers' BertModel on one joint sequence"
        yield costs(title, "CPU s a step", ours[0], theirs[0], against, ">= 1")
        yield costs(title, "GiB of tensors", ours[1], theirs[1], against)


def training(quick: bool) -> Iterator[Row]:
    """As the presets train."""
    yield from compare(TEXT.dropout, quick)


def training_without_dropout(quick: bool) -> Iterator[Row]:
    """What is left of it."""
    yield from compare(0.0, quick)


PARTS = {"writing": writing, "training": training, "training_without_dropout": training_without_dropout}

if __name__ == "__main__":
    table.main(__doc__, PARTS)
