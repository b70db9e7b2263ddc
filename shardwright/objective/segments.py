"""Documents inside rows: where each begins, its number in the row, positions that restart with it.

Shapes: B batch (rows), T tokens of a row.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def segment_starts(begins: np.ndarray, batch: int, length: int) -> np.ndarray:
    """Where segments begin in the flattened batch: at `begins` and at rows; sorted, none twice."""
    return np.unique(np.concatenate([begins, np.arange(batch) * length]))


def segment_numbers(starts: np.ndarray, length: int) -> np.ndarray:
    """Number of each segment in its row, int32."""
    order = np.arange(len(starts), dtype=np.int32)
    row_first = order[starts % length == 0]
    return order - row_first[starts // length]


def fill_positions(positions: np.ndarray, starts: np.ndarray, sizes: np.ndarray, reset: bool) -> None:
    """Fill int64 [B,T] with each token's position since its segment began, or with `reset` off since its row did."""
    if reset:
        np.subtract(counting(positions.size), np.repeat(starts, sizes), out=positions.reshape(-1))
    else:
        positions[...] = counting(positions.shape[1])


def number_documents(begins: np.ndarray, batch: int, length: int) -> np.ndarray:
    """Number of each token's document in its row, int32 [B,T]; `begins` are places in the flattened batch."""
    starts = segment_starts(begins, batch, length)
    sizes = np.diff(starts, append=batch * length)
    return np.repeat(segment_numbers(starts, length), sizes).reshape(batch, length)


def restart_positions(documents: np.ndarray, reset: bool) -> np.ndarray:
    """Position of each token in its run of equal numbers [B,T], or with `reset` off in its row, int64 [B,T]."""
    batch, length = documents.shape
    positions = np.empty((batch, length), np.int64)
    changes = np.flatnonzero(np.diff(documents.reshape(-1))) + 1
    starts = segment_starts(changes, batch, length)
    fill_positions(positions, starts, np.diff(starts, append=batch * length), reset)
    return positions


@lru_cache(maxsize=8)
def counting(size: int) -> np.ndarray:
    """int64 0, 1, ..., read-only."""
    numbers = np.arange(size)
    numbers.flags.writeable = False
    return numbers
