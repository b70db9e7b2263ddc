"""What the tests of objectives are given: rows made up of numbers that name their places, and settings."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from shardwright.data.stream import Sequences
from shardwright.objective.raw import Arrays, Marks, Pieces
from shardwright.objective.setting import Setting

END, MASK, CLS, SEP, PAD, BOS = 0, 901, 902, 903, 904, 905
SPECIALS = {
    "end": END, "mask": MASK, "cls": CLS, "sep": SEP, "pad": PAD, "bos": BOS,
    "first_sentinel": 1099, "last_sentinel": 1000,
}  # fmt: skip
VOCABULARY = 900


def setting(length: int, **changes: Any) -> Setting:
    return Setting(length, **{"seed": 7, "vocab_size": VOCABULARY, "specials": SPECIALS, **changes})


def rows_of_text(
    count: int, length: int, *, seed: int = 0, document: int = 200, short: bool = False, first: int = 0
) -> Sequences:
    """Rows of random tokens with documents of that mean length, words of 1 to 4 tokens and sentences of 8 on average.

    `short`: rows end anywhere, and every seventh is padding. Every row is the same whatever is asked beside it.
    """
    tokens = np.zeros((count, length), np.uint16)
    lengths = np.full(count, length)
    numbers = np.arange(first, first + count)
    marks: dict[str, list[tuple[int, int]]] = {"documents": [], "words": [], "sentences": []}
    names = []
    for row in range(count):
        rng = np.random.default_rng([seed, first + row])
        tokens[row] = 1 + rng.permutation(VOCABULARY - 1)[:length]  # none twice, so that each names its place
        if short:
            lengths[row] = 0 if (first + row) % 7 == 6 else rng.integers(1, length + 1)
            numbers[row] = -1 if lengths[row] == 0 else numbers[row]
        begins = np.flatnonzero(rng.random(length) < 1 / document)
        begins = begins[(begins < lengths[row]) & (begins > 0)]
        tokens[row, begins - 1] = END
        tokens[row, lengths[row] :] = END
        words = np.union1d(begins, np.flatnonzero(rng.random(length) < 0.6))
        sentences = np.union1d(begins, np.flatnonzero(rng.random(length) < 1 / 8))
        for kind, places in (("documents", begins), ("words", words), ("sentences", sentences)):
            marks[kind] += [(row, int(place)) for place in places if place < lengths[row]]
        if lengths[row]:
            names += [(row, 0, 1000 * (first + row))]
            names += [(row, int(place), 1000 * (first + row) + 1 + n) for n, place in enumerate(begins)]

    def columns(found: list, width: int) -> list[np.ndarray]:
        return list(np.array(found, np.int64).reshape(-1, width).T)

    return Sequences(
        numbers, tokens, lengths, *columns(marks["documents"], 2), Marks(*columns(marks["words"], 2)),
        Marks(*columns(marks["sentences"], 2)), Pieces(*columns(names, 3)),
    )  # fmt: skip


def subset(raw: Sequences, rows: np.ndarray) -> Sequences:
    """Some rows of a batch, in any order."""
    where = np.full(len(raw.tokens), -1)
    where[rows] = np.arange(len(rows))

    def moved(mark_rows: np.ndarray, *columns: np.ndarray) -> list[np.ndarray]:
        kept = where[mark_rows] >= 0
        order = np.argsort(where[mark_rows][kept], kind="stable")
        return [column[kept][order] for column in (where[mark_rows], *columns)]

    assert raw.words and raw.sentences and raw.pieces
    return Sequences(
        raw.numbers[rows], raw.tokens[rows], raw.lengths[rows], *moved(raw.rows, raw.starts),
        Marks(*moved(*raw.words)), Marks(*moved(*raw.sentences)), Pieces(*moved(*raw.pieces)),
    )  # fmt: skip


@st.composite
def any_rows(draw: st.DrawFn, length: int) -> Sequences:
    """A few rows of `length` raw tokens with documents of any length; some short, some padding."""
    count, seed = draw(st.integers(1, 6)), draw(st.integers(0, 999))
    return rows_of_text(
        count, length, seed=seed, document=draw(st.sampled_from([3, 20, 1000])), short=draw(st.booleans())
    )


def check_shapes(arrays: Arrays, batch: int) -> None:
    """Types and first axis, and padding that counts nothing."""
    for name, array in arrays.items():
        assert len(array) == batch, name
        wanted = {"weights": "float32", "documents": "int32"}.get(name.split("_")[-1], "int64")
        assert array.dtype == wanted, (name, array.dtype)
    nobody = arrays["sequence"] < 0
    for name, array in arrays.items():
        if name.endswith("weights"):
            assert (array[nobody] == 0).all(), name
            assert ((array == 0) | (array == 1)).all()


def same_rows(whole: Arrays, part: Arrays, rows: np.ndarray) -> None:
    """A batch of some rows is those rows of the whole batch."""
    assert whole.keys() == part.keys()
    for name, array in whole.items():
        assert (array[rows] == part[name]).all(), name
