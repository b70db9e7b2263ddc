"""Memory for batches, used again once nobody holds it: fresh pages cost more than the work that fills them.

Used by `loader` and `workers`. Nobody has to hand anything back: an array is free when the pool's reference to
it is the only one left, and tensors and views made of it count as references.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

_KEPT = 8  # arrays of one shape and type: what is in use, in the queue and being filled


def _references(arrays: list[np.ndarray], place: int) -> int:
    return sys.getrefcount(arrays[place])


class BufferPool:
    """`empty(shape, dtype)` like numpy's, from arrays that were dropped."""

    def __init__(self) -> None:
        self._arrays: dict[tuple, list[np.ndarray]] = {}
        # What an array that only a list holds counts; measured, as it differs between versions of Python.
        self._alone = _references([np.empty(0)], 0)
        # Without the interpreter lock a count may be out of date.
        self._reuse = getattr(sys, "_is_gil_enabled", lambda: True)()

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An uninitialised array that nobody else holds."""
        kept = self._arrays.setdefault((shape, np.dtype(dtype)), [])
        for place in range(len(kept)):
            if _references(kept, place) == self._alone:
                return kept[place]
        array = np.empty(shape, dtype)
        if self._reuse and len(kept) < _KEPT:
            kept.append(array)
        return array
