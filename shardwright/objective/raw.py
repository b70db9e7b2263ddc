"""What an objective is given: sequences of the stream with what begins where, or examples of several fields.

Protocols and plain tuples, so that the data room can hand over its own.
Shapes: S sequences, R raw tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

#: Arrays of a batch by name; the first axis of each is the sequences'.
Arrays = dict[str, np.ndarray]
#: `empty(shape, dtype)` as numpy's, from memory that may be used again.
Empty = Callable[[tuple[int, ...], Any], np.ndarray]


class Marks(NamedTuple):
    """Where something begins: at tokens[rows, starts], each int64, in the order of rows and then of starts."""

    rows: np.ndarray
    starts: np.ndarray

    def flat(self, length: int) -> np.ndarray:
        """The same counted through all rows of `length` tokens, ascending."""
        return self.rows * length + self.starts


class Pieces(NamedTuple):
    """Every stretch of one document in a row, in order, the one that a row begins in included."""

    rows: np.ndarray  # int64
    starts: np.ndarray  # int64, first token in the row
    documents: np.ndarray  # int64, names the document in the whole corpus


class Raw(Protocol):
    """Sequences of the stream."""

    @property
    def numbers(self) -> np.ndarray:
        """int64 [S], -1 for padding."""

    @property
    def tokens(self) -> np.ndarray:
        """Unsigned integers [S, R]; end-of-document beyond a row's length."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [S], real tokens of each row."""

    @property
    def rows(self) -> np.ndarray:
        """int64 [E], ascending: with `starts`, where documents begin."""

    @property
    def starts(self) -> np.ndarray:
        """int64 [E]: a document begins at tokens[rows, starts]."""

    @property
    def words(self) -> Marks | None:
        """Where words begin; None where the objective did not ask."""

    @property
    def sentences(self) -> Marks | None:
        """Where sentences begin, likewise."""

    @property
    def pieces(self) -> Pieces | None:
        """Which documents the rows are of; None where the objective does not ask for neighbours."""


class Ragged(NamedTuple):
    """Lists of any length, one after the other: list n is values[offsets[n] : offsets[n + 1]]."""

    values: np.ndarray  # int64
    offsets: np.ndarray  # int64 [S + 1]

    @property
    def sizes(self) -> np.ndarray:
        """Length of each list, int64 [S]."""
        return np.diff(self.offsets)


class Examples(Protocol):
    """Rows of ids with what belongs to them: a target text, or labels."""

    @property
    def numbers(self) -> np.ndarray:
        """int64 [S], -1 for padding (whose lists are empty)."""

    @property
    def sources(self) -> Ragged:
        """Ids of each source, without special tokens."""

    @property
    def targets(self) -> Ragged:
        """Ids of each target; or 1 + the class of each source, or of each of its tokens (0 for none)."""
