"""Labelled segments in time, of all videos at once, as NumPy arrays: overlap, soft-NMS, windows of a video put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

TILE = 16  # segments, neighbours in time, that soft-NMS treats alike; a power of two
FEW = 32  # steps of soft-NMS before what is left is laid out anew; twice as many the next time


@dataclass(frozen=True)
class Segments:
    """Segments of many videos, (N,) each: what was found, or with all scores 1 what is there."""

    video: np.ndarray  # int64, from 0
    label: np.ndarray  # int64, from 0
    start: np.ndarray  # float64, seconds
    end: np.ndarray  # float64, seconds, not before start
    score: np.ndarray  # float64 in [0, 1]

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, rows: np.ndarray) -> Segments:
        """The segments at these rows, (M,) indices or (N,) bool."""
        return Segments(*(getattr(self, field.name)[rows] for field in fields(self)))

    def scored(self, score: np.ndarray) -> Segments:
        """The same segments with other scores (N,)."""
        return Segments(self.video, self.label, self.start, self.end, score)


def from_rows(rows: Sequence[Sequence[float]] | np.ndarray) -> Segments:
    """Segments of (video, label, start, end, score)."""
    video, label, start, end, score = np.array(rows, dtype=np.float64).reshape(-1, 5).T
    return Segments(video.astype(np.int64), label.astype(np.int64), start, end, score)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, M) intersection over union of segments (N, 2) and (M, 2); 0 for two of no length."""
    return overlap(a[:, None, 0], a[:, None, 1], b[None, :, 0], b[None, :, 1])


def overlap(start: np.ndarray, end: np.ndarray, start2: np.ndarray, end2: np.ndarray) -> np.ndarray:
    """Intersection over union of segments whose bounds are given, broadcast; 0 for two of no length."""
    shared = np.maximum(np.minimum(end, end2) - np.maximum(start, start2), 0)
    union = (end - start) + (end2 - start2) - shared
    return shared / np.where(union > 0, union, 1)


# --- soft non-maximum suppression ----------------------------------------------------------------------------------------


def soft_nms(found: Segments, sigma: float, min_score: float) -> Segments:
    """Gaussian soft-NMS (Bodla et al. 2017) within each class of each video; what falls below `min_score` is left out.

    The best of a group is picked, the scores of the others decay by exp(-IoU² / sigma), and so on: exactly that, but one
    step picks in every group. In units of sigma times the logarithm of a score a decay is a subtraction of IoU².
    """
    lowest = max(min_score, np.finfo(np.float64).tiny)
    kept = np.flatnonzero(found.score >= lowest)
    group = (found.video * (found.label.max(initial=-1) + 1) + found.label)[kept]
    order = np.argsort(found.start[kept])
    order = order[by_key(group[order])]
    group, order = group[order], kept[order]
    start, end, score = found.start[order], found.end[order], found.score[order]
    first, floor = sigma * np.log(score), sigma * np.log(lowest)
    height, picked = first.copy(), np.full(len(first), -np.inf)
    alive, steps = np.arange(len(first)), FEW
    while len(alive):
        tiles = _lay(group[alive], start[alive], end[alive], height[alive])
        _pick(tiles, floor, steps)
        rows = alive[tiles.rows[tiles.taken]]
        height[rows], picked[rows] = tiles.height[tiles.taken], tiles.picked[tiles.taken]
        alive, steps = alive[height[alive] >= floor], 2 * steps
    # A factor, so that a score which never decayed stays as it was to the last bit.
    left = np.flatnonzero(picked >= floor)
    decayed = np.zeros(len(found))
    decayed[order[left]] = score[left] * np.exp((picked[left] - first[left]) / sigma)
    return found.scored(decayed)[decayed > 0]


@dataclass(frozen=True)
class _Tiles:
    """Segments of sorted groups, TILE in a row, so that a pick concerns the few rows that reach into its time; (R, TILE)."""

    rows: np.ndarray  # of the segments given
    taken: np.ndarray  # bool; the rest of a group's last row is filled up
    start: np.ndarray
    end: np.ndarray
    height: np.ndarray  # -inf where picked or filled up
    picked: np.ndarray  # height at which it was picked, -inf where it was not
    group: np.ndarray  # (R,) from 0 without gaps


def _lay(group: np.ndarray, start: np.ndarray, end: np.ndarray, height: np.ndarray) -> _Tiles:
    """Tiles of (N,) segments, sorted by group and then start."""
    head = np.flatnonzero(rank_in(group) % TILE == 0)
    places = head[:, None] + np.arange(TILE)
    taken = places < np.append(head[1:], len(group))[:, None]
    rows = np.where(taken, places, head[:, None])
    height = np.where(taken, height[rows], -np.inf)
    number = np.cumsum(np.diff(group[head], prepend=group[0]) > 0)
    return _Tiles(rows, taken, start[rows], end[rows], height, np.full_like(height, -np.inf), number)


