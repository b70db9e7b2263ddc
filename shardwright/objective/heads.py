"""What turns hidden states into what a loss is computed from, as a model hands it to its objective.

Shapes: B batch, T tokens, P places, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from shardwright.objective.cross_entropy import Head


class Heads(NamedTuple):
    """`vocabulary` tells tokens, from what `transform` ([..., D] -> [..., D]) makes of hidden states if there is one.

    `others` by name: hidden states [N, D] -> logits [N, kinds].
    """

    vocabulary: Head
    transform: Callable[[Tensor], Tensor] | None = None
    others: Mapping[str, Callable[[Tensor], Tensor]] = {}

    def transformed(self, hidden: Tensor) -> Tensor:
        """Hidden states as the vocabulary's head takes them."""
        return hidden if self.transform is None else self.transform(hidden)


def pick(hidden: Tensor, places: Tensor) -> Tensor:
    """Hidden states [B, T, D] at `places` [B, P] -> [B, P, D]; a fixed number of them, so that no shape is dynamic."""
    return hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
