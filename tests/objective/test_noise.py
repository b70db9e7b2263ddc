"""Noise over a million tokens: how much, how long, where; and orders that are orders."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.objective import noise
from shardwright.objective.chance import Chance
from shardwright.objective.lay import Spans

LENGTH = 500


def _check(spans: Spans, lengths: np.ndarray, length: int) -> np.ndarray:
    """bool [B,L] of the noise; spans lie in their row, in order, and do not overlap."""
    batch = len(lengths)
    assert (np.diff(spans.rows) >= 0).all()
    stops = spans.starts + spans.sizes
    assert (spans.starts >= spans.rows * length).all() and (stops <= spans.rows * length + lengths[spans.rows]).all()
    assert (stops[:-1] <= spans.starts[1:]).all()
    mask = np.zeros(batch * length + 1, np.int64)
    np.add.at(mask, spans.starts, 1)
    np.add.at(mask, stops, -1)
    return np.cumsum(mask)[:-1].reshape(batch, length) > 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.floats(0.05, 0.6), st.floats(1, 5), st.integers(0, 99))
def test_random_spans_of_rows_of_any_length(sizes: list[int], rate: float, mean: float, seed: int) -> None:
    lengths, chance = np.array(sizes), Chance(seed, np.arange(len(sizes)))
    counts = noise.num_noise(lengths, rate)
    number = noise.num_spans(lengths, counts, mean)
    spans = noise.random_spans(chance, lengths, counts, number, 40)
    mask = _check(spans, lengths, 40)
    assert (mask.sum(1) == counts).all() and (spans.sizes > 0).all()
    assert np.bincount(spans.rows, minlength=len(sizes)).tolist() == number.tolist()
    for row, length in enumerate(sizes):
        if counts[row]:
            assert not mask[row, 0] and mask[row, length - 1]
            assert counts[row] == min(max(round(length * rate), 1), length - 1)


def test_random_spans_have_the_lengths_of_a_random_cut() -> None:
    """Of n items in k parts, one part has size s in C(n-s-1, k-2) / C(n-1, k-1) of all cuts."""
    lengths, chance = np.full(2000, LENGTH), Chance(0, np.arange(2000))
    spans = noise.random_spans(chance, lengths, np.full(2000, 75), np.full(2000, 25), LENGTH)
    counts = np.bincount(spans.sizes, minlength=10)[1:10] / len(spans.sizes)
    wanted = [math.comb(75 - s - 1, 23) / math.comb(74, 24) for s in range(1, 10)]
    assert np.abs(counts - wanted).max() < 0.006
    assert spans.sizes.mean() == 3.0
    mask = _check(spans, lengths, LENGTH)[:, 20:-20]
    assert mask.mean(0).std() < 0.02 and abs(mask.mean() - 0.15) < 0.01


def test_poisson_spans_over_a_million_tokens() -> None:
    lengths, chance = np.full(2100, LENGTH), Chance(0, np.arange(2100))
    spans = noise.poisson_spans(chance, lengths, np.full(2100, 150), 3.0, LENGTH)
    mask = _check(spans, lengths, LENGTH)
    assert (mask.sum(1) == 150).all()  # exactly 30 % of every row
    last = np.append(spans.rows[1:], 2100) != spans.rows
    # The one that reaches the row's noise is longer than others are, and was cut: the rest are as drawn but for that.
    sizes = spans.sizes[~last]
    wanted = [math.exp(-3) * 3**n / math.factorial(n) for n in range(8)]
    counts = np.bincount(sizes, minlength=20)[:8] / len(sizes)
    assert np.abs(counts - wanted).max() < 0.01
    assert abs(sizes.mean() - 3) < 0.06 and abs(sizes.var() - 3) < 0.12
    inside = mask[:, 30:-30].mean(0)
    assert inside.std() < 0.02 and abs(inside.mean() - 0.3) < 0.01


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.sampled_from([1.0, 3.0]), st.integers(0, 99))
def test_poisson_spans_of_rows_of_any_length_leave_room_for_their_marks(
    sizes: list[int], mean: float, seed: int
) -> None:
    lengths, chance = np.array(sizes), Chance(seed, np.arange(len(sizes)))
    counts = noise.num_noise(lengths, 0.3)
    spans = noise.poisson_spans(chance, lengths, counts, mean, 40)
    mask = _check(spans, lengths, 40)
    assert (mask.sum(1) <= counts).all()
    assert (np.bincount(spans.rows, minlength=len(sizes)) <= mask.sum(1)).all()


def test_poisson_table_adds_up() -> None:
    for mean in (1.0, 3.0, 40.0):
        table = noise.poisson_table(mean)
        assert table[-1] == 1.0 and table[-2] > 1 - 1e-12 and (np.diff(table) >= -1e-12).all()


def test_random_tokens_are_exactly_as_many() -> None:
    candidates = np.random.default_rng(0).random((2000, LENGTH)) < 0.9
    taken = noise.random_tokens(Chance(0, np.arange(2000)), candidates, np.full(2000, 75))
    assert (taken.sum(1) == 75).all() and not (taken & ~candidates).any()
    assert (taken.sum(0) / candidates.sum(0)).std() < 0.012
    few = noise.random_tokens(Chance(0, np.arange(2)), candidates[:2], np.array([0, 1]))
    assert few.sum(1).tolist() == [0, 1]


def _documents() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    begins = rng.random((300, 60)) < 0.06
    begins[:, 0] = False
    ends = np.zeros_like(begins)
    ends[:, :-1] = begins[:, 1:]
    return np.cumsum(begins, axis=1), ends


@pytest.mark.parametrize("kind", ["shuffled", "rotated"])
def test_orders_keep_to_documents_and_their_ends(kind: str) -> None:
    documents, ends = _documents()
    chance = Chance(0, np.arange(300))
    if kind == "shuffled":
        order = noise.shuffled(chance, np.arange(60), documents, ends)
    else:
        order = noise.rotated(chance, documents, ends)
    assert (np.sort(order, axis=1) == np.arange(60)).all()
    assert (np.take_along_axis(documents, order, 1) == documents).all()
    assert (order[ends] == np.nonzero(ends)[1]).all()
    moved = (order != np.arange(60)).mean()
    assert moved > 0.7
    if kind == "rotated":
        for row in range(300):
            for document in range(documents[row].max() + 1):
                places = order[row][(documents[row] == document) & ~ends[row]]
                turns = np.sort(places)
                assert any((np.roll(turns, -k) == places).all() for k in range(max(len(turns), 1)))


def test_groups_are_shuffled_whole_and_evenly() -> None:
    groups = np.repeat(np.arange(3), 4)[None].repeat(6000, 0)
    order = noise.shuffled(Chance(0, np.arange(6000)), groups, np.zeros((6000, 12), int), np.zeros((6000, 12), bool))
    shuffled = np.take_along_axis(groups, order, 1)
    assert (shuffled.reshape(6000, 3, 4) == shuffled.reshape(6000, 3, 4)[..., :1]).all()
    assert (np.diff(order.reshape(6000, 3, 4), axis=2) == 1).all()
    kinds = np.bincount(shuffled[:, 0] * 3 + shuffled[:, 4], minlength=9)
    assert (kinds[[1, 2, 3, 5, 6, 7]] > 6000 / 6 * 0.88).all()


def test_suffixes_leave_each_document_its_beginning() -> None:
    documents, _ = _documents()
    lengths = np.full(300, 60)
    spans = noise.suffixes(Chance(0, np.arange(300)), documents, lengths)
    mask = _check(spans, lengths, 60)
    shares = []
    for row in range(300):
        for document in range(documents[row].max() + 1):
            hidden = mask[row][documents[row] == document]
            assert not hidden[0] and (len(hidden) == 1 or hidden[-1]) and (np.diff(hidden.astype(int)) >= 0).all()
            shares.append(hidden[1:-1].mean() if len(hidden) > 20 else 0.5)
    assert abs(np.mean(shares) - 0.5) < 0.03
