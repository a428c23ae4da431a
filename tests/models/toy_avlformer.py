"""A small BERT for avlformer's tests, and transformers' BERT with its weights over one joint sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from models.avlformer.bert import Bert
from models.avlformer.config import TextConfig

CONFIG = TextConfig("none", 32, 3, 4, 64, 20, 0.1, False)
VOCAB = 50
PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "norm2": "output.LayerNorm",
}


def build(config: TextConfig = CONFIG, vocab_size: int = VOCAB, std: float = 0.15) -> Bert:
    """A BERT in evaluation mode whose weights differ from where they start, biases and norms too."""
    torch.manual_seed(3)
    bert = Bert(config, vocab_size).eval()
    for parameter in bert.parameters():
        nn.init.normal_(parameter, std=std)
    for name, parameter in bert.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.normal_(parameter, 1.0, 0.1)
    return bert


def peer_of(bert: Bert) -> BertModel:
    """transformers' BERT with the same weights, attention written out."""
    first = bert.layers[0]
    config = BertConfig(
        vocab_size=bert.words.num_embeddings, hidden_size=first.query.in_features, num_hidden_layers=len(bert.layers),
        num_attention_heads=first.num_heads, intermediate_size=first.fc1.out_features, hidden_act="gelu",
        layer_norm_eps=1e-12, attn_implementation="eager",
    )  # fmt: skip
    peer = BertModel(config, add_pooling_layer=False).eval()
    embeddings = peer.embeddings
    for theirs, own in (
        (embeddings.word_embeddings, bert.words),
        (embeddings.position_embeddings, bert.positions),
        (embeddings.token_type_embeddings, bert.segments),
        (embeddings.LayerNorm, bert.norm),
    ):
        theirs.load_state_dict(own.state_dict())
    for theirs, own in zip(peer.encoder.layer, bert.layers, strict=True):
        for name, path in PARTS.items():
            theirs.get_submodule(path).load_state_dict(getattr(own, name).state_dict())
    return peer


def joint(
    peer: BertModel,
    features: Tensor,
    ids: Tensor,
    places: Tensor,
    visible: Tensor,
    present: Tensor,
    links: Tensor | None,
) -> list[Tensor]:
    """Hidden states (B, L + N, D) before each layer and after the last one, of [words | features] in one sequence.

    Words see words by `visible` (B, L, L) and the features that are present; features see the present ones, plus `links`.
    """
    num, length = features.shape[1], ids.shape[1]
    mask = torch.full((len(ids), 1, length + num, length + num), -torch.inf)
    mask[:, 0, :length, :length].masked_fill_(visible, 0)
    mask[:, 0, :, length:] = torch.where(present[:, None], 0, -torch.inf)
    if links is not None:
        mask[:, 0, length:, length:] += links
    mask = mask.where(mask.isfinite().any(-1, keepdim=True), 0)  # rows that nobody reads
    x = torch.cat([peer.embeddings(input_ids=ids, position_ids=places), features], 1)
    states = [x]
    for layer in peer.encoder.layer:
        found = layer(states[-1], mask)
        states.append(found[0] if isinstance(found, tuple) else found)
    return states
