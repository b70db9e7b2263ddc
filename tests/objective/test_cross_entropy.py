"""Chunked head and loss against torch's own in float64."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.objective import cross_entropy
from shardwright.objective.cross_entropy import KERNEL, Head, Kernel, linear_cross_entropy


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
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_equals_torch(rows, width, vocab, seed, cap, smoothing):
    hidden, weight, bias, labels, weights = _case(rows, width, vocab, seed, torch.float32)
    before, cross_entropy.CHUNK_ROWS = cross_entropy.CHUNK_ROWS, 7
    try:
        head = Head(weight, bias, cap)
        ours = linear_cross_entropy(hidden, head, labels, weights, smoothing=smoothing)
        grads = torch.autograd.grad(ours * 3, (hidden, weight, bias))
    finally:
        cross_entropy.CHUNK_ROWS = before
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    logits = exact[0] @ exact[1].T + exact[2]
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
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


class Holder:
    """One of several threads that hold rows of one vocabulary and meet at each reduction."""

    def __init__(self, start: int, index: int, slots: list, barrier: Barrier) -> None:
        self.start, self.index, self.slots, self.barrier = start, index, slots, barrier
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def _all(self, kind: str, x: torch.Tensor) -> torch.Tensor:
        self.calls.append((kind, tuple(x.shape)))
        assert not x.requires_grad
        self.slots[self.index] = x.clone()
        self.barrier.wait(20)
        stacked = torch.stack(self.slots)
        self.barrier.wait(20)
        return stacked

    def max(self, x: torch.Tensor) -> torch.Tensor:
        return self._all("max", x).amax(0)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self._all("sum", x).sum(0)


def _held_by(sizes, hidden, weight, bias, cap, labels, weights, *, scale=None, kernel=KERNEL, grad=True, smoothing=0.0):
    """Loss, calls and the gradients of hidden (summed) and of all rows, from threads with `sizes` rows each."""
    slots, barrier, starts = [None] * len(sizes), Barrier(len(sizes)), [sum(sizes[:n]) for n in range(len(sizes))]

    def hold(index: int):
        own = slice(starts[index], starts[index] + sizes[index])
        parts = [t.detach()[own].clone().requires_grad_() for t in (weight, bias)]
        shared = hidden.detach().clone().requires_grad_()
        holder = Holder(starts[index], index, slots, barrier)
        with torch.set_grad_enabled(grad):
            head = Head(*parts, cap, holder)
            loss = linear_cross_entropy(shared, head, labels, weights, scale, kernel, smoothing)
        outer = loss * (3 if scale is None else scale)
        return loss, holder.calls, torch.autograd.grad(outer, (shared, *parts)) if grad else ()

    with ThreadPoolExecutor(len(sizes)) as pool:
        losses, calls, grads = zip(*pool.map(hold, range(len(sizes))), strict=True)
    assert all(torch.equal(loss.nan_to_num(-1), losses[0].nan_to_num(-1)) for loss in losses)
    whole = [join(parts) for join, parts in zip((sum, torch.cat, torch.cat), zip(*grads, strict=True), strict=False)]
    return losses[0], calls, whole


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 20),
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 0),
    seed=st.integers(0, 99),
    cap=st.sampled_from([None, 2.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_holders_of_parts_of_the_vocabulary_make_the_whole(rows, sizes, seed, cap, smoothing):
    """Any cut, empty parts too; the largest logit and the label may be anywhere."""
    hidden, weight, bias, labels, weights = _case(rows, 5, sum(sizes), seed, torch.float32)
    before, cross_entropy.CHUNK_ROWS = cross_entropy.CHUNK_ROWS, 7
    try:
        case = (sizes, hidden, weight, bias, cap, labels, weights)
        loss, calls, grads = _held_by(*case, smoothing=smoothing)
        free, _, _ = _held_by(*case, grad=False, smoothing=smoothing)
    finally:
        cross_entropy.CHUNK_ROWS = before
    whole = linear_cross_entropy(hidden, Head(weight, bias, cap), labels, weights, smoothing=smoothing)
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(free, loss)
    for got, expected in zip(grads, torch.autograd.grad(whole * 3, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=3e-6)
    chunks = [min(7, rows - start) for start in range(0, rows, 7)]
    assert calls[0] == [call for n in chunks for call in (("max", (n,)), ("sum", (4 if smoothing else 2, n)))]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_holders_in_low_precision(dtype, bound):
    """The bound is for parts of hidden's gradient that are rounded before they are added; rows are as of the whole."""
    hidden, weight, bias, labels, weights = _case(24, 16, 21, 3, dtype)
    scale = torch.tensor(512.0 / 24)
    loss, _, grads = _held_by([11, 10, 0], hidden, weight, bias, None, labels, weights, scale=scale)
    whole = linear_cross_entropy(hidden, Head(weight, bias), labels, weights, scale)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    for got, expected in zip(grads, torch.autograd.grad(whole * scale, (hidden, weight, bias)), strict=True):
        assert (got - expected).float().norm() <= bound * expected.float().norm()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_compiled_functions_of_a_part_are_those_of_the_plain_ones(smoothing):
    hidden, weight, bias, labels, weights = _case(24, 16, 21, 3, torch.float32)
    logits, places, scale = (hidden @ weight.T + bias).detach()[:, 9:], labels - 9, torch.tensor(2.0)
    results = []
    for kernel in (KERNEL, KERNEL.compiled()):
        assert isinstance(kernel, Kernel)
        top = kernel.top(logits, 5.0) + 1
        sums = kernel.sums(logits, places, top, 5.0, smoothing) + 1
        results.append([top, sums, *kernel.part(logits, places, weights, scale, 5.0, top, sums, smoothing)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_an_overflow_at_one_holder_is_seen_by_all():
    hidden, weight, bias, labels, weights = _case(6, 4, 10, 0, torch.float32)
    for bad in (float("inf"), float("nan")):
        broken = bias.detach().clone()
        broken[7] = bad
        loss, _, _ = _held_by([5, 5], hidden, weight, broken, None, labels, weights)
        assert loss.isnan()
