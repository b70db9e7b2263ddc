"""Causal language modelling: every position predicts the next token.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from shardwright.config import ObjectiveConfig, meaning
from shardwright.objective.cross_entropy import KERNEL, Kernel, linear_cross_entropy
from shardwright.objective.heads import Heads


class CausalConfig(ObjectiveConfig):
    """`objective: {name: causal}`."""

    name: Literal["causal"] = meaning("causal", "Predict the next token")


class Causal:
    """The loss of GPT-style models, with one term."""

    #: Weight of each term in the total.
    terms: Mapping[str, float] = {"lm": 1.0}
    #: Whether an evaluation predicts every token once, so that bits per byte have a meaning.
    every_token = True

    def __init__(self, config: CausalConfig) -> None:
        self.config = config
        self.kernel: Kernel = KERNEL

    def compile(self) -> None:
        """Have the element-wise part of the loss compiled."""
        self.kernel = KERNEL.compiled()

    def raw_length(self, length: int) -> int:
        """Tokens of the stream that one sequence of `length` inputs needs."""
        return length + 1

    def stride(self, length: int) -> int:
        """Distance between sequences, so that every token is a target once."""
        return length

    def count(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Denominator of each term in this micro-batch: the sum of target weights."""
        return {"lm": batch["weights"].sum()}

    def loss(
        self, hidden: Tensor, heads: Heads, batch: Mapping[str, Tensor], scales: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Sum of each term: hidden [B,T,D] -> {"lm": scalar}; `scales`: the gradient each sum is going to get."""
        scale = None if scales is None else scales["lm"]
        head, hidden = heads.vocabulary, heads.transformed(hidden)
        assert head is not None, "this model has no head over the vocabulary here"
        return {"lm": linear_cross_entropy(hidden, head, batch["labels"], batch["weights"], scale, self.kernel)}
