"""Rows put together from spans of other rows: the one way in which objectives move tokens.

A span is a run of consecutive places in a flat array (the source): text of raw sequences, or one special token that
was appended to them. Everything is a few numpy calls for the whole batch.
Shapes: N spans, B batch (rows), T tokens of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Spans(NamedTuple):
    """Spans in the order in which they are laid: by row, and from left to right within it."""

    rows: np.ndarray  # int64 [N], ascending
    starts: np.ndarray  # int64 [N], first place in the source
    sizes: np.ndarray  # int64 [N], 0 is allowed

    @classmethod
    def merged(cls, *parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[Spans, np.ndarray]:
        """Spans of several kinds, and which of them each was; those of one row keep the order in which they are given.

        A part is (rows [n] ascending, starts [n, k], sizes [n, k]): k spans one after the other for each n.
        """
        rows = np.concatenate([np.repeat(r, s.shape[1]) for r, s, _ in parts])
        order = np.argsort(rows, kind="stable")
        starts = np.concatenate([s.reshape(-1) for _, s, _ in parts])
        sizes = np.concatenate([s.reshape(-1) for _, _, s in parts])
        return cls(rows[order], starts[order], sizes[order]), order


class Laid(NamedTuple):
    """Where each token of the rows is from."""

    source: np.ndarray  # int64 [B,T], place in the source, `fill` where nothing lies
    span: np.ndarray  # int64 [B,T], number of the span, -1 where nothing lies
    columns: np.ndarray  # int64 [N], where each span begins in its row; beyond T where there was no room


def lay(spans: Spans, batch: int, length: int, fill: int) -> Laid:
    """The spans of each row one after the other from its first column on; what is beyond `length` falls off."""
    ends = np.cumsum(spans.sizes)
    before = ends - spans.sizes
    first = np.searchsorted(spans.rows, np.arange(batch))  # of each row
    padded = np.append(before, ends[-1:] if len(ends) else [0])
    columns = before - padded[first][spans.rows]
    sizes = np.clip(length - columns, 0, spans.sizes)
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    steps = np.arange(total) - np.repeat(ends - sizes, sizes)
    places = np.repeat(spans.rows * length + columns, sizes) + steps
    source = np.full(batch * length, fill, np.int64)
    source[places] = np.repeat(spans.starts, sizes) + steps
    span = np.full(batch * length, -1, np.int64)
    span[places] = np.repeat(np.arange(len(sizes)), sizes)
    return Laid(source.reshape(batch, length), span.reshape(batch, length), columns)


def runs(mask: np.ndarray) -> Spans:
    """The runs of true places in bool [B,T]; `starts` count through all rows."""
    batch, length = mask.shape
    edges = np.zeros((batch, length + 1), np.int8)
    edges[:, :length] = mask
    edges[:, 1:] -= mask
    rows, first = np.nonzero(edges[:, :length] == 1)
    # An edge of -1 after the last place of a run, which may be beyond the row.
    _, last = np.nonzero(edges == -1)
    return Spans(rows, rows * length + first, last - first)


def in_rows(rows: np.ndarray, batch: int) -> np.ndarray:
    """Number of each entry within its row, int64 [N]; `rows` ascending."""
    return np.arange(len(rows)) - np.searchsorted(rows, np.arange(batch))[rows]


def places_of(mask: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(columns of the first `count` true places of each row, int64 [B,P], 0 where there are fewer; which are used)."""
    rows, columns = np.nonzero(mask)
    number = in_rows(rows, len(mask))
    kept = number < count
    places = np.zeros((len(mask), count), np.int64)
    used = np.zeros((len(mask), count), bool)
    places[rows[kept], number[kept]] = columns[kept]
    used[rows[kept], number[kept]] = True
    return places, used
