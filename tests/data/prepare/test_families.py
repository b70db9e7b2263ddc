"""Families of linked documents, and the bins they go to: brute force as the oracle."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardwright.data.prepare.families import Families, assign_bins

LINKS = st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40)


def smallest_reachable(links: list[tuple[int, int]]) -> list[int]:
    roots = list(range(30))
    for _ in range(30):
        for a, b in links:
            roots[a] = roots[b] = min(roots[a], roots[b])
    return roots


@given(LINKS, st.integers(0, 40))
def test_the_smallest_number_stands_for_a_family(links, cut):
    families = Families(30)
    for part in (links[:cut], links[cut:]):
        families.unite(np.array(part, np.int64).reshape(-1, 2))
    assert families.roots().tolist() == smallest_reachable(links)


def test_a_long_chain_given_at_once():
    families = Families(1000)
    families.unite(np.stack([np.arange(999), np.arange(1, 1000)], axis=1)[::-1])
    assert not families.roots().any()


@given(LINKS, st.integers(2, 8))
def test_bins_hold_whole_families_and_larger_ones_are_cut_in_order(links, most):
    roots = np.array(smallest_reachable(links))
    bins, num_whole, larger = assign_bins(roots, most)
    sizes = np.bincount(roots, minlength=30)[roots]
    assert ((bins < 0) == (sizes == 1)).all()
    for number in range(num_whole):
        members = np.flatnonzero(bins == number)
        assert 2 <= len(members) < 2 * most and (sizes[members] <= most).all()
    for root in np.unique(roots[(sizes > 1) & (sizes <= most)]):
        assert len(np.unique(bins[roots == root])) == 1 and bins[root] < num_whole
    cut = [np.concatenate(list(blocks.values())).tolist() for blocks in larger]
    assert cut == [np.flatnonzero(roots == root).tolist() for root in np.unique(roots[sizes > most])]
    numbers = [number for blocks in larger for number in blocks]
    assert numbers == list(range(num_whole, num_whole + len(numbers)))
    assert all((bins[members] == n).all() and len(members) <= most for b in larger for n, members in b.items())
