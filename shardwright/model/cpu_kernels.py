"""Three operations as a CPU wants them in compiled training; elsewhere torch's own are best and these are not used.

Called by layers.py and attention.py where `use_cpu_kernels` says so. What they compute is what torch computes, to
the rounding of the dtype; the gain (one core with AMX, 8 x 512 tokens, width 512, bf16) stands at each.
Shapes: B batch, H heads, T tokens, d head width; I in, O out of a linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def use_cpu_kernels(x: Tensor) -> bool:
    """Whether x is being trained on by a compiled graph on a CPU; known when the graph is made, so it costs nothing."""
    return torch.compiler.is_compiling() and x.device.type == "cpu" and torch.is_grad_enabled()


class Linear(torch.autograd.Function):
    """x @ weight.T + bias in bf16, the bias added by what follows, in float32 but to the rounded product.

    A product that starts from a copied bias runs at two thirds of the speed (512 -> 2048: 10.3 against 7.7 ms). The
    gradients are written out since those of the casts would be computed in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I], weight [O, I], bias [O] -> [..., O]."""
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        y = x @ weight.t()
        return y if bias is None else (y.float() + bias.float()).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        return grad @ weight, grad_weight, rows.sum(0) if ctx.has_bias else None


class GeluTanh(torch.autograd.Function):
    """GELU by tanh written as x sigmoid(2u): an exponential is half the price of a tanh (44 to 23 ms, both ways)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Element-wise."""
        ctx.save_for_backward(x)
        wide = _wide(x)
        return (wide * torch.sigmoid(_slope(wide * wide) * wide)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Gradient of x."""
        (x,) = ctx.saved_tensors
        wide = _wide(x)
        square = wide * wide
        gate = torch.sigmoid(_slope(square) * wide)
        slope = gate + wide * gate * (1 - gate) * _ROOT * (1 + 3 * _CUBE * square)
        return (grad * slope).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


_ROOT = 1.5957691216057308  # 2 sqrt(2 / pi)
_CUBE = 0.044715


def _slope(square: Tensor) -> Tensor:
    """2u / x, where GELU by tanh is x (1 + tanh u) / 2 and u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return _ROOT * (1 + _CUBE * square)


_BLOCK = 128
_MOST_BLOCKS = 8  # each block is unrolled in the compiled graph


class CausalAttention(torch.autograd.Function):
    """Causal attention in bf16: torch's flash kernel forward, and a backward pass of a few large products.

    torch's own backward kernel takes five times its forward (88 against 17 ms for 8 x 8 heads x 512 tokens).
    Recomputing the probabilities from the saved log-sum-exp, one block of keys at a time and only for the queries
    that may see it, takes 43 ms: the products run on the matrix unit and all between them fuses.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """q, k, v [B, H, T, d] -> [B, H, T, d]; `bias` [B, 1, T, T] is added to the scores, later keys hidden by it."""
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=bias is None, attn_mask=bias, scale=scale
        )
        ctx.save_for_backward(q, k, v, bias, out, logsumexp)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Algorithm 4 of FlashAttention-2 (Dao 2023) with a whole block of keys at a time."""
        q, k, v, bias, out, logsumexp = ctx.saved_tensors
        length, dtype = q.shape[2], q.dtype
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)
        logsumexp = logsumexp.unsqueeze(-1)
        grad_q: Tensor | None = None
        grads_k, grads_v = [], []
        size = max(_BLOCK, -(-length // _MOST_BLOCKS))
        for start in range(0, length, size):
            keys = slice(start, min(start + size, length))
            rest = slice(start, length)  # no earlier query sees these keys
            q_rest, grad_rest = _flat(q[:, :, rest]), _flat(grad[:, :, rest])
            k_block, v_block = _flat(k[:, :, keys]), _flat(v[:, :, keys])
            scores = _heads(q_rest @ k_block.transpose(1, 2), q).float() * ctx.scale - logsumexp[:, :, rest]
            p = torch.exp(scores + _bias(bias, scores, rest, keys))
            grad_p = _heads(grad_rest @ v_block.transpose(1, 2), q).float()
            grad_s = _flat((p * (grad_p - delta[:, :, rest]) * ctx.scale).to(dtype))
            grads_k.append(_heads(grad_s.transpose(1, 2) @ q_rest, q))
            grads_v.append(_heads(_flat(p.to(dtype)).transpose(1, 2) @ grad_rest, q))
            part = F.pad(_heads(grad_s @ k_block, q), (0, 0, start, 0))
            grad_q = part if grad_q is None else grad_q + part
        assert grad_q is not None
        return grad_q, torch.cat(grads_k, dim=2), torch.cat(grads_v, dim=2), None, None


def _flat(x: Tensor) -> Tensor:
    """[B, H, ...] -> [B H, ...], as batched products want it."""
    return x.reshape(-1, *x.shape[2:])


def _heads(x: Tensor, like: Tensor) -> Tensor:
    """[B H, ...] -> [B, H, ...]."""
    return x.view(like.shape[0], like.shape[1], *x.shape[1:])


def _bias(bias: Tensor | None, scores: Tensor, queries: slice, keys: slice) -> Tensor:
    """What hides keys from queries in this block: the given bias, or the causal rule."""
    if bias is not None:
        return bias[:, :, queries, keys].float()
    rows, columns = scores.shape[-2:]
    index = torch.arange(rows, device=scores.device)
    later = index[:columns] > index[:, None]
    return torch.where(later, float("-inf"), 0.0)
