"""Cross entropy of a linear head, in chunks of rows, so that a batch's logits never exist at once.

Each chunk's logits are turned into its gradient while they are still in the cache: forward leaves
the gradients of hidden states and head behind, and backward only scales them. (`torch.nn.functional
.linear_cross_entropy` does the same, but takes the head's gradient in float32 products, 4 times as
long on a CPU.) Where several processes hold some rows of the head each, they agree on each chunk's
maxima and sums, and no logit travels. Shapes: N rows (batch x tokens), D width, V vocabulary (held here).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

CHUNK_ROWS = 2048


def wide_format(x: Tensor) -> torch.dtype:
    """The format of a loss over `x`: float32, or float64 where x is, for comparisons."""
    return torch.promote_types(x.dtype, torch.float32)


class VocabularyShard(Protocol):
    """A head of which this process holds consecutive rows; what its holders agree on is not differentiated."""

    @property
    def start(self) -> int:
        """The first row held here."""

    def max(self, x: Tensor) -> Tensor:
        """Element-wise maximum of x over all holders; may reuse its memory."""

    def sum(self, x: Tensor) -> Tensor:
        """Element-wise sum of x over all holders; may reuse its memory."""


class Head(NamedTuple):
    """What turns hidden states into logits: weight [V, D], bias [V], and cap x tanh(logits / cap).

    With `vocabulary`, weight and bias are the rows held here, any number of them.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    vocabulary: VocabularyShard | None = None


