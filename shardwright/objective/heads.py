"""What turns hidden states into logits, and the sums of losses that objectives put together.

Every sum is of one term over the rows given, weighted, in float32 (float64 where hidden states are), undivided.
Shapes: B batch, T tokens, P places, D width, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from shardwright.objective.cross_entropy import KERNEL, Head, Kernel, linear_cross_entropy, wide_format

Function = Callable[[Tensor], Tensor]


class Heads(NamedTuple):
    """`vocabulary` gives token logits, of what `transform` ([..., D] -> [..., D]) made of hidden states where it is.

    `others`: by term, hidden states [..., D] -> logits: `sentence` [..., 2], `replaced` [...], `label` [..., C].
    """

    vocabulary: Head
    transform: Function | None = None
    others: Mapping[str, Function] = MappingProxyType({})


def at_places(hidden: Tensor, places: Tensor | None) -> Tensor:
    """Hidden states [B, T, D] at places [B, P] -> [B, P, D]; all of them without places."""
    if places is None:
        return hidden
    return hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def vocabulary_loss(
    hidden: Tensor,
    heads: Heads,
    batch: Mapping[str, Tensor],
    scale: Tensor | None = None,
    kernel: Kernel = KERNEL,
    smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of the batch's `labels` by `weights`, at `places` where it has them: hidden [B, T, D] -> scalar.

    `scale`: the gradient that the sum is going to get.
    """
    chosen = at_places(hidden, batch.get("places"))
    if heads.transform is not None:
        chosen = heads.transform(chosen)
    return linear_cross_entropy(chosen, heads.vocabulary, batch["labels"], batch["weights"], scale, kernel, smoothing)


def class_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross entropy of few classes: logits [..., C], labels int64 [...], weights float32 [...] -> scalar."""
    wide = logits.to(wide_format(logits)).flatten(0, -2)
    losses = F.cross_entropy(wide, labels.flatten(), reduction="none")
    return (losses * weights.to(wide.dtype).flatten()).sum()


def binary_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross entropy of yes (1) and no (0): logits [...], labels of any type [...], weights float32 [...] -> scalar."""
    wide = logits.to(wide_format(logits))
    losses = F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype), reduction="none")
    return (losses * weights.to(wide.dtype)).sum()
