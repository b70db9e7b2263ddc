"""The CPU's own operations against torch's in float64, and no further from them than torch's own in bf16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from shardwright.model import cpu_kernels
from shardwright.model.attention import as_bias, document_mask

Function = Callable[..., torch.Tensor]


def run(function: Function, inputs: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients in float64 of a function of inputs cast to `dtype`."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    y = function(*leaves)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(dtype))
    return [y.detach().double(), *(x.grad.double() for x in leaves if x.grad is not None)]


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [((a - b).norm() / b.norm().clamp(min=1)).item() for a, b in zip(found, exact, strict=True)]


def compare(ours: Function, theirs: Function, inputs: list[torch.Tensor], factor: float) -> None:
    inputs = [x.bfloat16().double() for x in inputs]
    exact = run(theirs, inputs, torch.float64)
    assert max(error(run(ours, inputs, torch.float64), exact)) < 1e-6
    for mine, other in zip(
        error(run(ours, inputs, torch.bfloat16), exact), error(run(theirs, inputs, torch.bfloat16), exact), strict=True
    ):
        assert mine <= factor * other + 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    # The product is rounded before the bias is added, where torch's own rounds once: a factor of sqrt 2 at most.
    torch.manual_seed(0)
    inputs = [torch.randn(3, 40, 48), torch.randn(32, 48) / 48**0.5, *([torch.randn(32)] if bias else [])]
    compare(lambda x, w, b=None: cpu_kernels.Linear.apply(x, w, b), F.linear, inputs, 1.5)


def test_gelu() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(5000) * 3, torch.tensor([0.0, -1e4, 1e4, -90.0, 90.0])])
    compare(cpu_kernels.GeluTanh.apply, lambda x: F.gelu(x, approximate="tanh"), [x], 1.1)
    y = torch.tensor([-1e4, 1e4, 0.0], requires_grad=True)
    cpu_kernels.GeluTanh.apply(y).sum().backward()
    assert torch.equal(y.grad, torch.tensor([0.0, 1.0, 0.5]))


@pytest.mark.parametrize("length", [5, 37, 128, 300])
@pytest.mark.parametrize("packed", [True, False])
def test_attention(length: int, packed: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, length, 16) for _ in range(3)]
    documents = (torch.rand(2, length) < 0.05).cumsum(1)
    mask = document_mask(documents)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return cpu_kernels.CausalAttention.apply(q, k, v, as_bias(mask, q.dtype) if packed else None, 0.25)

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask if packed else None, is_causal=not packed)

    # Scores are rounded to bf16 once more than torch's kernel does, which keeps them in float32.
    compare(ours, theirs, inputs, 2.0)
