"""Memory that is used again."""

from __future__ import annotations

import numpy as np

from shardwright.data.buffers import BufferPool


def test_buffers_are_used_again_once_dropped() -> None:
    pool = BufferPool()
    first = pool.empty((4, 5), np.int64)
    view = first.reshape(-1)[2:]
    address = first.ctypes.data
    del first
    second = pool.empty((4, 5), np.int64)
    assert second.ctypes.data != address  # a view still holds the first
    del view
    assert pool.empty((4, 5), np.int64).ctypes.data == address
    assert pool.empty((4, 5), np.int32).dtype == np.int32