def _pick(tiles: _Tiles, floor: float, steps: int) -> None:
    """Pick the best segment of every group, and let the others' heights decay, so many times or until none reaches `floor`."""
    group, height = tiles.group, tiles.height
    begin = np.flatnonzero(np.diff(group, prepend=-1))
    left, right, top = tiles.start[:, 0], tiles.end.max(1), height.max(1)
    winner, since, until = np.empty(len(begin), dtype=np.int64), np.empty(len(begin)), np.empty(len(begin))
    for _ in range(steps):
        best = np.maximum.reduceat(top, begin)
        going = best >= floor
        if not going.any():
            break
        level = np.flatnonzero(top == best.take(group))[::-1]
        winner[group[level]] = level  # of several tiles the first: the last value given to a place stays
        row = winner[going]
        column = height[row].argmax(1)
        tiles.picked[row, column] = best[going]
        height[row, column] = -np.inf
        since.fill(np.inf)
        until.fill(-np.inf)
        since[going], until[going] = tiles.start[row, column], tiles.end[row, column]
        near = np.flatnonzero((left <= until.take(group)) & (right >= since.take(group)))  # the winner's own among them
        by = group.take(near)
        now = height.take(near, 0) - _overlap_squared(tiles, near, since.take(by)[:, None], until.take(by)[:, None])
        height[near] = now
        top[near] = _row_max(now)


def _overlap_squared(tiles: _Tiles, near: np.ndarray, since: np.ndarray, until: np.ndarray) -> np.ndarray:
    """(M, TILE) squared IoU of the tiles `near` (M,) with segments from `since` to `until`, (M, 1)."""
    start, end = tiles.start.take(near, 0), tiles.end.take(near, 0)  # faster than indexing
    shared = np.minimum(end, until)
    shared -= np.maximum(start, since)
    np.maximum(shared, 0, out=shared)
    end -= start
    end += np.maximum(until - since, np.finfo(np.float64).tiny)  # two of no length have IoU 0, not 0 / 0
    end -= shared
    shared /= end
    shared *= shared
    return shared


def _row_max(values: np.ndarray) -> np.ndarray:
    """(M,) of (M, TILE): rows this short NumPy would go through one by one."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        values = np.maximum(values[:, :half], values[:, half:])
    return values[:, 0]


# --- videos --------------------------------------------------------------------------------------------------------------


def once(video: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Rows, in order, of the windows (W,) that no earlier row repeats: the same video from the same second on."""
    return np.sort(np.unique(np.stack([video, start], 1), axis=0, return_index=True)[1])


def best_of_each(found: Segments, limit: int) -> Segments:
    """Up to `limit` segments of each video, by video and then the best first."""
    found = found[best_first(found.video, found.score)]
    return found[rank_in(found.video) < limit]


def best_first(key: np.ndarray, score: np.ndarray) -> np.ndarray:
    """(N,) rows by `key`, integers from 0, then the best first, then as they come: np.lexsort, but several times faster."""
    order = np.argsort(-score)  # which leaves equals in any order
    order = order[sorted_within(-score[order], order)]
    return order[by_key(key[order])]


def by_key(key: np.ndarray) -> np.ndarray:
    """(N,) rows by `key`, integers from 0, then as they come. NumPy sorts narrow integers by their digits."""
    return np.argsort(key.astype(np.min_scalar_type(key.max(initial=0))), kind="stable")


def sorted_within(key: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(N,) rows by `key`, which is sorted already, then by `values`: only rows of equal keys move."""
    same = key[1:] == key[:-1]
    rows = np.flatnonzero(np.append(same, False) | np.append(False, same))
    order = np.arange(len(key))
    order[rows] = rows[np.lexsort((values[rows], key[rows]))]
    return order


def rank_in(key: np.ndarray) -> np.ndarray:
    """(N,) how many of the same key stand before each; `key` (N,) is sorted."""
    begin = np.flatnonzero(np.diff(key, prepend=-1))
    return np.arange(len(key)) - np.repeat(begin, np.diff(begin, append=len(key)))


def weighted(found: Segments, clip_scores: np.ndarray) -> Segments:
    """Scores times what a classifier of whole videos, (V, C) in [0, 1], gives the segment's class in its video."""
    return found.scored(found.score * clip_scores[found.video, found.label])
