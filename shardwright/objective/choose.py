"""Which tokens a masked objective predicts: a fixed number a row, by tokens, by whole words, or by n-grams of either.

A *unit* is what is chosen as a whole. Units are taken in a random order as long as they fit into what is left of the
row's number, which is the rule of BERT's own `create_masked_lm_predictions`.
Shapes: B batch, T tokens; units of a row are numbered from 0, at most T of them.
"""

from __future__ import annotations

import numpy as np

from shardwright.objective.chance import Chance
from shardwright.objective.segments import counting

_ORDER, _GRAMS = 1, 2  # purposes of random numbers


def choose(chance: Chance, text: np.ndarray, begins: np.ndarray | None, budget: np.ndarray, ngrams: int) -> np.ndarray:
    """Tokens to predict, bool [B,T], at most `budget` [B] a row and as many where units fit.

    `text` bool [B,T]: what may be predicted. `begins` bool [B,T]: where words begin; None makes each token a unit.
    `ngrams`: the most units that are chosen as one; n of them with p(n) ~ 1/n (ALBERT, Lan et al. 2020).
    """
    batch, length = text.shape
    units, sizes = number_units(text, begins)
    if ngrams > 1:
        units, sizes = _join(chance, text, units, ngrams)
    keys = chance.bits(_ORDER, counting(length))
    order = np.argsort(np.where(sizes > 0, keys, ~np.uint64(0)), axis=1)
    taken = np.zeros_like(text)
    np.put_along_axis(taken, order, fill_budget(np.take_along_axis(sizes, order, 1), budget), 1)
    return text & np.take_along_axis(taken, np.maximum(units, 0), 1)


def number_units(text: np.ndarray, begins: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(unit of each token, int64 [B,T], without meaning where there is no text; tokens of each unit, int64 [B,T]).

    What is not text ends a unit, as the row does.
    """
    first = text.copy()
    if begins is not None:
        first[:, 1:] &= begins[:, 1:] | ~text[:, :-1]
    units = np.cumsum(first, axis=1) - 1
    return units, _sizes(text, units)


def _sizes(text: np.ndarray, units: np.ndarray) -> np.ndarray:
    batch, length = text.shape
    flat = (units + np.arange(batch)[:, None] * length)[text]
    return np.bincount(flat, minlength=batch * length).reshape(batch, length)


def _join(chance: Chance, text: np.ndarray, units: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring units made one: the row is cut into n-grams whose n are drawn."""
    batch, length = text.shape
    shares = 1 / np.arange(1, most + 1)
    drawn = 1 + chance.drawn(_GRAMS, counting(length), np.cumsum(shares) / shares.sum())
    starts = np.cumsum(drawn, axis=1) - drawn  # number of the unit that each n-gram begins with
    leads = np.zeros((batch, length), bool)
    rows, grams = np.nonzero(starts < length)
    leads[rows, starts[rows, grams]] = True
    begins = np.take_along_axis(leads, np.maximum(units, 0), 1)
    begins[:, 1:] &= units[:, 1:] != units[:, :-1]  # at the first token of the leading unit
    return number_units(text, begins)


def fill_budget(sizes: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """Which of the sizes [B,N] are taken, from left to right, each if it still fits into the row's budget [B].

    Zeros are not taken. Each pass takes all up to the first that does not fit, and drops what will never fit.
    """
    taken = np.zeros(sizes.shape, bool)
    left = budget.copy()
    waiting = sizes > 0
    while True:
        waiting &= sizes <= left[:, None]
        if not waiting.any():
            return taken
        total = np.cumsum(np.where(waiting, sizes, 0), axis=1)
        now = waiting & (total <= left[:, None])
        taken |= now
        waiting &= ~now
        left -= np.where(now, sizes, 0).sum(1)