def loss_and_gradient(
    logits: Tensor, labels: Tensor, weights: Tensor, scale: Tensor, softcap: float | None, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The element-wise part, in float32 (float64 as it is); a compiler makes one pass of it.

    `smoothing`: share of the target that is spread over the vocabulary evenly (Szegedy et al. 2016).
    """
    wide = capped(logits, softcap)
    top = wide.amax(-1, keepdim=True)
    powers = (wide - top).exp()
    total = powers.sum(-1, keepdim=True)
    picked = wide.gather(-1, labels.unsqueeze(-1))
    if smoothing:
        picked = (1 - smoothing) * picked + smoothing * wide.mean(-1, keepdim=True)
    loss = ((total.log() + top - picked).squeeze(-1) * weights).sum()
    target = torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)
    wanted = _smoothed(target.float(), smoothing, logits.shape[-1])
    gradient = (powers / total - wanted) * (weights * scale).unsqueeze(-1)
    if softcap is not None:
        gradient = gradient * (1 - (wide / softcap).square())
    return loss, gradient.to(logits.dtype)


def _smoothed(target: Tensor, smoothing: float, vocabulary: int | Tensor) -> Tensor:
    """The distribution that is aimed at: `target` is 1 at the label, 0 elsewhere."""
    return (1 - smoothing) * target + smoothing / vocabulary if smoothing else target


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """In float32, or in float64 where they are."""
    wide = logits.to(wide_format(logits))
    return wide if softcap is None else softcap * torch.tanh(wide / softcap)


def part_top(logits: Tensor, softcap: float | None) -> Tensor:
    """The largest logit [n] held here, -inf where none is."""
    if logits.shape[-1] == 0:
        return torch.full(logits.shape[:-1], float("-inf"), dtype=wide_format(logits), device=logits.device)
    return capped(logits, softcap).amax(-1)


def part_sums(logits: Tensor, places: Tensor, top: Tensor, softcap: float | None, smoothing: float = 0.0) -> Tensor:
    """[2, n]: sum of exp(logit - top), and the label's logit where it is held here; `places` count from `start`.

    With smoothing [4, n]: the sum of the logits too, and how many they are.
    """
    wide = capped(logits, softcap)
    total = (wide - top.unsqueeze(-1)).exp().sum(-1)
    sums = [total, torch.where(_target(logits, places), wide, 0.0).sum(-1)]
    if smoothing:
        sums += [wide.sum(-1), torch.full_like(total, logits.shape[-1])]
    return torch.stack(sums)


def part_loss_and_gradient(
    logits: Tensor,
    places: Tensor,
    weights: Tensor,
    scale: Tensor,
    softcap: float | None,
    top: Tensor,
    sums: Tensor,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As `loss_and_gradient`: the loss of the whole vocabulary and the gradient of the logits held here.

    `top` [n] and `sums` [2 or 4, n] are of all holders.
    """
    wide = capped(logits, softcap)
    total, picked = sums[0], sums[1]
    wanted = _target(logits, places).float()
    if smoothing:
        picked = (1 - smoothing) * picked + smoothing * sums[2] / sums[3]
        wanted = _smoothed(wanted, smoothing, sums[3].unsqueeze(-1))
    loss = ((total.log() + top - picked) * weights).sum()
    share = (wide - top.unsqueeze(-1)).exp() / total.unsqueeze(-1)
    gradient = (share - wanted) * (weights * scale).unsqueeze(-1)
    if softcap is not None:
        gradient = gradient * (1 - (wide / softcap).square())
    return loss, gradient.to(logits.dtype)


def _target(logits: Tensor, places: Tensor) -> Tensor:
    """bool [n, V], true at the label where it is held here."""
    return torch.arange(logits.shape[-1], device=logits.device) == places.unsqueeze(-1)


class Kernel(NamedTuple):
    """The element-wise functions of the loss: of a whole vocabulary, and the three stages of a part of one."""

    whole: Callable[..., tuple[Tensor, Tensor]] = loss_and_gradient
    top: Callable[[Tensor, float | None], Tensor] = part_top
    sums: Callable[..., Tensor] = part_sums
    part: Callable[..., tuple[Tensor, Tensor]] = part_loss_and_gradient

    def compiled(self) -> Kernel:
        """Each made one pass by a compiler, at its first use."""
        made: tuple[Any, ...] = tuple(torch.compile(function, fullgraph=True) for function in self)
        return Kernel(*made)

    def run(
        self, logits: Tensor, labels: Tensor, weights: Tensor, scale: Tensor, head: Head, smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """(loss sum, scale x its gradient by the logits [n, V]); labels [n] of the whole vocabulary, weights [n]."""
        vocabulary, softcap = head.vocabulary, head.softcap
        if vocabulary is None:
            return self.whole(logits, labels, weights, scale, softcap, smoothing)
        places = labels - vocabulary.start
        top = vocabulary.max(self.top(logits, softcap))
        sums = vocabulary.sum(self.sums(logits, places, top, softcap, smoothing))
        return self.part(logits, places, weights, scale, softcap, top, sums, smoothing)


KERNEL = Kernel()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        vocabulary: VocabularyShard | None,
        labels: Tensor,
        weights: Tensor,
        scale: Tensor,
        kernel: Kernel,
        smoothing: float,
    ) -> Tensor:
        head = Head(weight, bias, softcap, vocabulary)
        total = torch.zeros((), dtype=wide_format(hidden), device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        head_grads: list[Tensor] = []
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            loss, dlogits = kernel.run(logits, labels[part], weights[part], scale, head, smoothing)
            total += loss
            torch.mm(dlogits, weight, out=hidden_grad[part])
            if any(ctx.needs_input_grad[1:3]):  # a frozen head has none
                accumulate(head_grads, dlogits, hidden[part], bias)
        ctx.save_for_backward(scale, hidden_grad, *head_grads)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        scale, *grads = ctx.saved_tensors
        rest = left_over(outer[0], scale)
        hidden_grad, *head_grads = (g * rest for g in grads)
        return (hidden_grad, *head_grads, *[None] * (9 - len(head_grads)))


def left_over(outer: Tensor, scale: Tensor) -> Tensor:
    """What gradients that were taken for `scale` are still to be multiplied by: 1 where that was the right one.

    A term of weight 0 has a scale of 0, and its gradients are 0 already.
    """
    return outer / torch.where(scale == 0, 1, scale)


def accumulate(grads: list[Tensor], dlogits: Tensor, hidden: Tensor, bias: Tensor | None) -> None:
    """Add a chunk's gradients of weight [V, D] and bias [V]; several chunks add up in float32 or float64."""
    wide = wide_format(hidden)
    parts = [_transposed_product(dlogits, hidden)] + ([dlogits.to(wide).sum(0)] if bias is not None else [])
    if not grads:
        grads.extend(parts)
        return
    for index, part in enumerate(parts):
        grads[index] = grads[index].to(wide).add_(part)


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
    kernel: Kernel = KERNEL,
    smoothing: float = 0.0,
) -> Tensor:
    """Weighted sum of -log softmax(logits)[labels], a float32 scalar; float64 where hidden states are.

    hidden [..., D] and the head in the compute format, labels [...] int64, weights [...] float32.
    Logits are rounded to the compute format, as every matrix product is; the rest is float32.
    `scale` (0-dim float32) is the gradient that this sum is going to get: fp16 products need it beforehand,
    since an undivided sum over rows leaves its range. `smoothing`: as in `loss_and_gradient`. Where the head is a
    part of a vocabulary, hidden, labels and weights are the same on all holders and so is the loss; the gradient of
    hidden is this holder's summand of the whole one.
    """
    rows, labels, weights = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), weights.reshape(-1)
    weights = weights.to(wide_format(hidden))
    scale = torch.ones((), device=hidden.device) if scale is None else scale
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(rows, *head, labels, weights, scale, kernel, smoothing)
    total = torch.zeros((), dtype=weights.dtype, device=hidden.device)
    for part in (slice(n, n + CHUNK_ROWS) for n in range(0, rows.shape[0], CHUNK_ROWS)):
        logits = torch.nn.functional.linear(rows[part], head.weight, head.bias)
        total += kernel.run(logits, labels[part], weights[part], scale, head, smoothing)[0]
    return total
