"""T5's table: what the encoder reads and the decoder predicts are the text when put together again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.data.stream import Sequences
from shardwright.objective.raw import Arrays
from shardwright.objective.span import Span, SpanConfig
from tests.objective.given import END, PAD, VOCABULARY, any_rows, check_shapes, rows_of_text, same_rows, setting, subset

LENGTH = 48
KINDS = ("prefix", "bert", "deshuffle", "mass", "replace", "drop", "spans")
MARK = 1099  # the first sentinel


def build(kind: str, length: int = LENGTH, *, changes: dict[str, Any] | None = None, **config: Any) -> Span:
    return Span(SpanConfig(kind=kind, **config), setting(length, **(changes or {})))  # type: ignore[arg-type]


def sides(arrays: Arrays, row: int) -> tuple[list[int], list[int]]:
    """What encoder and decoder have in a row without padding, both without the end that each has."""
    read = arrays["encoder_ids"][row][arrays["encoder_documents"][row] >= 0].tolist()
    told = arrays["labels"][row][arrays["weights"][row] > 0].tolist()
    assert read[-1] == told[-1] == END
    assert set(arrays["encoder_ids"][row][len(read) :].tolist()) <= {PAD}
    assert arrays["input_ids"][row].tolist() == [PAD, *arrays["labels"][row][:-1].tolist()]
    return read[:-1], told[:-1]


def put_back(read: list[int], told: list[int]) -> list[int]:
    """The text, from sentinels and what follows each."""
    spans: dict[int, list[int]] = {}
    for token in told:
        if token >= 1000:
            name = token
            spans[name] = []
        else:
            spans[name].append(token)
    return [part for token in read for part in (spans[token] if token >= 1000 else [token])]


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(["replace", "spans"]))
def test_spans_put_back_give_the_text(data: st.DataObject, kind: str) -> None:
    objective = build(kind)
    raw: Sequences = data.draw(any_rows(objective.raw_length(LENGTH)))
    arrays = objective.corrupt(raw)
    check_shapes(arrays, len(raw.tokens))
    for row in np.flatnonzero(raw.numbers >= 0).tolist():
        text = raw.tokens[row, : raw.lengths[row]].tolist()
        read, told = sides(arrays, row)
        assert put_back(read, told) == text
        used = [token for token in read if token >= 1000]
        assert used == list(range(MARK, MARK - len(used), -1))
        last = [token for token in told if token >= 1000]
        assert last == (used if text and read[-1] >= 1000 else [*used, MARK - len(used)])
        hidden = len(text) - len([t for t in read if t < 1000])
        assert hidden == (min(max(round(0.15 * len(text)), 1), len(text) - 1) if len(text) > 1 else 0)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(["bert", "mass", "deshuffle", "drop", "prefix"]), st.booleans())
def test_the_other_kinds_lose_nothing(data: st.DataObject, kind: str, apart: bool) -> None:
    objective = build(kind, changes={"mask_documents": apart})
    raw: Sequences = data.draw(any_rows(objective.raw_length(LENGTH)))
    arrays = objective.corrupt(raw)
    check_shapes(arrays, len(raw.tokens))
    for row in np.flatnonzero(raw.numbers >= 0).tolist():
        text = raw.tokens[row, : raw.lengths[row]].tolist()
        read, told = sides(arrays, row)
        if kind in ("bert", "mass", "deshuffle"):
            assert told == text and len(read) == len(text)
        if kind == "deshuffle":  # sorted back
            documents = np.searchsorted(raw.starts[raw.rows == row], np.arange(len(text)), "right") * apart
            for number in set(documents.tolist()):
                part = [(token, was) for token, was, d in zip(read, text, documents, strict=True) if d == number]
                assert sorted(token for token, _ in part) == sorted(was for _, was in part)
        elif kind in ("bert", "mass"):
            changed = [(new, old) for new, old in zip(read, text, strict=True) if new != old]
            assert len(changed) <= max(round(0.15 * len(text)), 1)
            assert kind == "bert" or {new for new, _ in changed} <= {MARK}
        else:  # the text is one of the ways to merge the two
            assert sorted(read + told) == sorted(text)
            rest = iter(text)
            assert all(token in rest for token in read)


def test_the_papers_lengths() -> None:
    """512 tokens of encoder: 568 of text and 114 of targets, as T5's `random_spans_helper` says, and 6 of padding."""
    objective = build("spans", 512)
    assert (objective.raw_length(512), objective.most_targets(512), objective.target_length(512)) == (568, 114, 120)
    arrays = objective.corrupt(rows_of_text(50, 568))
    assert arrays["encoder_ids"].shape == (50, 512) and arrays["labels"].shape == (50, 120)
    assert (arrays["encoder_documents"] >= 0).all()
    assert arrays["weights"][:, :114].all() and not arrays["weights"][:, 114:].any()
    assert (arrays["labels"][:, 113] == END).all() and (arrays["labels"][:, 114:] == PAD).all()
    assert (arrays["documents"] >= 0).all(), "a row of padding has something to see"


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_can_cut_the_targets(kind: str) -> None:
    """A multiple of 8, no more than 7 tokens longer than it has to be."""
    for length in range(16, 640, 31):
        objective = build(kind, length)
        assert objective.target_length(length) % 8 == 0
        assert 0 <= objective.target_length(length) - objective.most_targets(length) < 8


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_fits(kind: str) -> None:
    for length in (16, 17, 100):
        for rate in (0.15, 0.5):
            objective = build(kind, length, rate=rate)
            arrays = objective.corrupt(rows_of_text(300, objective.raw_length(length), document=12))
            for name in ("encoder_ids", "labels"):
                assert arrays[name].shape[1] == (length if name == "encoder_ids" else objective.target_length(length))
                documents = arrays["encoder_documents"] if name == "encoder_ids" else arrays["weights"] - 1
                last = (documents >= 0).sum(1) - 1
                assert (np.take_along_axis(arrays[name], last[:, None], 1) == END).all()
            if kind in ("spans", "drop"):
                assert (arrays["encoder_documents"] >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_same_in_any_company(kind: str) -> None:
    objective = build(kind)
    raw = rows_of_text(40, objective.raw_length(LENGTH), document=30, short=True)
    whole = objective.corrupt(raw)
    for rows in (np.arange(7), np.array([33, 2, 19, 6]), np.arange(40)[::-1]):
        same_rows(whole, objective.corrupt(subset(raw, rows)), rows)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_query_of_the_decoder_has_a_key(kind: str, apart: bool) -> None:
    """Tiny documents, which noise swallows whole."""
    objective = build(kind, rate=0.4, changes={"mask_documents": apart})
    arrays = objective.corrupt(rows_of_text(300, objective.raw_length(LENGTH), document=3, short=True))
    for row in range(300):
        assert set(arrays["documents"][row].tolist()) <= set(arrays["encoder_documents"][row].tolist())
    counted = arrays["documents"][arrays["weights"] > 0]
    assert (counted >= 0).all() and (apart or not counted.any())
    assert (np.diff(arrays["documents"], axis=1) >= 0).all()


def test_shares_over_a_million_tokens() -> None:
    raw = rows_of_text(2000, 511)
    for kind in ("bert", "mass", "replace", "drop"):
        objective = build(kind, 512)
        arrays = objective.corrupt(raw if kind != "drop" else rows_of_text(2000, objective.raw_length(512)))
        if kind in ("bert", "mass"):
            seen, text = arrays["encoder_ids"][:, :-1], arrays["labels"][:, :-1]
            masked, other = (seen == MARK).mean(), ((seen != MARK) & (seen != text)).mean()
            rate = round(0.15 * 511) / 511
            wanted = (0.9 * rate, 0.1 * rate * (1 - 1 / VOCABULARY)) if kind == "bert" else (rate, 0)
            assert abs(masked - wanted[0]) < 0.002 and abs(other - wanted[1]) < 0.002
        elif kind == "replace":  # a run of hidden tokens has s of them with (1 - p) p^(s-1)
            spans = (arrays["encoder_ids"] >= 1000).sum()
            assert abs(2000 * 77 / spans - 1 / (1 - 77 / 511)) < 0.02
        else:
            targets = objective.most_targets(512)
            assert arrays["weights"][:, :targets].all() and (arrays["encoder_ids"] != PAD).all()


def test_prefixes_are_cut_anywhere() -> None:
    objective = build("prefix", 64, changes={"mask_documents": False})
    arrays = objective.corrupt(rows_of_text(5000, 64))
    sizes = (arrays["encoder_documents"] >= 0).sum(1) - 1
    counts = np.bincount(sizes, minlength=64)
    assert counts[0] == 0 and len(counts) == 64 and counts[1:].min() > 5000 / 63 * 0.5


def test_many_spans_ask_for_many_sentinels() -> None:
    assert SpanConfig().specials(512) == ("pad", "sentinels:100")
    assert SpanConfig(kind="replace").specials(1024) == ("pad", "sentinels:154")
