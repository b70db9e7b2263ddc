"""Tokens drawn from a head's softmax by a race: ELECTRA's replacements.

Every token of the vocabulary gets an exponential time of its own, at the rate of its probability, and the first one is
drawn (Gumbel's maximum, as in ELECTRA's program). Chance comes from outside, a number for each place and token, so that
a place draws alike under every layout. Rounding changes a draw only where the first two come in together, about once
in a million draws in float32 whatever the vocabulary; the inverse of the cumulative distribution, which needs one
number a place, moves all its bounds with every logit and changes hundreds of times as many. Logits are recomputed in
chunks of rows and never kept; no gradient passes. Where several processes hold some rows of the head each, they agree
on each place's winner. Shapes: N rows, D width, V vocabulary (held here).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.objective.cross_entropy import Head, VocabularyShard, wide_format

DRAW_ROWS = 512


class Chance(Protocol):
    """Uniform numbers in (0, 1) of places and tokens, finely spaced next to 0, where the winners are."""

    def __call__(self, keys: Tensor, tokens: Tensor, dtype: torch.dtype, /) -> Tensor:
        """int64 keys of places [N] and numbers of tokens [V] -> [N, V]."""


@torch.no_grad()
def draw(hidden: Tensor, head: Head, keys: Tensor, chance: Chance) -> Tensor:
    """int64 ids [...]: hidden [..., D], int64 keys of places [...]; the same on all holders of the head."""
    rows, places, held = hidden.reshape(-1, hidden.shape[-1]), keys.reshape(-1), head.vocabulary
    first = 0 if held is None else held.start
    tokens = torch.arange(first, first + head.weight.shape[0], device=hidden.device)
    drawn = []
    for part in (slice(n, n + DRAW_ROWS) for n in range(0, rows.shape[0], DRAW_ROWS)):
        logits = F.linear(rows[part], head.weight, head.bias)
        logits = logits.to(wide_format(logits))
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        times = -torch.log1p(-chance(places[part], tokens, logits.dtype))
        drawn.append(_first(logits - times.log(), held))
    return torch.cat(drawn).view(keys.shape)


def _first(scores: Tensor, held: VocabularyShard | None) -> Tensor:
    """[N, V] -> [N]: the token of the greatest score among all holders; of equal ones any, the same one on all."""
    if held is None:
        return scores.argmax(-1)
    if not scores.shape[-1]:  # a holder of nothing takes part all the same
        scores = scores.new_full((len(scores), 1), float("-inf"))
    own, found = scores.max(-1)
    return held.max(torch.where(own == held.max(own.clone()), found + held.start, -1))
