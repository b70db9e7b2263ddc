"""Rotary and sinusoidal positions against their formulas."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwright.model.position import rotary, rotate, sinusoidal


def test_sinusoidal_formula() -> None:
    vectors = sinusoidal(torch.tensor([[0, 1, 7, 500]]), 6)
    for row, position in enumerate([0, 1, 7, 500]):
        for channel in range(6):
            angle = position / 10000 ** (channel // 2 * 2 / 6)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert abs(vectors[0, row, channel].item() - expected) < 1e-4


@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 600))
def test_rotary_scores_depend_on_distance_alone(a: int, b: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def score(i: int, j: int) -> float:
        cos, sin = rotary(torch.tensor([[i, j]]), 16, 10000.0)
        return (rotate(q, cos[:, :1], sin[:, :1]) * rotate(k, cos[:, 1:], sin[:, 1:])).sum().item()

    assert abs(score(a, b) - score(a + shift, b + shift)) < 1e-3


def test_rotation_keeps_lengths_and_dtype() -> None:
    x = torch.randn(2, 5, 3, 8)
    cos, sin = rotary(torch.arange(5).expand(2, 5), 8, 10000.0)
    torch.testing.assert_close(rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x, cos, sin)[:, 0], x[:, 0])
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_some_channels_turn_and_the_others_stay() -> None:
    x = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary(torch.arange(5).unsqueeze(0), 4, 10000.0)
    found = rotate(x, cos, sin)
    torch.testing.assert_close(found[..., :4], rotate(x[..., :4], cos, sin))
    assert torch.equal(found[..., 4:], x[..., 4:])
