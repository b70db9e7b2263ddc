"""Tokens drawn from a softmax: the right distribution, the same draws whoever holds the vocabulary, edges."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from shardwright.model.dropout import mix, token_keys, uniform
from shardwright.objective.cross_entropy import Head
from shardwright.objective.draw import draw


def keys(rows: int, places: int, *, seed: int = 0, step: int = 0, first: int = 0) -> Tensor:
    """Of places 0, 1, ... of sequences `first`, `first` + 1, ..."""
    return mix(token_keys(seed, step, torch.arange(first, first + rows), torch.arange(places)) ^ 0xABCDEF)


def numbers(rows: int, places: int, tokens: int, **fields: int) -> Tensor:
    return uniform(keys(rows, places, **fields).flatten(), torch.arange(tokens), torch.float64)


def likelihood(drawn: Tensor, shares: Tensor) -> float:
    """How likely it is that classes, drawn with these shares, are at least so far off (Pearson's chi-square test)."""
    expected = shares.double() * drawn.numel()
    observed = torch.bincount(drawn.flatten(), minlength=len(shares))
    statistic = ((observed - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(shares) - 1) / 2, dtype=torch.float64), statistic / 2))


def even(classes: int) -> Tensor:
    return torch.full((classes,), 1 / classes)


def test_numbers_are_uniform() -> None:
    found = numbers(40, 25, 100, seed=3, step=7)
    assert 0 < found.min() < found.max() < 1
    assert likelihood((found * 100).long(), even(100)) > 1e-3
    assert likelihood((found[found < 1e-2] * 1e4).long(), even(100)) > 1e-3
    assert found.unique().numel() > 0.999 * found.numel()
    small = found < 1e-3
    narrow = uniform(keys(40, 25, seed=3, step=7).flatten(), torch.arange(100), torch.float32)
    torch.testing.assert_close(narrow[small].double(), found[small], rtol=1e-7, atol=0)


@pytest.mark.parametrize("changed", [{"seed": 4}, {"step": 8}, {"first": 10}])
def test_numbers_of_another_step_seed_or_sequence_are_independent(changed: dict[str, int]) -> None:
    one, two = numbers(40, 25, 30, seed=3, step=7), numbers(40, 25, 30, **{"seed": 3, "step": 7, **changed})
    assert likelihood((one * 10).long() * 10 + (two * 10).long(), even(100)) > 1e-3


def test_numbers_of_neighbours_are_independent() -> None:
    found = (numbers(40, 25, 30).view(40, 25, 30) * 10).long()
    for one, two in ((found[1:], found[:-1]), (found[:, 1:], found[:, :-1]), (found[:, :, 1:], found[:, :, :-1])):
        assert likelihood(one * 10 + two, even(100)) > 1e-3


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_what_is_drawn_has_the_softmax_as_its_distribution(softcap: float | None) -> None:
    """A chi-square test over 200,000 draws from one row of logits."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(37, 8, generator=generator), torch.randn(37, generator=generator)
    hidden = torch.randn(8, generator=generator)
    drawn = draw(hidden.expand(400, 500, 8), Head(weight, bias, softcap), keys(400, 500), uniform)
    logits = weight @ hidden + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    assert likelihood(drawn, logits.double().softmax(0)) > 1e-3
    assert likelihood(drawn, (logits.double() * 1.05).softmax(0)) < 1e-3  # the test can fail


def test_a_large_vocabulary() -> None:
    """Each of 20,000 tokens is as rare as the others: their hundreds are."""
    drawn = draw(torch.ones(40, 50, 1), Head(torch.zeros(20_000, 1)), keys(40, 50), uniform)
    assert likelihood(drawn // 200, even(100)) > 1e-3


def test_what_rounding_does_to_a_logit_seldom_changes_a_draw() -> None:
    """As seldom as two tokens come in together: with the bounds of a cumulative sum it were one in hundreds."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(20, 50, 64, generator=generator), torch.randn(4000, 64, generator=generator) / 8
    drawn = draw(hidden, Head(weight), keys(20, 50), uniform)
    for noise in (1e-6, 1e-5):
        other = draw(
            hidden * (1 + noise * torch.randn(hidden.shape, generator=generator)), Head(weight), keys(20, 50), uniform
        )
        assert (drawn != other).sum() <= 1000 * noise * 30 + 1


class Holders:
    """Threads that hold consecutive rows of a head each."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.given = sizes, [torch.zeros(())] * len(sizes)
        self.barrier = threading.Barrier(len(sizes))

    def draw(self, hidden: Tensor, head: Head, places: Tensor) -> list[Tensor]:
        answers: list[Tensor] = [torch.zeros(())] * len(self.sizes)

        def work(rank: int) -> None:
            start = sum(self.sizes[:rank])
            rows = slice(start, start + self.sizes[rank])
            bias = None if head.bias is None else head.bias[rows]
            own = Head(head.weight[rows], bias, head.softcap, Holder(self, rank, start))
            answers[rank] = draw(hidden, own, places, uniform)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(self.sizes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return answers


class Holder:
    """One of them."""

    def __init__(self, holders: Holders, rank: int, start: int) -> None:
        self.holders, self.rank, self.start = holders, rank, start

    def max(self, x: Tensor) -> Tensor:
        return self._all(x).amax(0)

    def sum(self, x: Tensor) -> Tensor:
        return self._all(x).sum(0)

    def _all(self, x: Tensor) -> Tensor:
        self.holders.given[self.rank] = x
        self.holders.barrier.wait(30)
        every = torch.stack(self.holders.given)
        self.holders.barrier.wait(30)
        return every


@pytest.mark.parametrize("sizes", [[37], [20, 17], [13, 13, 11], [30, 7, 0]])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_holders_of_a_part_each_draw_what_one_would(sizes: list[int], softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(37, 8, generator=generator) * 3, torch.randn(37, generator=generator)
    hidden, places = torch.randn(20, 100, 8, generator=generator), keys(20, 100)
    whole = draw(hidden, Head(weight, bias, softcap), places, uniform)
    answers = Holders(sizes).draw(hidden, Head(weight, bias, softcap), places)
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert torch.equal(answers[0], whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tokens_of_no_probability_are_never_drawn(dtype: torch.dtype) -> None:
    weight = torch.tensor([[-1e4], [0.0], [0.0], [-1e4]], dtype=dtype)
    drawn = draw(torch.ones(50, 40, 1, dtype=dtype), Head(weight), keys(50, 40), uniform)
    assert set(drawn.flatten().tolist()) == {1, 2}
    assert draw(torch.ones(1, 5, 1, dtype=dtype), Head(weight[:1]), keys(1, 5), uniform).tolist() == [[0] * 5]
