"""Where wildlife looks and listens: attention rollout through encoder and fusion, and whether that can be believed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from models.family import Batch
from models.rollout import mixing, own_places, ranks, rollout
from models.wildlife.config import HEADS, sound_grid, video_grid
from models.wildlife.fusion import MODALITIES, Bottleneck, Streams, mean_present
from models.wildlife.model import Finetune

STEPS = 8  # of a deletion curve
CELL = 32  # pixels of the sound's picture that a place of the ResNet's map stands for


@torch.no_grad()
def explain(module: Finetune, batch: Batch) -> Batch:
    """Two maps a clip, each from 0 at its least to 1 at its most relevant place, and two curves.

    video_relevance (B, T', h, w) by the video tokens' grid, audio_relevance (B, mel, columns) of the sound's picture; all
    zero for a modality that the clip lacks, and where every place is as relevant as the others. The curves, (B, STEPS + 1)
    each, are what `deletion` gives.
    """
    shares = relevance(module, batch)
    model = module.config.model
    video = shares["video"].unflatten(1, video_grid(model.video_encoder))
    pitches, columns = module.audio_encoder.picture(batch).shape[-2:]
    cells = shares["audio"].unflatten(1, sound_grid(model.audio_encoder))[:, None]
    audio = functional.interpolate(cells, scale_factor=CELL, mode="bilinear")[:, 0, :pitches, :columns]
    maps = {"video_relevance": relative(video), "audio_relevance": relative(audio)}
    return maps | deletion(module, batch, shares)


def relative(maps: Tensor) -> Tensor:
    """(B, ...) with each clip's least value made 0 and its greatest 1; a flat map, which tells nothing, is 0 everywhere."""
    flat = maps.flatten(1)
    least, greatest = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    told = greatest - least > 1e-5 * greatest
    return ((flat - least) / (greatest - least).where(told, 1) * told).view_as(maps)


# --- rollout -------------------------------------------------------------------------------------------------------------


def relevance(module: Finetune, batch: Batch) -> Streams:
    """(B, N) a modality: how much of what the heads read comes from each place of its encoder's input.

    The sound's places are those of the ResNet's last map, which has no attention of its own. Pooled fusions read the mean
    token: with them every place of that map has the same share.
    """
    encoded = module.encode(batch)
    present = {m: batch[f"has_{m}"] for m in MODALITIES}
    model, count, device = module.config.model, len(batch["frames"]), batch["frames"].device
    sizes = {
        "video": torch.Size(video_grid(model.video_encoder)).numel(),
        "audio": torch.Size(sound_grid(model.audio_encoder)).numel(),
    }
    if isinstance(module.fusion, Bottleneck):
        tokens = {m: encoded[f"{m}_tokens"] for m in MODALITIES}
        num = model.num_bottlenecks if module.fusion.bottlenecks is not None else 0
        z = bottleneck_rollout(module.fusion.attentions(tokens, present), sizes, num, present)
        whole = mean_present({m: z[m].mean(1) for m in MODALITIES}, present)
        read = {"video": whole[:, : sizes["video"]], "audio": whole[:, sizes["video"] :][:, : sizes["audio"]]}
    else:
        read = {m: torch.full((count, sizes[m]), 1 / sizes[m], device=device) for m in MODALITIES}
        read = {m: share * present[m][:, None] for m, share in read.items()}
    start = own_places(count, sizes["video"], device)
    seen = rollout(module.video_encoder.attentions(batch["frames"]), start)
    return {"video": (read["video"][:, None] @ seen)[:, 0], "audio": read["audio"]}


def bottleneck_rollout(layers: Iterable[Streams], sizes: dict[str, int], num: int, present: Streams) -> Streams:
    """(B, N, P) a modality: what its tokens are made of after the fusion's layers.

    The P places are all video tokens, all audio tokens, and the `num` bottlenecks as they were learned, which belong to no
    input. Rows add up to 1, and nothing comes from the other modality but by way of the bottlenecks.
    """
    count, places = len(present["video"]), sizes["video"] + sizes["audio"] + num
    start = own_places(count, places, present["video"].device).split([sizes["video"], sizes["audio"], num], 1)
    z: Streams = {m: start[i] for i, m in enumerate(MODALITIES)}
    b = start[2]
    for weights in layers:
        matrices = {m: mixing(weights[m]) for m in MODALITIES}
        if matrices["video"].shape[-1] == sizes["video"]:
            z = {m: matrices[m] @ z[m] for m in MODALITIES}
            continue
        mixed = {m: matrices[m] @ torch.cat([z[m], b], 1) for m in MODALITIES}
        z = {m: mixed[m][:, : sizes[m]] for m in MODALITIES}
        b = mean_present({m: mixed[m][:, sizes[m] :] for m in MODALITIES}, present)
    return z


# --- is it so? -----------------------------------------------------------------------------------------------------------


def deletion(module: Finetune, batch: Batch, shares: Streams) -> Batch:
    """Probability of the predicted classes, mean over the heads, as more and more places are hidden: (B, STEPS + 1) each.

    Step s hides s / STEPS of the places of both modalities: for `deletion` the most relevant first, for `deletion_random`
    in an order drawn from the clip's `row`. What is hidden becomes the average picture and the average sound. Where
    relevance means something, the first curve falls faster (RISE, Petsiuk et al. 2018).
    """
    pixels, picture = module.video_encoder.pixels(batch["frames"]), module.audio_encoder.picture(batch)
    whole = module(module.read(pixels, picture) | batch)
    classes = {head: whole[f"{head}_logits"].argmax(-1, keepdim=True) for head in HEADS}

    def sure(answer: Batch) -> Tensor:
        found = [answer[f"{head}_logits"].float().softmax(-1).gather(1, classes[head]) for head in HEADS]
        return torch.cat(found, 1).mean(1)

    def hiding(order: Streams, step: int) -> Tensor:
        hidden = {m: order[m] < round(step / STEPS * order[m].shape[1]) for m in MODALITIES}
        return sure(module(module.read(*without(module, pixels, picture, hidden)) | batch))

    orders = {
        "deletion": {m: ranks(shares[m]) for m in MODALITIES},
        "deletion_random": {m: ranks(noise(batch["row"], shares[m].shape[1], i)) for i, m in enumerate(MODALITIES)},
    }
    begin, end = sure(whole), hiding(orders["deletion"], STEPS)
    return {
        name: torch.stack([begin, *(hiding(order, step) for step in range(1, STEPS)), end], 1)
        for name, order in orders.items()
    }


def without(module: Finetune, pixels: Tensor, picture: Tensor, hidden: Streams) -> tuple[Tensor, Tensor]:
    """Both encoders' inputs with 0, the average, at hidden places (B, N) bool."""
    model = module.config.model
    cubes = hidden["video"].unflatten(1, video_grid(model.video_encoder))[:, None].float()
    size = (pixels.shape[1], *pixels.shape[-2:])
    gone = functional.interpolate(cubes, size, mode="nearest").transpose(1, 2) > 0  # (B, T, 1, S, S)
    cells = hidden["audio"].unflatten(1, sound_grid(model.audio_encoder))[:, None]
    silent = cells.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)[..., : picture.shape[2], : picture.shape[3]]
    return pixels.masked_fill(gone, 0), picture.masked_fill(silent, 0)


def noise(rows: Tensor, num: int, stream: int) -> Tensor:
    """(B, num) random numbers of a stream, 0 or 1, for each clip its own whatever batch it is in."""
    drawn = [torch.rand(num, generator=torch.Generator().manual_seed(2 * int(row) + stream)) for row in rows]
    return torch.stack(drawn).to(rows.device)
