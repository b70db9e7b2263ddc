"""BART's damage: sentences put back, masks filled in and turned documents turned back give the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.data.stream import Sequences, Stream, Wanted
from shardwright.objective.denoise import Denoise, DenoiseConfig
from shardwright.objective.raw import Arrays
from tests.objective.given import BOS, END, MASK, PAD, any_rows, check_shapes, rows_of_text, same_rows, setting, subset

LENGTH = 48


def build(*damage: str, length: int = LENGTH, changes: dict[str, Any] | None = None, **config: Any) -> Denoise:
    return Denoise(DenoiseConfig(damage=list(damage), **config), setting(length, **(changes or {})))  # type: ignore[arg-type]


def encoder_text(arrays: Arrays, row: int) -> list[int]:
    """What the encoder has between <s> and </s>."""
    read = arrays["encoder_ids"][row][arrays["encoder_documents"][row] >= 0].tolist()
    assert read[0] == BOS and read[-1] == END
    assert set(arrays["encoder_ids"][row][len(read) :].tolist()) <= {PAD}
    return read[1:-1]


def check_decoder(arrays: Arrays, raw: Sequences) -> None:
    """<s> text </s>, told from </s> <s> text."""
    for row in np.flatnonzero(raw.numbers >= 0).tolist():
        text = raw.tokens[row, : raw.lengths[row]].tolist()
        told = arrays["labels"][row][arrays["weights"][row] > 0].tolist()
        assert told == [BOS, *text, END]
        assert arrays["input_ids"][row].tolist() == [END, *arrays["labels"][row][:-1].tolist()]
        assert set(arrays["documents"][row].tolist()) <= set(arrays["encoder_documents"][row].tolist())


def documents_of(raw: Sequences, row: int) -> list[slice]:
    edges = [0, *(start for start in raw.starts[raw.rows == row].tolist() if start), int(raw.lengths[row])]
    return [slice(*edge) for edge in zip(edges, edges[1:], strict=False)]


@settings(max_examples=50, deadline=None)
@given(any_rows(LENGTH - 2), st.sampled_from([3.0, 1.0]))
def test_masks_filled_in_give_the_text(raw: Sequences, mean: float) -> None:
    arrays = build("infill", mean=mean).corrupt(raw)
    check_shapes(arrays, len(raw.tokens))
    check_decoder(arrays, raw)
    for row in np.flatnonzero(raw.numbers >= 0).tolist():
        text, read = raw.tokens[row, : raw.lengths[row]].tolist(), encoder_text(arrays, row)
        kept = [token for token in read if token != MASK]
        rest = iter(text)
        assert all(token in rest for token in kept)
        hidden = len(text) - len(kept)
        assert hidden <= min(max(round(0.3 * len(text)), 1), max(len(text) - 1, 0))
        assert len(read) - len(kept) <= hidden


@settings(max_examples=50, deadline=None)
@given(any_rows(LENGTH - 2))
def test_sentences_put_back_give_the_text(raw: Sequences) -> None:
    arrays = build("permute").corrupt(raw)
    check_decoder(arrays, raw)
    assert raw.sentences is not None
    for row in np.flatnonzero(raw.numbers >= 0).tolist():
        text, read = raw.tokens[row].tolist(), encoder_text(arrays, row)
        begins = set(raw.sentences.starts[raw.sentences.rows == row].tolist())
        for part in documents_of(raw, row):
            last = part.stop if text[part.stop - 1] != END else part.stop - 1
            edges = sorted({part.start, last, *(b for b in begins if part.start < b < last)})
            sentences = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
            found = read[part.start : last]
            assert read[last : part.stop] == text[last : part.stop]  # the end stays
            while found:  # tokens are random: a sentence is known by its beginning
                at = next(n for n, s in enumerate(sentences) if found[: len(s)] == s)
                found = found[len(sentences.pop(at)) :]
            assert not sentences


@settings(max_examples=50, deadline=None)
@given(any_rows(LENGTH - 2), st.booleans())
def test_documents_turned_back_and_tokens_put_back(raw: Sequences, delete: bool) -> None:
    arrays = build("rotate", *(["delete"] if delete else []), rate=0.2).corrupt(raw)
    check_decoder(arrays, raw)
    for row in np.flatnonzero(raw.numbers >= 0).tolist():
        text, read = raw.tokens[row].tolist(), encoder_text(arrays, row)
        size = int(raw.lengths[row])
        if delete:
            assert len(read) == size - (min(max(round(0.2 * size), 1), size - 1) if size > 1 else 0)
            continue
        for part in documents_of(raw, row):
            last = part.stop if text[part.stop - 1] != END else part.stop - 1
            old, new = text[part.start : last], read[part.start : last]
            assert any(old[n:] + old[:n] == new for n in range(max(len(old), 1)))


@pytest.mark.parametrize("damage", [("permute", "infill"), ("delete",), ("rotate",)])
def test_rows_are_the_same_in_any_company(damage: tuple[str, ...]) -> None:
    raw = rows_of_text(40, LENGTH - 2, document=30, short=True)
    whole = build(*damage).corrupt(raw)
    for rows in (np.arange(7), np.array([33, 2, 19, 6]), np.arange(40)[::-1]):
        same_rows(whole, build(*damage).corrupt(subset(raw, rows)), rows)


def test_infill_over_a_million_tokens() -> None:
    arrays = build("infill", length=512).corrupt(rows_of_text(2000, 510))
    masks = (arrays["encoder_ids"] == MASK).sum(1)
    sizes = (arrays["encoder_documents"] >= 0).sum(1)
    assert (sizes - masks == 512 - round(0.3 * 510)).all()  # 30 % are gone from every row
    assert abs(masks.mean() - 153 / 3) < 1.0  # spans of mean 3, the last of each row cut


@pytest.mark.parametrize("name", ["english", "chinese_poems"])
def test_real_sentences_are_shuffled(marked: dict[str, Path], name: str) -> None:
    stream = Stream([str(marked[name])], raw_length=254, stride=254, seed=0, wanted=Wanted(("sentences",)))
    end = int(stream.tokenizer["end_of_document"])
    specials = {**setting(1).specials, "end": end, "bos": 9000, "mask": 9001, "pad": 9002}
    raw = stream.sequences(np.arange(100))
    objective = build("permute", length=256, changes={"specials": specials})
    arrays = objective.corrupt(raw)
    real = arrays["encoder_documents"] >= 0
    assert real.all()
    assert (np.sort(arrays["encoder_ids"][:, 1:-1], axis=1) == np.sort(raw.tokens.astype(np.int64), axis=1)).all()
    assert (arrays["encoder_ids"][:, 1:-1] != raw.tokens).any(axis=1).mean() > 0.5


def test_infill_and_delete_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="infill and delete both take text away"):
        DenoiseConfig(damage=["infill", "delete"])
