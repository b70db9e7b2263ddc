"""Rows put together from spans, against loops over single tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.objective.lay import Spans, lay, places_of, runs

BATCH, LENGTH, FILL = 3, 9, 999

spans = st.lists(st.tuples(st.integers(0, BATCH - 1), st.integers(0, 90), st.integers(0, 6)), max_size=12)


@settings(max_examples=200, deadline=None)
@given(spans)
def test_lay_equals_a_loop(found: list[tuple[int, int, int]]) -> None:
    found = sorted(found, key=lambda span: span[0])
    rows: list[list[int]] = [[] for _ in range(BATCH)]
    owners: list[list[int]] = [[] for _ in range(BATCH)]
    columns = []
    for number, (row, start, size) in enumerate(found):
        columns.append(len(rows[row]))
        rows[row] += range(start, start + size)
        owners[row] += [number] * size
    laid = lay(Spans(*np.array(found, np.int64).reshape(-1, 3).T), BATCH, LENGTH, FILL)
    assert laid.source.tolist() == [(row + [FILL] * LENGTH)[:LENGTH] for row in rows]
    assert laid.span.tolist() == [(row + [-1] * LENGTH)[:LENGTH] for row in owners]
    assert laid.columns.tolist() == columns


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4), st.integers(1, 5))
def test_runs_and_places_of_a_mask(found: list[list[bool]], count: int) -> None:
    mask = np.array(found)
    again = np.zeros(mask.size, int)
    spans = runs(mask)
    for start, size in zip(spans.starts, spans.sizes, strict=True):
        assert again[start - 1 : start].sum() == 0 or start % 7 == 0  # runs do not touch inside a row
        again[start : start + size] += 1
    assert (again.reshape(mask.shape) == mask).all() and (spans.rows == spans.starts // 7).all()
    places, used = places_of(mask, count)
    for row, wanted in enumerate(found):
        columns = [column for column, true in enumerate(wanted) if true][:count]
        assert places[row].tolist() == columns + [0] * (count - len(columns))
        assert used[row].tolist() == [True] * len(columns) + [False] * (count - len(columns))


def test_spans_of_several_kinds_keep_their_order_within_a_row() -> None:
    one = np.array([[10], [20]]), np.array([[1], [1]])
    two = np.array([[30, 40], [50, 60]]), np.array([[2, 3], [4, 5]])
    merged, order = Spans.merged((np.array([0, 1]), *one), (np.array([0, 0]), *two))
    assert merged.rows.tolist() == [0, 0, 0, 0, 0, 1]
    assert merged.starts.tolist() == [10, 30, 40, 50, 60, 20]
    assert order.tolist() == [0, 2, 3, 4, 5, 1]
