"""Cross entropy of a linear head, in chunks of rows, so that a batch's logits never exist at once.

Each chunk's logits are turned into its gradient while they are still in the cache: forward leaves
the gradients of hidden states and head behind, and backward only scales them. Shapes: N rows
(batch x tokens), D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_ROWS = 1024


class Head(NamedTuple):
    """What turns hidden states into logits: weight [V, D], bias [V], and cap x tanh(logits / cap)."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        labels: Tensor,
        weights: Tensor,
    ) -> Tensor:
        head = Head(weight, bias, softcap)
        wanted = ctx.needs_input_grad
        grads = (
            torch.empty_like(hidden) if wanted[0] else None,
            torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None,
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None,
        )
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            total += _chunk(hidden[rows], head, labels[rows], weights[rows], grads, rows)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g.mul_(outer[0].to(g.dtype)) for g in ctx.saved_tensors]
        return (*scaled, None, None, None)


def _chunk(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    weights: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    rows: slice,
) -> Tensor:
    """Loss sum of some rows; adds their gradients into `grads`."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float()  # [n, V]
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
    log_probs = torch.log_softmax(logits, dim=-1)
    index = labels.unsqueeze(-1)
    loss = -(log_probs.gather(-1, index).squeeze(-1) * weights).sum()
    hidden_grad, weight_grad, bias_grad = grads
    if hidden_grad is None and weight_grad is None:
        return loss
    dlogits = log_probs.exp()
    dlogits.scatter_add_(-1, index, torch.full_like(index, -1, dtype=dlogits.dtype))
    dlogits.mul_(weights.unsqueeze(-1))
    if head.softcap is not None:
        dlogits.mul_(1 - (logits / head.softcap).square())
    if bias_grad is not None:
        bias_grad += dlogits.sum(0)
    narrow = dlogits.to(hidden.dtype)
    if hidden_grad is not None:
        torch.mm(narrow, head.weight, out=hidden_grad[rows])
    if weight_grad is not None:
        weight_grad += narrow.t() @ hidden
    return loss


def linear_cross_entropy(hidden: Tensor, head: Head, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of -log softmax(logits)[labels], a float32 scalar.

    hidden [..., D] and the head in the compute format, labels [...] int64, weights [...] float32.
    Logits are rounded to the compute format, as every matrix product is; the rest is float32.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    return _LinearCrossEntropy.apply(rows, *head, labels.reshape(-1), weights.reshape(-1))
