"""Divergence of a linear head's distribution from a teacher's, in chunks of rows: neither batch of logits exists whole.

Beside cross_entropy.py and by its way: a chunk's logits are turned into their gradient at once, and backward scales
what forward has left. Shapes: N rows (batch x tokens), D and E widths of student and teacher, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.objective.cross_entropy import CHUNK_ROWS, Head, accumulate, capped, left_over, wide_format


def divergence_and_gradient(
    logits: Tensor,
    taught: Tensor,
    weights: Tensor,
    scale: Tensor,
    temperature: float,
    softcap: float | None,
    teacher_softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """T^2 KL(p || q) of p = softmax(taught / T) and q = softmax(logits / T), and its gradient by `logits` [n, V].

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2: with T^2 the gradient stays as large
    as that of the labels, whatever the temperature. In float32, or float64 where the logits are.
    """
    wide = capped(logits, softcap)
    ours = F.log_softmax(wide / temperature, -1)
    theirs = F.log_softmax(capped(taught, teacher_softcap) / temperature, -1).to(ours.dtype)
    wanted = theirs.exp()
    loss = temperature**2 * ((wanted * (theirs - ours)).sum(-1) * weights).sum()
    gradient = (ours.exp() - wanted) * (temperature * weights * scale).unsqueeze(-1)
    if softcap is not None:
        gradient = gradient * (1 - (wide / softcap).square())
    return loss, gradient.to(logits.dtype)


Function = Callable[..., tuple[Tensor, Tensor]]


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        taught: Callable[[slice], Tensor],
        run: Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]],
        scale: Tensor,
    ) -> Tensor:
        total = torch.zeros((), dtype=wide_format(hidden), device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        head_grads: list[Tensor] = []
        for part in _chunks(hidden):
            loss, dlogits = run(F.linear(hidden[part], weight, bias), taught(part), part)
            total += loss
            torch.mm(dlogits, weight, out=hidden_grad[part])
            accumulate(head_grads, dlogits, hidden[part], bias)
        ctx.save_for_backward(scale, hidden_grad, *head_grads)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        scale, *grads = ctx.saved_tensors
        rest = left_over(outer[0], scale)
        hidden_grad, weight_grad, *bias_grad = (g * rest for g in grads)
        return (hidden_grad, weight_grad, bias_grad[0] if bias_grad else None, *[None] * 3)


def _chunks(rows: Tensor) -> list[slice]:
    return [slice(n, n + CHUNK_ROWS) for n in range(0, rows.shape[0], CHUNK_ROWS)]


def linear_divergence(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    weights: Tensor,
    temperature: float,
    scale: Tensor | None = None,
    function: Function = divergence_and_gradient,
) -> Tensor:
    """Weighted sum over rows of T^2 KL(teacher || student), a float32 scalar; float64 where hidden states are.

    hidden [..., D], teacher_hidden [..., E], weights [...]; both heads give logits of the same V tokens, and each has
    all of them. The teacher gets no gradient. `scale`: the gradient that the sum is going to get, as for
    `cross_entropy.linear_cross_entropy`.
    """
    assert head.vocabulary is None and teacher_head.vocabulary is None, "each process has the whole vocabulary"
    rows, theirs = hidden.flatten(0, -2), teacher_hidden.detach().flatten(0, -2)
    weights = weights.flatten().to(wide_format(hidden))
    scale = torch.ones((), device=hidden.device) if scale is None else scale
    teacher_weight = teacher_head.weight.detach()
    teacher_bias = None if teacher_head.bias is None else teacher_head.bias.detach()

    def taught(part: slice) -> Tensor:
        return F.linear(theirs[part], teacher_weight, teacher_bias)

    def run(logits: Tensor, given: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        return function(logits, given, weights[part], scale, temperature, head.softcap, teacher_head.softcap)

    if torch.is_grad_enabled():
        return _LinearDivergence.apply(rows, head.weight, head.bias, taught, run, scale)
    total = torch.zeros((), dtype=weights.dtype, device=hidden.device)
    for part in _chunks(rows):
        total += run(F.linear(rows[part], head.weight, head.bias), taught(part), part)[0]
    return total
