"""Documents that are linked form families, and families are gathered into bins of bounded size. Part of `prepare`.

Under `duplicates`. What comes out depends on which documents are linked, not on the order of the links.
"""

from __future__ import annotations

import numpy as np


class Families:
    """Union-find over numbers 0 to count - 1, for many links at a time; the smallest number stands for its family."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count)

    def unite(self, links: np.ndarray) -> None:
        """Put the two ends of each link (int64 [links, 2]) into one family."""
        ends = links
        while len(ends):
            ends = np.sort(self._find(ends), axis=1)
            ends = ends[ends[:, 0] != ends[:, 1]]
            np.minimum.at(self._parent, ends[:, 1], ends[:, 0])  # of several for one root the others come again

    def roots(self) -> np.ndarray:
        """The smallest number of each one's family, int64 [count]."""
        return self._find(np.arange(len(self._parent)))

    def _find(self, numbers: np.ndarray) -> np.ndarray:
        roots = self._parent[numbers]
        while True:
            above = self._parent[roots]
            if (above == roots).all():
                self._parent[numbers] = roots
                return roots
            roots = above


#: Documents of each bin that is a block of one family, by the bin's number.
Blocks = dict[int, np.ndarray]


def assign_bins(roots: np.ndarray, most: int) -> tuple[np.ndarray, int, list[Blocks]]:
    """(bin of each number, int64, -1 for one alone in its family; how many bins hold whole families; larger families).

    Bins of whole families come first and hold fewer than twice `most` numbers. A family of more than `most` is cut, in
    the order of its numbers, into blocks of `most`, each a bin.
    """
    sizes = np.bincount(roots, minlength=len(roots))
    (small,) = np.nonzero((sizes > 1) & (sizes <= most))
    bin_of_root = np.full(len(roots), -1)
    bin_of_root[small] = (np.cumsum(sizes[small]) - sizes[small]) // most
    _, bin_of_root[small] = np.unique(bin_of_root[small], return_inverse=True)  # a large one may have skipped a number
    bins = bin_of_root[roots]
    num_whole = behind = int(bins.max(initial=-1)) + 1
    larger = []
    for members in _large_families(roots, sizes > most):
        blocks = {behind + n: members[n * most : (n + 1) * most] for n in range(-(-len(members) // most))}
        for number, block in blocks.items():
            bins[block] = number
        behind += len(blocks)
        larger.append(blocks)
    return bins, num_whole, larger


def _large_families(roots: np.ndarray, is_large: np.ndarray) -> list[np.ndarray]:
    """Members, ascending, of each family whose root is marked."""
    (members,) = np.nonzero(is_large[roots])
    if not len(members):
        return []
    members = members[np.argsort(roots[members], kind="stable")]
    return np.split(members, np.flatnonzero(np.diff(roots[members])) + 1)
