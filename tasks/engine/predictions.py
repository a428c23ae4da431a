"""What a finished module says of all clips of a split, in memory and in order."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from tasks.data.batches import Clips, InOrder, build_loader, read_batches

# Dimensions at most of what leaves the device, such as (window, segment, its two ends); pictures have more.
SMALL = 3


@torch.inference_mode()
def predictions(
    module: nn.Module,
    clips: Clips,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    title: str,
    drop: str = "",
) -> dict[str, np.ndarray]:
    """Predictions as float32 arrays, a row a clip (or window), of a module in evaluation mode; it is moved to the device.

    `drop` hides "audio" or "video" from it; `title` stands beside the progress bar.
    """
    module = module.to(device).eval()
    loader = build_loader(clips, InOrder(len(clips), batch_size), num_workers, device)
    parts: list[dict[str, np.ndarray]] = []
    for batch in tqdm(read_batches(loader), total=len(loader), desc=title, unit="batch"):
        if drop:
            batch[f"has_{drop}"] = torch.zeros_like(batch[f"has_{drop}"])
        found = module({name: value.to(device, non_blocking=True) for name, value in batch.items()})
        parts.append({name: v.float().cpu().numpy() for name, v in found.items() if v.ndim <= SMALL})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
