"""Where noise falls in raw rows: tokens, spans, ends of documents; and other orders of a row's tokens.

Used by span.py, denoise.py and permuted.py. Rows may be shorter than the array: `lengths` says where each ends.
Shapes: B batch, L tokens of a raw row, K spans of a row at most.
"""

from __future__ import annotations

import math

import numpy as np

from shardwright.objective.chance import Chance
from shardwright.objective.lay import Spans
from shardwright.objective.segments import counting

_TOKENS, _NOISE, _TEXT, _LENGTHS, _SLOTS, _SPLIT, _ORDER, _OFFSET = range(31, 39)  # purposes of random numbers
_POSITION_BITS, _RANK_BITS = 18, 24
_LAST = np.int64(2**_RANK_BITS - 1)


def num_noise(lengths: np.ndarray, rate: float) -> np.ndarray:
    """Tokens of noise in rows of these lengths, int64: their share, at least one, and one token is always left."""
    return np.rint(lengths * rate).astype(np.int64).clip(1, np.maximum(lengths - 1, 0))


def num_spans(lengths: np.ndarray, noise: np.ndarray, mean: float) -> np.ndarray:
    """Spans of that mean length which such noise is cut into, int64, with text between them."""
    return np.rint(noise / mean).astype(np.int64).clip(1, np.minimum(noise, lengths - noise).clip(0))


