"""What is hidden: as many tokens as asked for, whole units, in BERT's own rule; n-grams with p(n) ~ 1/n."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.objective.chance import Chance
from shardwright.objective.choose import choose, fill_budget, number_units
from shardwright.objective.lay import runs


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 6), min_size=9, max_size=9), min_size=1, max_size=4),
    st.lists(st.integers(0, 30), min_size=4, max_size=4),
)
def test_a_budget_is_filled_as_bert_does(sizes: list[list[int]], budgets: list[int]) -> None:
    taken = fill_budget(np.array(sizes), np.array(budgets[: len(sizes)]))
    for row, budget, got in zip(sizes, budgets, taken.tolist(), strict=False):
        for size, was_taken in zip(row, got, strict=True):
            assert was_taken == (0 < size <= budget)
            budget -= size if was_taken else 0


def _case(count: int, length: int) -> tuple[Chance, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return Chance(3, np.arange(count)), rng.random((count, length)) < 0.98, rng.random((count, length)) < 0.6


def test_tokens_are_exactly_as_many_and_everywhere_alike() -> None:
    chance, text, _ = _case(2000, 500)
    chosen = choose(chance, text, None, np.full(2000, 75), 1)
    assert (chosen.sum(1) == 75).all() and not (chosen & ~text).any()
    share = chosen.sum(0) / text.sum(0)
    assert abs(share.mean() - 75 / 490) < 0.001 and share.std() < 0.012  # of a fair choice: 0.0081


def test_words_are_whole_and_fill_the_budget() -> None:
    chance, text, begins = _case(500, 300)
    chosen = choose(chance, text, begins, np.full(500, 45), 1)
    units, sizes = number_units(text, begins)
    for row in range(50):
        hidden = np.bincount(units[row][chosen[row]], minlength=300)
        assert ((hidden == 0) | (hidden == sizes[row])).all()
    assert (chosen.sum(1) == 45).mean() > 0.99 and chosen.sum(1).max() == 45


def test_lengths_of_ngrams() -> None:
    """Sparse, so that two n-grams seldom touch, and many a row, for the last ones are what still fits."""
    chance, text = Chance(3, np.arange(300)), np.ones((300, 4096), bool)
    chosen = choose(chance, text, None, np.full(300, 60), 3)
    assert (chosen.sum(1) == 60).all()
    counts = np.bincount(np.minimum(runs(chosen).sizes, 4), minlength=5)[1:4]
    shares = counts / counts.sum()
    assert np.abs(shares - np.array([6, 3, 2]) / 11).max() < 0.02


def test_ngrams_of_words_are_whole_words() -> None:
    chance, text, begins = _case(200, 300)
    chosen = choose(chance, text, begins, np.full(200, 45), 3)
    units, sizes = number_units(text, begins)
    for row in range(200):
        hidden = np.bincount(units[row][chosen[row]], minlength=300)
        assert ((hidden == 0) | (hidden == sizes[row])).all()
    assert chosen.sum(1).min() > 40 and chosen.sum(1).max() <= 45


def test_a_row_is_the_same_in_any_company() -> None:
    _, text, begins = _case(60, 200)
    for words, ngrams in ((None, 1), (begins, 1), (begins, 3)):
        whole = choose(Chance(3, np.arange(60)), text, words, np.full(60, 30), ngrams)
        rows = np.array([50, 3, 17])
        part = choose(Chance(3, rows), text[rows], None if words is None else words[rows], np.full(3, 30), ngrams)
        assert (part == whole[rows]).all()
