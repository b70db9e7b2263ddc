"""What every objective is: how sequences become a batch, and the loss sums and counts of a batch, by term.

`corrupt` is numpy, called by the data room's readers; `loss` and `count` are torch, called by the last stage's module.
Arrays of a batch (axis 0 is the sequences'; shapes are fixed):

* `input_ids`, `position_ids` int64 [B,T]; `documents` int32 [B,T], attention stays inside equal numbers, -1 is
  padding; `sequence` int64 [B], -1 for padding; `token_types` int64 [B,T] where there are segments.
* the first term's `labels` int64 and `weights` float32, of every position [B,T] or of `places` int64 [B,P].
* other terms' `<term>_labels`, `<term>_weights`, `<term>_places`.
* with an encoder beside the decoder: `encoder_ids`, `encoder_positions`, `encoder_documents` [B,S]; the names above
  are the decoder's.

Shapes: B batch, T tokens, S tokens of the encoder, P places, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Generic, TypeVar

import numpy as np
from torch import Tensor

from shardwright.config import ObjectiveConfig
from shardwright.objective.cross_entropy import KERNEL, Kernel
from shardwright.objective.heads import Heads, at_places, vocabulary_loss
from shardwright.objective.raw import Arrays, Empty
from shardwright.objective.setting import Setting

#: What it is given: `Raw` or `Examples`. Any of its methods may run in another process than `__init__`.
Given = TypeVar("Given", contravariant=True)


class Objective(ABC, Generic[Given]):
    """Built once for training and once for evaluation; `corrupt` is a pure function of (seed, sequence number)."""

    #: Weight of each term in the total; the first is the one over the vocabulary, where there is one.
    terms: Mapping[str, float] = {"lm": 1.0}
    #: What must be marked in sequences: of `words`, `sentences`.
    marks: tuple[str, ...] = ()
    #: Whether it is given a neighbour of each sequence too: raw rows B to 2B - 1.
    neighbours: bool = False
    #: Whether it is given examples of a source and a target, and not sequences of the stream.
    supervised: ClassVar[bool] = False
    #: Kinds of model that it can train.
    trains: ClassVar[tuple[str, ...]] = ("encoder",)
    #: Whether an evaluation predicts every token of the text once, so that bits per byte have a meaning.
    every_token: ClassVar[bool] = False
    #: Share of a target that label smoothing spreads over the vocabulary.
    smoothing: float = 0.0

    def __init__(self, config: ObjectiveConfig, setting: Setting) -> None:
        self.setting = setting
        self.kernel: Kernel = KERNEL
        #: Uses of special tokens whose ids it needs.
        self.specials = config.specials(setting.length)

    def compile(self) -> None:
        """Have the element-wise part of the loss compiled."""
        self.kernel = KERNEL.compiled()

    def raw_length(self, length: int) -> int:
        """Tokens of the stream that one sequence of `length` inputs needs."""
        return self.stride(length)

    @abstractmethod
    def stride(self, length: int) -> int:
        """Distance between sequences of the stream, so that no text is left out."""

    @abstractmethod
    def corrupt(self, raw: Given, empty: Empty = np.empty) -> Arrays:
        """The batch of these sequences, in memory from `empty(shape, dtype)`."""

    def count(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Denominator of each term in this micro-batch: the sum of its weights."""
        main, *others = self.terms
        return {main: batch["weights"].sum(), **{term: batch[f"{term}_weights"].sum() for term in others}}

    def predicting(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Of hidden states [B,T,D] those that the first term's labels are predicted from, [B,T,D] or [B,P,D]."""
        return at_places(hidden, batch.get("places"))

    def loss(
        self, hidden: Tensor, heads: Heads, batch: Mapping[str, Tensor], scales: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Sum of each term, a scalar: hidden [B,T,D]; `scales`: the gradient each sum is going to get."""
        main = next(iter(self.terms))
        scale = None if scales is None else scales[main]
        return {main: vocabulary_loss(hidden, heads, batch, scale, self.kernel, self.smoothing)}
