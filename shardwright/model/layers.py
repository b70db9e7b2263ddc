"""The small parts of a block: norms by name, activations by name, and the feed-forward layer.

Stands at the bottom of the model room. Shapes: B batch, T tokens, D width, F feed-forward width.
Norms are torch's own modules: they take their statistics in float32 and return the input's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.model import cpu_kernels


class Activation(NamedTuple):
    """A pointwise function, and whether a gate of its own multiplies the up projection."""

    function: Callable[[Tensor], Tensor]
    gated: bool


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] @ weight [O, I] transposed, + bias [O]."""
    if cpu_kernels.use_cpu_kernels(x) and x.dtype == torch.bfloat16:
        return cpu_kernels.Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """torch's, run through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return linear(x, self.weight, self.bias)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by tanh (Hendrycks & Gimpel 2016), GPT-2's."""
    return cpu_kernels.GeluTanh.apply(x) if cpu_kernels.use_cpu_kernels(x) else F.gelu(x, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """ReLU squared (So et al. 2021, Primer)."""
    return F.relu(x).square()


# swiglu, geglu, reglu: Shazeer 2020, "GLU Variants Improve Transformer".
ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, False),
    "gelu_tanh": Activation(gelu_tanh, False),
    "relu": Activation(F.relu, False),
    "relu2": Activation(squared_relu, False),
    "silu": Activation(F.silu, False),
    "swiglu": Activation(F.silu, True),
    "geglu": Activation(F.gelu, True),
    "geglu_tanh": Activation(gelu_tanh, True),
    "reglu": Activation(F.relu, True),
}


def build_norm(kind: str, width: int, *, eps: float, weight: bool = True, bias: bool = True) -> nn.Module:
    """LayerNorm (`layer`) or RMSNorm (`rms`, which has no bias) over the last dim."""
    if kind == "layer":
        return nn.LayerNorm(width, eps=eps, elementwise_affine=weight, bias=bias)
    if kind == "rms":
        return nn.RMSNorm(width, eps=eps, elementwise_affine=weight)
    raise ValueError(f"norm {kind!r}: expected 'layer' or 'rms'")


def join(parts: list[Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights [sum of out, in] and biases [sum of out] of linear layers, to be run as one GEMM.

    For compiled graphs, which join again in the backward pass: without a compiler the copy would be kept for it.
    """
    weights: list[Tensor] = [p.weight for p in parts]
    biases: list[Tensor] = [p.bias for p in parts if p.bias is not None]
    return torch.cat(weights), torch.cat(biases) if biases else None


class MLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) where the activation is gated.

    `fused` lets a compiled graph run gate and up as one GEMM; set it False where they must be called as modules.
    """

    def __init__(self, width: int, hidden: int, activation: str, *, bias: bool) -> None:
        super().__init__()
        self.function, gated = ACTIVATIONS[activation]
        self.up = Linear(width, hidden, bias=bias)
        self.gate = Linear(width, hidden, bias=bias) if gated else None
        self.down = Linear(hidden, width, bias=bias)
        self.fused = True

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.gate is None:
            return self.down(self.function(self.up(x)))
        if self.fused and torch.compiler.is_compiling():
            gate, up = linear(x, *join([self.gate, self.up])).chunk(2, dim=-1)
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down(self.function(gate) * up)
