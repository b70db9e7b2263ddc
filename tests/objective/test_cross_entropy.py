"""Chunked head and loss against torch's own in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.objective import cross_entropy
from shardwright.objective.cross_entropy import Head, linear_cross_entropy


def _case(rows: int, width: int, vocab: int, seed: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(vocab, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(vocab, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)
    return hidden, weight, bias, labels, weights


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 9),
    vocab=st.integers(2, 30),
    seed=st.integers(0, 99),
    cap=st.sampled_from([None, 2.0]),
)
def test_equals_torch(rows, width, vocab, seed, cap):
    hidden, weight, bias, labels, weights = _case(rows, width, vocab, seed, torch.float32)
    before, cross_entropy.CHUNK_ROWS = cross_entropy.CHUNK_ROWS, 7
    try:
        ours = linear_cross_entropy(hidden, Head(weight, bias, cap), labels, weights)
        grads = torch.autograd.grad(ours * 3, (hidden, weight, bias))
    finally:
        cross_entropy.CHUNK_ROWS = before
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    logits = exact[0] @ exact[1].T + exact[2]
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    theirs = (losses * weights.double()).sum()
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    for got, expected in zip(grads, torch.autograd.grad(theirs * 3, exact), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_bf16_is_within_its_rounding_and_zero_weight_rows_count_nothing():
    hidden, weight, _, labels, weights = _case(64, 32, 100, 0, torch.bfloat16)
    weights[10:] = 0
    ours = linear_cross_entropy(hidden, Head(weight), labels, weights)
    (grad,) = torch.autograd.grad(ours, hidden)
    losses = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="none")
    assert ours.item() == pytest.approx((losses * weights).sum().item(), rel=1e-2)
    assert grad[10:].abs().max() == 0


def test_fp16_gradients_of_the_head_leave_their_range_only_with_the_scale():
    """An undivided sum over rows would be 160,000; divided by its count it is 40."""
    hidden = torch.zeros(4096, 8, dtype=torch.float16)
    hidden[:, 0] = 80
    hidden.requires_grad_()
    weight = torch.zeros(16, 8, dtype=torch.float16, requires_grad=True)
    labels = (torch.arange(4096) % 2) * 3
    scale = torch.tensor(1 / 4096)
    (linear_cross_entropy(hidden, Head(weight), labels, torch.ones(4096), scale) * scale).backward()
    exact = torch.zeros(16, 8, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy(hidden.detach().double() @ exact.T, labels).backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-2, atol=1e-3)


def test_without_gradients_it_is_the_same_number():
    hidden, weight, bias, labels, weights = _case(30, 8, 20, 1, torch.float32)
    kept = linear_cross_entropy(hidden, Head(weight, bias), labels, weights)
    with torch.no_grad():
        free = linear_cross_entropy(hidden, Head(weight, bias), labels, weights)
    assert torch.equal(kept, free)
