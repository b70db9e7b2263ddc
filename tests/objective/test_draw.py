"""Tokens drawn from a softmax: the right distribution, the same draws whoever holds the vocabulary, edges."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from shardwright.model.dropout import token_keys, uniform
from shardwright.objective.cross_entropy import Head
from shardwright.objective.draw import draw


def chance(rows: int, places: int, *, seed: int = 0, step: int = 0, first: int = 0) -> Tensor:
    """The numbers of places 0, 1, ... of sequences `first`, `first` + 1, ..."""
    return uniform(token_keys(seed, step, torch.arange(first, first + rows), torch.arange(places)), purpose=1)


def likelihood(drawn: Tensor, shares: Tensor) -> float:
    """How likely it is that classes, drawn with these shares, are at least so far off (Pearson's chi-square test)."""
    expected = shares.double() * drawn.numel()
    observed = torch.bincount(drawn.flatten(), minlength=len(shares))
    statistic = ((observed - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(shares) - 1) / 2, dtype=torch.float64), statistic / 2))


def even(classes: int) -> Tensor:
    return torch.full((classes,), 1 / classes)


def test_numbers_are_uniform() -> None:
    numbers = chance(400, 250, seed=3, step=7)
    assert likelihood((numbers * 100).long(), even(100)) > 1e-3
    assert numbers.unique().numel() > 0.9999 * numbers.numel()


@pytest.mark.parametrize("changed", [{"seed": 4}, {"step": 8}, {"first": 100}])
def test_numbers_of_another_step_seed_or_sequence_are_independent(changed: dict[str, int]) -> None:
    one, two = chance(400, 50, seed=3, step=7), chance(400, 50, **{"seed": 3, "step": 7, **changed})
    pairs = (one * 10).long() * 10 + (two * 10).long()
    assert likelihood(pairs, even(100)) > 1e-3


def test_numbers_are_not_those_of_dropout() -> None:
    keys = token_keys(3, 7, torch.arange(400), torch.arange(50)).double() / 2**32
    pairs = (chance(400, 50, seed=3, step=7) * 10).long() * 10 + (keys * 10).long()
    assert likelihood(pairs, even(100)) > 1e-3


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_what_is_drawn_has_the_softmax_as_its_distribution(softcap: float | None) -> None:
    """A chi-square test over 200,000 draws from one row of logits."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(37, 8, generator=generator), torch.randn(37, generator=generator)
    hidden = torch.randn(8, generator=generator)
    drawn = draw(hidden.expand(400, 500, 8), Head(weight, bias, softcap), chance(400, 500))
    logits = weight @ hidden + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    assert likelihood(drawn, logits.double().softmax(0)) > 1e-3
    assert likelihood(drawn, (logits.double() * 1.05).softmax(0)) < 1e-3  # the test can fail


class Holders:
    """Threads that hold consecutive rows of a head each."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.given = sizes, [torch.zeros(())] * len(sizes)
        self.barrier = threading.Barrier(len(sizes))

    def draw(self, hidden: Tensor, head: Head, uniform: Tensor) -> list[Tensor]:
        answers: list[Tensor] = [torch.zeros(())] * len(self.sizes)

        def work(rank: int) -> None:
            start = sum(self.sizes[:rank])
            rows = slice(start, start + self.sizes[rank])
            bias = None if head.bias is None else head.bias[rows]
            own = Head(head.weight[rows], bias, head.softcap, Holder(self, rank, start))
            answers[rank] = draw(hidden, own, uniform)

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

    @property
    def ranks(self) -> int:
        return len(self.holders.sizes)

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
    hidden, uniform = torch.randn(20, 100, 8, generator=generator), chance(20, 100)
    whole = draw(hidden, Head(weight, bias, softcap), uniform)
    answers = Holders(sizes).draw(hidden, Head(weight, bias, softcap), uniform)
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert torch.equal(answers[0], whole)


def test_edges() -> None:
    """A number next to 1, tokens of no probability, one token alone, half precision."""
    weight = torch.tensor([[-1e4], [0.0], [0.0], [-1e4]])
    uniform = torch.tensor([0.0, 0.25, 0.5 - 1e-9, 0.5, 1 - 2.0**-33], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        hidden = torch.ones(5, 1, dtype=dtype)
        assert draw(hidden, Head(weight.to(dtype)), uniform).tolist() == [1, 1, 1, 2, 2]
    assert draw(torch.ones(5, 1), Head(torch.zeros(1, 1)), uniform).tolist() == [0] * 5
