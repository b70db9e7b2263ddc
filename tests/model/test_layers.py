"""Norms, activations and the feed-forward layer against formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

from shardwright.model.layers import ACTIVATIONS, MLP, build_norm

GATES = {
    "swiglu": lambda x: x / (1 + torch.exp(-x)),
    "geglu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "geglu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "reglu": lambda x: x.clamp(min=0),
}
PLAIN = {
    "silu": GATES["swiglu"],
    "gelu": GATES["geglu"],
    "gelu_tanh": GATES["geglu_tanh"],
    "relu": GATES["reglu"],
    "relu2": lambda x: x.clamp(min=0) ** 2,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward_formula(activation: str, bias: bool) -> None:
    torch.manual_seed(0)
    mlp = MLP(6, 10, activation, bias=bias).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    up = mlp.up(x)
    inner = GATES[activation](mlp.gate(x)) * up if mlp.gate is not None else PLAIN[activation](up)
    torch.testing.assert_close(mlp(x), mlp.down(inner))
    assert (mlp.up.bias is not None) is bias


def test_norm_formulas() -> None:
    x = torch.randn(4, 16, dtype=torch.float64) * 3 + 1
    layer = build_norm("layer", 16, eps=1e-5).double()
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(layer(x), centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    rms = build_norm("rms", 16, eps=1e-5).double()
    torch.testing.assert_close(rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_takes_its_statistics_in_float32(kind: str) -> None:
    # In bfloat16 itself the squares of such values would lose all but the largest.
    x = (torch.randn(64, 512) * 30 + 100).bfloat16()
    norm = build_norm(kind, 512, eps=1e-5).bfloat16()
    exact = build_norm(kind, 512, eps=1e-5).double()(x.double())
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).double(), exact, rtol=2**-8, atol=1e-2 if kind == "rms" else 2e-2)


def test_norm_options() -> None:
    assert not list(build_norm("layer", 4, eps=1e-5, weight=False).parameters())
    assert [n for n, _ in build_norm("layer", 4, eps=1e-5, bias=False).named_parameters()] == ["weight"]
    assert [n for n, _ in build_norm("rms", 4, eps=1e-5).named_parameters()] == ["weight"]
    with pytest.raises(ValueError, match="'batch'"):
        build_norm("batch", 4, eps=1e-5)