def random_tokens(chance: Chance, candidates: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`counts` [B] of the candidates (bool [B,L]) of each row, all sets equally likely: bool [B,L]."""
    keys = np.where(candidates, chance.bits(_TOKENS, counting(candidates.shape[1])), ~np.uint64(0))
    order = np.argsort(keys, axis=1)
    taken = np.zeros_like(candidates)
    np.put_along_axis(taken, order, counting(candidates.shape[1]) < counts[:, None], 1)
    return taken & candidates


def random_spans(chance: Chance, lengths: np.ndarray, noise: np.ndarray, spans: np.ndarray, length: int) -> Spans:
    """Noise cut into spans, text before each: all ways to cut both are equally likely (T5, Raffel et al. 2020, 3.3.4).

    A row begins with text and ends with noise, as in T5's own `random_spans_noise_mask`.
    """
    most = max(int(spans.max(initial=0)), 1)
    sizes = _cut(chance, _NOISE, noise, spans, length, most)
    texts = _cut(chance, _TEXT, lengths - noise, spans, length, most)
    starts = np.cumsum(texts + sizes, axis=1) - sizes
    rows, number = np.nonzero(np.arange(most) < spans[:, None])
    return Spans(rows, rows * length + starts[rows, number], sizes[rows, number])


def _cut(chance: Chance, purpose: int, items: np.ndarray, parts: np.ndarray, length: int, most: int) -> np.ndarray:
    """`items` [B] cut into `parts` [B] of at least one: sizes int64 [B,most], 0 beyond the parts."""
    gaps = counting(length)
    keys = np.where(gaps < (items - 1)[:, None], chance.bits(purpose, gaps), ~np.uint64(0))
    cuts = np.argsort(keys, axis=1)[:, : most - 1] + 1
    cuts = np.sort(np.where(np.arange(most - 1) < (parts - 1)[:, None], cuts, items[:, None]), axis=1)
    return np.diff(cuts, axis=1, prepend=0, append=items[:, None])


def poisson_spans(chance: Chance, lengths: np.ndarray, noise: np.ndarray, mean: float, length: int) -> Spans:
    """Spans of Poisson lengths, 0 too, until they hold the noise; the last is cut to fit (BART, Lewis et al. 2020).

    Wherever they lie between the tokens of the text is equally likely; two may touch. A row has never more spans than
    tokens of noise: what is over of those of length 0 is dropped.
    """
    most = max(int(noise.max(initial=0)), 1)
    number = np.arange(most)
    drawn = chance.drawn(_LENGTHS, number, poisson_table(mean))
    before = np.cumsum(drawn, axis=1) - drawn
    used = (before < noise[:, None]) & (number < noise[:, None])
    sizes = np.where(used, np.minimum(drawn, noise[:, None] - before), 0)
    empty = used & (sizes == 0)
    room = sizes.sum(1) - (sizes > 0).sum(1)
    used &= ~(empty & (np.cumsum(empty, axis=1) > room[:, None]))
    counts = used.sum(1)
    # Text tokens and spans are as many slots; which of them are spans is drawn.
    slots = lengths - sizes.sum(1) + counts
    keys = np.where(counting(length) < slots[:, None], chance.bits(_SLOTS, counting(length)), ~np.uint64(0))
    order = np.argsort(keys, axis=1)[:, :most]
    slot = np.sort(np.where(number < counts[:, None], order, length), axis=1)
    sizes = np.take_along_axis(sizes, np.argsort(~used, axis=1, kind="stable"), 1)
    starts = slot - number[: slot.shape[1]] + np.cumsum(sizes, axis=1) - sizes
    rows, chosen = np.nonzero(number < counts[:, None])
    return Spans(rows, rows * length + starts[rows, chosen], sizes[rows, chosen])


def poisson_table(mean: float) -> np.ndarray:
    """Probabilities of 0, 1, ..., added up, as far as float64 tells them from 1."""
    most = int(mean + 12 * math.sqrt(mean) + 12)
    total = np.cumsum([math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) for n in range(most)])
    return np.append(total, 1.0)


def suffixes(chance: Chance, documents: np.ndarray, lengths: np.ndarray) -> Spans:
    """The rest of each document [B,L] from a place on that is drawn, at least one token after its begin."""
    batch, length = documents.shape
    changes = np.diff(documents, axis=1, prepend=-1) != 0
    rows, begins = np.nonzero(changes & (counting(length) < lengths[:, None]))
    last = np.append(rows[1:], batch) != rows
    stops = np.where(last, lengths[rows], np.append(begins[1:], 0))
    cuts = begins + 1 + chance.of(rows).below(_SPLIT, begins[:, None], np.maximum(stops - begins - 1, 0)[:, None])[:, 0]
    kept = cuts < stops
    return Spans(rows[kept], (rows * length + cuts)[kept], (stops - cuts)[kept])


def shuffled(chance: Chance, groups: np.ndarray, documents: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Places of each row in another order, int64 [B,L]: groups of tokens [B,L] are shuffled inside their document.

    `fixed` bool [B,L] stays at the end of its document.
    """
    ranks = (chance.bits(_ORDER, groups) >> np.uint64(64 - _RANK_BITS)).astype(np.int64)
    return _ordered(ranks, documents, fixed)


def rotated(chance: Chance, documents: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Places of each row in another order, int64 [B,L]: each document begins at a random token, and wraps round."""
    batch, length = documents.shape
    starts = np.flatnonzero(np.diff(documents, axis=1, prepend=documents[:, :1] - 1).reshape(-1))
    sizes = np.diff(starts, append=batch * length)
    movable = np.add.reduceat((~fixed).reshape(-1).astype(np.int64), starts)
    offsets = chance.of(starts // length).below(_OFFSET, (starts % length)[:, None], movable[:, None])[:, 0]
    step = counting(batch * length) - np.repeat(starts, sizes)
    ranks = (step - np.repeat(offsets, sizes)) % np.repeat(np.maximum(movable, 1), sizes)
    return _ordered(ranks.reshape(batch, length), documents, fixed)


def _ordered(ranks: np.ndarray, documents: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Places sorted by document, then by rank, then as they were."""
    assert documents.shape[1] <= 2**_POSITION_BITS
    keys = (documents.astype(np.int64) << _RANK_BITS) + np.where(fixed, _LAST, ranks)
    return np.argsort((keys << _POSITION_BITS) + counting(documents.shape[1]), axis=1)
