"""Chance without a generator: a hash of (seed, sequence number, place, purpose), the same in every batch and process.

Own code, because what a seed means must outlive versions of numpy, whose generators may change their streams. Used by
the objectives' corruption and by the data order above.
"""

from __future__ import annotations

import numpy as np

Words = np.ndarray | int

_STEP = np.uint64(0x9E3779B97F4A7C15)


def mix(*words: Words) -> np.ndarray:
    """64 hashed bits (uint64) of a tuple of integers or integer arrays, which broadcast; at least one-dimensional.

    splitmix64's finaliser (Steele, Lea, Flood 2014) over the running state.
    """
    state = np.zeros(1, np.uint64)
    for word in words:
        state = scramble((state ^ np.asarray(word).astype(np.uint64)) + _STEP)
    return state


def scramble(x: np.ndarray) -> np.ndarray:
    """Spread every bit of uint64 over all 64: splitmix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Chance:
    """Random numbers of rows. Every draw names its purpose, so that draws for two purposes are independent.

    `places` is int [n], the same for all rows, or [rows, n]; what comes back is [rows, n].
    """

    def __init__(self, seed: int, numbers: np.ndarray, evaluation: bool = False) -> None:
        """Rows by sequence number, int64 [rows]; `evaluation` draws from a stream of its own."""
        self._keys = mix(seed, int(evaluation), numbers)

    def of(self, rows: np.ndarray) -> Chance:
        """The chance of these rows, some of them perhaps several times."""
        other = Chance.__new__(Chance)
        other._keys = self._keys[rows]
        return other

    def bits(self, purpose: int, places: np.ndarray) -> np.ndarray:
        """uint64 [rows, n]."""
        key = scramble((self._keys ^ np.uint64(purpose)) + _STEP)
        return scramble((key[:, None] ^ places.astype(np.uint64)) + _STEP)

    def uniform(self, purpose: int, places: np.ndarray) -> np.ndarray:
        """float64 in [0, 1)."""
        return (self.bits(purpose, places) >> np.uint64(11)) * 2.0**-53

    def below(self, purpose: int, places: np.ndarray, limits: np.ndarray | int) -> np.ndarray:
        """int64 in [0, limit), each equally often but for 2^-32; limits below 2^32; 0 where the limit is 0."""
        bits = self.bits(purpose, places) >> np.uint64(32)
        return ((bits * np.asarray(limits).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)

    def drawn(self, purpose: int, places: np.ndarray, cumulative: np.ndarray) -> np.ndarray:
        """int64: index of a class whose probabilities add up as in `cumulative` (float64, the last one is 1)."""
        return np.minimum(cumulative.searchsorted(self.uniform(purpose, places), "right"), len(cumulative) - 1)
