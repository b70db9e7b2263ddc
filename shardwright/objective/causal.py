"""Causal language modelling: every position predicts the next token (Radford et al. 2018).

The end-of-document token before a document is that document's begin token: input position t belongs to the document of
its target t + 1. So no target is lost, and none crosses into another document.

Shapes: B batch (sequences), T tokens of a sequence; a raw sequence has T + 1.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from shardwright.config import ObjectiveConfig, meaning
from shardwright.objective.objective import Objective
from shardwright.objective.raw import Arrays, Empty, Raw
from shardwright.objective.segments import fill_positions, segment_numbers, segment_starts


class CausalConfig(ObjectiveConfig):
    """`objective: {name: causal}`."""

    name: Literal["causal"] = meaning("causal", "Predict the next token")


class Causal(Objective[Raw]):
    """The loss of GPT-style models, with one term; each treatment of document boundaries can be turned off."""

    trains = ("decoder",)
    every_token = True

    def raw_length(self, length: int) -> int:
        """One token more than there are inputs: the last target."""
        return length + 1

    def stride(self, length: int) -> int:
        """Distance between sequences, so that every token is a target once."""
        return length

    def corrupt(self, raw: Raw, empty: Empty = np.empty) -> Arrays:
        """The batch of these sequences, in memory from `empty(shape, dtype)`.

        `input_ids`, `labels`, `position_ids` int64 [B,T]; `weights` float32 [B,T], 0 on padding and, without
        `cross_document_targets`, where an end-of-document predicts the next document's first token; `documents` int32
        [B,T], counted from 0 in each row, present with `mask_documents`; `sequence` int64 [B], -1 for padding.
        """
        tokens = raw.tokens
        shape = batch, length = tokens.shape[0], tokens.shape[1] - 1
        # A document whose first token is raw token j begins at input j - 1, with the end-of-document before it.
        begins = (raw.rows * length + raw.starts - 1)[raw.starts > 0]
        arrays = {name: empty(shape, np.int64) for name in ("input_ids", "labels", "position_ids")}
        arrays["input_ids"][...] = tokens[:, :-1]
        arrays["labels"][...] = tokens[:, 1:]
        arrays["weights"] = empty(shape, np.float32)
        self._fill_weights(arrays["weights"], raw.lengths, begins)
        arrays["sequence"] = raw.numbers
        starts = segment_starts(begins, batch, length)
        sizes = np.diff(starts, append=batch * length)
        fill_positions(arrays["position_ids"], starts, sizes, self.setting.reset_positions)
        if self.setting.mask_documents:
            arrays["documents"] = empty(shape, np.int32)
            arrays["documents"].reshape(-1)[...] = np.repeat(segment_numbers(starts, length), sizes)
        return arrays

    def _fill_weights(self, weights: np.ndarray, lengths: np.ndarray, begins: np.ndarray) -> None:
        weights[...] = 1
        for row in np.flatnonzero(lengths <= weights.shape[1]).tolist():
            weights[row, max(0, lengths[row] - 1) :] = 0
        # Whatever training leaves out, an evaluation predicts every token: bits per byte are of the whole text.
        if not self.setting.cross_document_targets and not self.setting.evaluation:
            weights.reshape(-1)[begins] = 0
