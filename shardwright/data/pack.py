"""From raw sequences to the arrays of a causal batch: inputs, labels, weights, positions and document numbers.

Sits between `stream` and `loader`. The end-of-document token before a document is that document's begin token: input
position t belongs to the document of its target t + 1. So no target is lost, and none crosses into another document.

Shapes: B batch (sequences), T tokens of a sequence; a raw sequence has T + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shardwright.data.buffers import Empty
from shardwright.data.stream import Sequences

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Packing:
    """How document boundaries inside a sequence are treated; each treatment can be turned off."""

    mask_documents: bool = True
    reset_positions: bool = True
    cross_document_targets: bool = True

    def __call__(self, sequences: Sequences, empty: Empty = np.empty) -> Arrays:
        """The batch of these sequences, in memory from `empty(shape, dtype)`.

        `input_ids`, `labels`, `position_ids` int64 [B,T]; `weights` float32 [B,T], 0 on padding and, without
        `cross_document_targets`, where an end-of-document predicts the next document's first token; `documents` int32
        [B,T], counted from 0 in each row, present with `mask_documents`; `sequence` int64 [B], -1 for padding.
        """
        tokens = sequences.tokens
        shape = batch, length = tokens.shape[0], tokens.shape[1] - 1
        # A document whose first token is raw token j begins at input j - 1, with the end-of-document before it.
        begins = (sequences.rows * length + sequences.starts - 1)[sequences.starts > 0]
        arrays = {name: empty(shape, np.int64) for name in ("input_ids", "labels", "position_ids")}
        arrays["input_ids"][...] = tokens[:, :-1]
        arrays["labels"][...] = tokens[:, 1:]
        arrays["weights"] = empty(shape, np.float32)
        self._fill_weights(arrays["weights"], sequences.lengths, begins)
        arrays["sequence"] = sequences.numbers
        starts = _segment_starts(begins, batch, length)
        sizes = np.diff(starts, append=batch * length)
        self._fill_positions(arrays["position_ids"], starts, sizes)
        if self.mask_documents:
            arrays["documents"] = empty(shape, np.int32)
            arrays["documents"].reshape(-1)[...] = np.repeat(_segment_numbers(starts, length), sizes)
        return arrays

    def _fill_weights(self, weights: np.ndarray, lengths: np.ndarray, begins: np.ndarray) -> None:
        weights[...] = 1
        for row in np.flatnonzero(lengths <= weights.shape[1]).tolist():
            weights[row, max(0, lengths[row] - 1) :] = 0
        if not self.cross_document_targets:
            weights.reshape(-1)[begins] = 0

    def _fill_positions(self, positions: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> None:
        if self.reset_positions:
            np.subtract(_counting(positions.size), np.repeat(starts, sizes), out=positions.reshape(-1))
        else:
            positions[...] = _counting(positions.shape[1])


def _segment_starts(begins: np.ndarray, batch: int, length: int) -> np.ndarray:
    """Where segments begin in the flattened batch: at documents and at rows; sorted, none twice."""
    return np.unique(np.concatenate([begins, np.arange(batch) * length]))


def _segment_numbers(starts: np.ndarray, length: int) -> np.ndarray:
    """Number of each segment in its row, int32."""
    order = np.arange(len(starts), dtype=np.int32)
    row_first = order[starts % length == 0]
    return order - row_first[starts // length]


@lru_cache(maxsize=8)
def _counting(size: int) -> np.ndarray:
    numbers = np.arange(size)
    numbers.flags.writeable = False
    return numbers
