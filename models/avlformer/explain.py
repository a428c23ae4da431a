"""What each word of a caption was taken from: the attention of its [MASK] to the frames and to the sound."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from models.avlformer.bert import Bert, Context, Layer
from models.avlformer.config import num_video_tokens, sound_grid, video_grid
from models.avlformer.model import Finetune, clip_rows, questions
from models.avlformer.writing import write
from models.family import Batch


@torch.no_grad()
def explain(module: Finetune, batch: Batch) -> Batch:
    """tokens (B, W) that follow [CLS] in the written captions, 0 after [SEP], and from where each was taken.

    video_attention (B, W, T / 2) and audio_attention (B, W, columns of patches) are shares of its attention in [0, 1], the
    mean over layers and heads; what they lack to 1 went to words. Patches that were not read have none.
    """
    model = module.config.model
    context = module.context(batch)
    tokens, _ = write(module.bert, context, module.config.decoding, module.words, clip_rows(batch))
    places = torch.arange(1, tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    ids, at, visible = questions(tokens, places * (tokens[:, 1:] > 0), module.words.mask)
    shares = attention(module.bert, module.bert.embed(ids, at), visible, context)[:, tokens.shape[1] :]
    seen, heard = shares.split([num_video_tokens(model.video), shares.shape[2] - num_video_tokens(model.video)], 2)
    written = (tokens[:, 1:] > 0)[:, :, None]
    video = seen.unflatten(2, (video_grid(model.video)[0], -1)).sum(3)
    columns = batch["columns"]
    by_column = (
        heard[:, :, 1:].unflatten(2, (-1, columns.shape[1])).sum(2)
    )  # (B, W, Kt), without the distillation token
    audio = by_column.new_zeros(*by_column.shape[:2], sound_grid(model.audio)[1])
    audio.scatter_add_(2, columns[:, None].expand_as(by_column), by_column)
    return {"tokens": tokens[:, 1:], "video_attention": video * written, "audio_attention": audio * written}


def attention(bert: Bert, words: Tensor, visible: Tensor, context: Context) -> Tensor:
    """(B, L, N) share of the attention of words (B, L, D) that goes to each feature, the mean over layers and heads."""
    present = context.present[:, None, :].expand(-1, words.shape[1], -1)
    mask = torch.cat([present, visible], 2)[:, None]  # (B, 1, L, N + L)
    x, total = words, torch.zeros(present.shape, device=words.device)
    for part, others, their in zip(bert.layers, context.keys, context.values, strict=True):
        layer = cast(Layer, part)
        key, value = layer.offer(x)
        keys, values = torch.cat([others, key], 2), torch.cat([their, value], 2)
        query = layer.split(layer.query(x))
        scores = (query @ keys.transpose(-2, -1) / query.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        total += scores.softmax(-1).mean(1)[:, :, : total.shape[2]]
        x = layer(x, keys, values, mask)
    return total / len(bert.layers)
