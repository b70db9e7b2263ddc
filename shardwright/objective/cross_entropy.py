"""Cross entropy of a linear head, in chunks of rows, so that a batch's logits never exist at once.

Each chunk's logits are turned into its gradient while they are still in the cache: forward leaves
the gradients of hidden states and head behind, and backward only scales them. (`torch.nn.functional
.linear_cross_entropy` does the same, but takes the head's gradient in float32 products, 4 times as
long on a CPU.) Shapes: N rows (batch x tokens), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_ROWS = 2048


class Head(NamedTuple):
    """What turns hidden states into logits: weight [V, D], bias [V], and cap x tanh(logits / cap)."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


# (logits [n, V], labels [n], weights [n], scale [], softcap) -> (loss sum, scale x its gradient by the logits [n, V])
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, float | None], tuple[Tensor, Tensor]]


def loss_and_gradient(
    logits: Tensor, labels: Tensor, weights: Tensor, scale: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The element-wise part, in float32; a compiler makes one pass of it."""
    wide = logits.float()
    if softcap is not None:
        wide = softcap * torch.tanh(wide / softcap)
    top = wide.amax(-1, keepdim=True)
    powers = (wide - top).exp()
    total = powers.sum(-1, keepdim=True)
    picked = wide.gather(-1, labels.unsqueeze(-1))
    loss = ((total.log() + top - picked).squeeze(-1) * weights).sum()
    target = torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)
    gradient = (powers / total - target.float()) * (weights * scale).unsqueeze(-1)
    if softcap is not None:
        gradient = gradient * (1 - (wide / softcap).square())
    return loss, gradient.to(logits.dtype)


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
        scale: Tensor,
        kernel: Kernel,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        head_grads: list[Tensor] = []
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            loss, dlogits = kernel(logits, labels[part], weights[part], scale, softcap)
            total += loss
            torch.mm(dlogits, weight, out=hidden_grad[part])
            _accumulate(head_grads, dlogits, hidden[part], bias)
        ctx.save_for_backward(scale, hidden_grad, *head_grads)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        scale, *grads = ctx.saved_tensors
        rest = outer[0] / scale  # 1 where the scale was the right one
        hidden_grad, weight_grad, *bias_grad = (g.mul_(rest) for g in grads)
        return (hidden_grad, weight_grad, bias_grad[0] if bias_grad else None, *[None] * 5)


def _accumulate(grads: list[Tensor], dlogits: Tensor, hidden: Tensor, bias: Tensor | None) -> None:
    """Add a chunk's gradients of weight [V, D] and bias [V]; several chunks add up in float32."""
    parts = [_transposed_product(dlogits, hidden)] + ([dlogits.float().sum(0)] if bias is not None else [])
    if not grads:
        grads.extend(parts)
        return
    for index, part in enumerate(parts):
        grads[index] = grads[index].float().add_(part)


def _transposed_product(wide: Tensor, narrow: Tensor) -> Tensor:
    """wide.T @ narrow of [n, V] and [n, D] -> [V, D].

    oneDNN takes x @ y at twice the speed of x.T @ y in bf16: on a CPU the narrow one is transposed first.
    """
    if wide.device.type == "cpu" and wide.dtype == torch.bfloat16:
        return (narrow.t().contiguous() @ wide).t()
    return wide.t() @ narrow


def linear_cross_entropy(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    weights: Tensor,
    scale: Tensor | None = None,
    kernel: Kernel = loss_and_gradient,
) -> Tensor:
    """Weighted sum of -log softmax(logits)[labels], a float32 scalar.

    hidden [..., D] and the head in the compute format, labels [...] int64, weights [...] float32.
    Logits are rounded to the compute format, as every matrix product is; the rest is float32.
    `scale` (0-dim float32) is the gradient that this sum is going to get: fp16 products need it beforehand,
    since an undivided sum over rows leaves its range. `kernel` is `loss_and_gradient` or what a compiler made of it.
    """
    rows, labels, weights = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), weights.reshape(-1)
    scale = torch.ones((), device=hidden.device) if scale is None else scale
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(rows, *head, labels, weights, scale, kernel)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for part in (slice(n, n + CHUNK_ROWS) for n in range(0, rows.shape[0], CHUNK_ROWS)):
        logits = torch.nn.functional.linear(rows[part], head.weight, head.bias)
        total += kernel(logits, labels[part], weights[part], scale, head.softcap)[0]
    return total
