"""From raw sequences to the arrays of a causal batch: inputs, labels, weights, positions and document numbers.

Sits between `stream` and `loader`. The end-of-document token before a document is that document's begin token: input
position t belongs to the document of its target t + 1. So no target is lost, and none crosses into another document.

Shapes: B batch (sequences), T tokens of a sequence; a raw sequence has T + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardwright.data.stream import Sequences

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Packing:
    """How document boundaries inside a sequence are treated; each treatment can be turned off."""

    mask_documents: bool = True
    reset_positions: bool = True
    cross_document_targets: bool = True

    def __call__(self, sequences: Sequences) -> Arrays:
        """The batch of these sequences.

        `input_ids`, `labels`, `position_ids` int64 [B,T]; `weights` float32 [B,T], 0 on padding and, without
        `cross_document_targets`, where an end-of-document predicts the next document's first token; `documents` int32
        [B,T], counted from 0 in each row, present with `mask_documents`; `sequence` int64 [B], -1 for padding.
        """
        tokens = sequences.tokens
        batch, length = tokens.shape[0], tokens.shape[1] - 1
        # A document whose first token is raw token j begins at input j - 1, with the end-of-document before it.
        inside = sequences.starts > 0
        begins = (sequences.rows * length + sequences.starts - 1)[inside]
        arrays = {
            "input_ids": tokens[:, :-1].astype(np.int64),
            "labels": tokens[:, 1:].astype(np.int64),
            "weights": self._weights(sequences.lengths, begins, batch, length),
            "sequence": sequences.numbers,
        }
        starts = _segment_starts(begins, batch, length)
        sizes = np.diff(starts, append=batch * length)
        arrays["position_ids"] = self._positions(starts, sizes, batch, length)
        if self.mask_documents:
            arrays["documents"] = _documents(starts, sizes, batch, length)
        return arrays

    def _weights(self, lengths: np.ndarray, begins: np.ndarray, batch: int, length: int) -> np.ndarray:
        weights = np.ones((batch, length), np.float32)
        for row in np.flatnonzero(lengths <= length).tolist():
            weights[row, max(0, lengths[row] - 1) :] = 0
        if not self.cross_document_targets:
            weights.reshape(-1)[begins] = 0
        return weights

    def _positions(self, starts: np.ndarray, sizes: np.ndarray, batch: int, length: int) -> np.ndarray:
        if not self.reset_positions:
            return np.tile(np.arange(length), (batch, 1))
        positions = np.repeat(starts, sizes)
        np.subtract(np.arange(batch * length), positions, out=positions)
        return positions.reshape(batch, length)


def _segment_starts(begins: np.ndarray, batch: int, length: int) -> np.ndarray:
    """Where segments begin in the flattened batch: at documents and at rows; sorted, none twice."""
    return np.unique(np.concatenate([begins, np.arange(batch) * length]))


def _documents(starts: np.ndarray, sizes: np.ndarray, batch: int, length: int) -> np.ndarray:
    """Number of each position's segment in its row, int32 [B,T]."""
    order = np.arange(len(starts), dtype=np.int32)
    row_first = order[starts % length == 0]
    return np.repeat(order - row_first[starts // length], sizes).reshape(batch, length)
