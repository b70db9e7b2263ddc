"""Distillation: any objective over the vocabulary, with a teacher's distribution beside its labels.

Hinton et al. 2015. Two terms of the same predictions, each with its own denominator: the objective's own first one, by
the labels, and `teacher`, the divergence of the model's softened distribution from the teacher's. The teacher is handed
in where the loss is taken; what makes batches needs none. Shapes: B batch, T tokens, P places, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardwright.config import ConfigError, DistillConfig
from shardwright.objective.divergence import Function, divergence_and_gradient, linear_divergence
from shardwright.objective.heads import Heads
from shardwright.objective.objective import Objective
from shardwright.objective.raw import Arrays, Empty

TERM = "teacher"
#: What is given a batch: the teacher's hidden states [B, T, E] and its heads.
Teacher = Callable[[Mapping[str, Tensor]], tuple[Tensor, Heads]]
#: What an objective says of its rows, and is the same with a teacher.
OF_ROWS = ("marks", "neighbours", "supervised", "trains", "every_token", "smoothing", "setting", "specials")


class Distilled(Objective[Any]):
    """`of` with the term of a teacher."""

    def __init__(self, of: Objective[Any], config: DistillConfig) -> None:
        self.of, self.config = of, config
        self.teacher: Teacher | None = None
        self.function: Function = divergence_and_gradient
        for name in OF_ROWS:
            setattr(self, name, getattr(of, name))
        main, *_ = of.terms
        self.terms = {**of.terms, main: of.terms[main] * (1 - config.weight), TERM: config.weight}

    def compile(self) -> None:
        """See the base class."""
        self.of.compile()
        self.function = torch.compile(divergence_and_gradient, fullgraph=True)

    def raw_length(self, length: int) -> int:
        """See the base class."""
        return self.of.raw_length(length)

    def stride(self, length: int) -> int:
        """See the base class."""
        return self.of.stride(length)

    def corrupt(self, raw: Any, empty: Empty = np.empty) -> Arrays:
        """See the base class."""
        return self.of.corrupt(raw, empty)

    def count(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The teacher has something to say wherever there is a label."""
        return {**self.of.count(batch), TERM: batch["weights"].sum()}

    def loss(
        self, hidden: Tensor, heads: Heads, batch: Mapping[str, Tensor], scales: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The sums of `of`, and the teacher's."""
        assert self.teacher is not None, "a teacher is handed in where losses are taken"
        with torch.no_grad():
            seen, theirs = self.teacher(batch)
            seen = self._read(seen, theirs, batch)
        assert heads.vocabulary is not None and theirs.vocabulary is not None
        taught = linear_divergence(
            self._read(hidden, heads, batch),
            heads.vocabulary,
            seen,
            theirs.vocabulary,
            batch["weights"],
            self.config.temperature,
            None if scales is None else scales[TERM],
            self.function,
        )
        return {**self.of.loss(hidden, heads, batch, scales), TERM: taught}

    def _read(self, hidden: Tensor, heads: Heads, batch: Mapping[str, Tensor]) -> Tensor:
        """What the head over the vocabulary reads."""
        chosen = self.of.predicting(hidden, batch)
        return chosen if heads.transform is None else heads.transform(chosen)


def check_distills(name: str) -> None:
    """ConfigError for an objective that predicts no tokens by a head over the vocabulary."""
    if name in ("replaced", "classify"):
        raise ConfigError(
            f"distill: a teacher teaches predictions of tokens, and objective.name={name} makes none; drop the section"
        )
