"""XLNet's rows: a fixed number of predictions, in spans, in an order that is one."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings

from shardwright.data.stream import Sequences
from shardwright.objective.lay import runs
from shardwright.objective.permuted import Permuted, PermutedConfig
from tests.objective.given import CLS, PAD, SEP, any_rows, check_shapes, rows_of_text, same_rows, setting, subset

LENGTH = 64


def build(length: int = LENGTH, **config: Any) -> Permuted:
    return Permuted(PermutedConfig(**config), setting(length))


@settings(max_examples=60, deadline=None)
@given(any_rows(LENGTH - 2))
def test_rows(raw: Sequences) -> None:
    arrays = build().corrupt(raw)
    check_shapes(arrays, len(raw.tokens))
    for row, length in enumerate(raw.lengths.tolist()):
        rest = [PAD] * (LENGTH - 2 - length)
        assert arrays["input_ids"][row].tolist() == [*raw.tokens[row, :length].tolist(), SEP, CLS, *rest]
        used = arrays["weights"][row] > 0
        places, order = arrays["places"][row][used], arrays["order"][row]
        assert len(places) == length // 6 and (places < length).all() and (np.diff(places) > 0).all()
        assert sorted(order[places].tolist()) == list(range(1, len(places) + 1))
        assert order.sum() == order[places].sum()
        assert (arrays["labels"][row][used] == raw.tokens[row, places]).all()


def test_over_a_million_tokens() -> None:
    arrays = build(512).corrupt(rows_of_text(2000, 510))
    assert arrays["places"].shape == (2000, 85) and arrays["weights"].all()  # XLNet's own number for rows of 512
    spans = runs(arrays["order"] > 0)
    counts = np.bincount(np.minimum(spans.sizes, 9), minlength=10)[1:6]
    wanted = 1 / np.arange(1, 6) / (1 / np.arange(1, 6)).sum()
    assert np.abs(counts / counts.sum() - wanted).max() < 0.03  # some spans touch, the last is shorter
    columns = (arrays["order"] > 0).mean(0)
    assert columns[510:].max() == 0 and abs(columns[20:480].mean() - 1 / 6) < 0.003
    ranks = np.take_along_axis(arrays["order"], arrays["places"], 1)
    assert abs(np.corrcoef(ranks.reshape(-1), arrays["places"].reshape(-1))[0, 1]) < 0.01


def test_rows_are_the_same_in_any_company() -> None:
    raw = rows_of_text(40, LENGTH - 2, document=30, short=True)
    whole = build().corrupt(raw)
    for rows in (np.arange(7), np.array([33, 2, 19, 6]), np.arange(40)[::-1]):
        same_rows(whole, build().corrupt(subset(raw, rows)), rows)
