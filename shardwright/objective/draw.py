"""Tokens drawn from a head's softmax, each by one uniform number that it is given: ELECTRA's replacements.

The inverse of the cumulative distribution, in the order of the vocabulary. Chance comes from outside, so that the same
place draws by the same number under every layout; the sums are float64, since what is drawn jumps where rounding moves
a bound. Logits are recomputed in chunks of rows and never kept; no gradient passes. Where several processes hold some
rows of the head each, two small sums agree on who holds the drawn token. Shapes: N rows, D width, V vocabulary (held
here), R holders.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.objective.cross_entropy import Head, VocabularyShard, wide_format

DRAW_ROWS = 512  # float64 sums take twice the memory of a chunk of the loss


@torch.no_grad()
def draw(hidden: Tensor, head: Head, uniform: Tensor) -> Tensor:
    """int64 ids [...]: hidden [..., D], uniform float64 [...] in [0, 1); the same on all holders of the head."""
    rows, numbers = hidden.reshape(-1, hidden.shape[-1]), uniform.reshape(-1)
    drawn = []
    for part in (slice(n, n + DRAW_ROWS) for n in range(0, rows.shape[0], DRAW_ROWS)):
        logits = F.linear(rows[part], head.weight, head.bias)
        logits = logits.to(wide_format(logits))
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        held = head.vocabulary
        drawn.append(_draw_whole(logits, numbers[part]) if held is None else _draw_part(logits, numbers[part], held))
    return torch.cat(drawn).view(uniform.shape)


def _draw_whole(logits: Tensor, uniform: Tensor) -> Tensor:
    """[N, V] -> [N]: the first token up to which the probabilities add up to more than `uniform` [N]."""
    sums = (logits - logits.amax(-1, keepdim=True)).exp().double().cumsum(-1)
    return _first_above(sums, uniform * sums[:, -1])


def _draw_part(logits: Tensor, uniform: Tensor, held: VocabularyShard) -> Tensor:
    """As `_draw_whole`, of which each holder has some columns."""
    top = _top(logits)
    sums = (logits - top.unsqueeze(-1)).exp().double().cumsum(-1)
    own = sums[:, -1] if sums.shape[-1] else torch.zeros_like(uniform)
    tops, totals = _of_all(torch.stack([top.double(), own]), held).unbind(1)  # [R, N] each
    shares = totals * (tops - tops.amax(0)).exp()
    ends = shares.cumsum(0)
    wanted = uniform * ends[-1]
    holder = (ends <= wanted).sum(0).clamp(max=held.ranks - 1)
    here = holder == held.rank
    rest = wanted - (ends - shares)[held.rank]
    found = _first_above(sums, rest / (top.double() - tops.amax(0)).exp()) + held.start
    return held.sum(found.where(here, 0))


def _top(logits: Tensor) -> Tensor:
    """The largest of the columns held here [N], -inf where none is."""
    return logits.amax(-1) if logits.shape[-1] else logits.new_full(logits.shape[:1], float("-inf"))


def _of_all(own: Tensor, held: VocabularyShard) -> Tensor:
    """What every holder has, [R, ...], of this one's [...]."""
    every = own.new_zeros(held.ranks, *own.shape)
    every[held.rank] = own
    return held.sum(every)


def _first_above(sums: Tensor, wanted: Tensor) -> Tensor:
    """int64 [N]: the first column of ascending sums [N, V] that is above `wanted` [N], the last where none is."""
    return (sums <= wanted.unsqueeze(-1)).sum(-1).clamp(max=max(sums.shape[-1] - 1, 0))
