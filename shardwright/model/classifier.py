"""The head that tells the class of a text, or of each of its tokens, in the place of the one over the vocabulary.

Fine-tuning puts it on a stack that was trained otherwise; what it is made of is the family's, as Hugging Face has it.
Stands on layers.py, below transformer.py. Shapes: B batch, T tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.model.layers import Linear

POOLERS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "gelu": F.gelu}


class Pooler(nn.Module):
    """act(dense(x)) of the token that stands for a text."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.dense = Linear(width, width)
        self.function = POOLERS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.function(self.dense(x))


class ClassHead(nn.Module):
    """classifier(pooler(x)), or classifier(x) without a pooler."""

    def __init__(self, width: int, classes: int, pooler: nn.Module | None, *, bias: bool = True) -> None:
        super().__init__()
        self.pooler = pooler
        self.classifier = Linear(width, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> logits [..., C]."""
        return self.classifier(x if self.pooler is None else self.pooler(x))


class Classifier(nn.Module):
    """The only head of a stack that classifies."""

    def __init__(self, label: ClassHead) -> None:
        super().__init__()
        self.label = label


def last_places(ids: Tensor, mask: Tensor | None) -> Tensor:
    """int64 [B], the last token of each row of ids [B, T] that `mask` [B, T] does not say is padding."""
    places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return (places if mask is None else places * mask.bool()).max(dim=1).values
