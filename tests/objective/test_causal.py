"""Causal batches against a slow oracle of one token at a time, and the promise that documents do not meet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.data.stream import Sequences, Stream, ValidationStream
from shardwright.objective.causal import Causal, CausalConfig
from shardwright.objective.raw import Arrays
from shardwright.objective.setting import Setting

END = 0


def causal(**treatment: bool) -> Causal:
    return Causal(CausalConfig(), Setting(0, **treatment))


def oracle(sequences: Sequences, setting: Setting) -> dict[str, list]:
    """Token by token, as the docstring of causal.py says it."""
    batch, length = sequences.tokens.shape[0], sequences.tokens.shape[1] - 1
    found: dict[str, list] = {
        name: [[0] * length for _ in range(batch)]
        for name in ("input_ids", "labels", "weights", "position_ids", "documents")
    }
    for row in range(batch):
        raw, starts = sequences.tokens[row].tolist(), set(sequences.starts[sequences.rows == row].tolist())
        document = position = 0
        for t in range(length):
            target_begins = t + 1 in starts
            if t and target_begins:
                document, position = document + 1, 0
            counts = t + 1 < sequences.lengths[row] and (setting.cross_document_targets or not target_begins)
            found["input_ids"][row][t], found["labels"][row][t] = raw[t], raw[t + 1]
            found["weights"][row][t] = float(counts)
            found["position_ids"][row][t] = position if setting.reset_positions else t
            found["documents"][row][t] = document
            position += 1
    if not setting.mask_documents:
        del found["documents"]
    return {**found, "sequence": sequences.numbers.tolist()}


def lists(arrays: Arrays) -> dict[str, list]:
    return {name: array.tolist() for name, array in arrays.items()}


@st.composite
def sequences(draw: st.DrawFn) -> Sequences:
    batch, raw = draw(st.integers(1, 5)), draw(st.integers(2, 24))
    tokens = np.arange(1, batch * raw + 1, dtype=np.uint16).reshape(batch, raw)
    lengths = np.array(draw(st.lists(st.sampled_from([0, 1, raw // 2, raw - 1, raw]), min_size=batch, max_size=batch)))
    begins = [sorted(draw(st.sets(st.integers(0, raw - 1)))) for _ in range(batch)]
    begins = [[b for b in row if b < n] for row, n in zip(begins, lengths, strict=True)]
    rows = np.repeat(np.arange(batch), [len(b) for b in begins])
    return Sequences(
        np.where(lengths > 0, np.arange(batch), -1), tokens, lengths, rows, np.array(sum(begins, []), np.int64)
    )


@given(sequences(), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_batches_equal_the_oracle(found: Sequences, mask: bool, reset: bool, cross: bool) -> None:
    objective = causal(mask_documents=mask, reset_positions=reset, cross_document_targets=cross)
    assert lists(objective.corrupt(found)) == oracle(found, objective.setting)
    assert objective.count({"weights": torch.ones(3)})["lm"] == 3


def test_an_evaluation_counts_every_target(folder: Path) -> None:
    found = Stream([str(folder)], raw_length=65, stride=64, seed=0).sequences(np.arange(20))
    kinds = [causal(cross_document_targets=False, evaluation=e).corrupt(found)["weights"] for e in (False, True)]
    assert kinds[0].sum() < kinds[1].sum() == kinds[1].size


def test_types_and_memory(folder: Path) -> None:
    arrays = causal().corrupt(Stream([str(folder)], raw_length=65, stride=64, seed=0).sequences(np.array([4, -1])))
    assert {name: str(a.dtype) for name, a in arrays.items()} == {
        "input_ids": "int64",
        "labels": "int64",
        "position_ids": "int64",
        "weights": "float32",
        "sequence": "int64",
        "documents": "int32",
    }
    assert all(a.flags.c_contiguous for a in arrays.values())
    assert arrays["sequence"].tolist() == [4, -1] and arrays["weights"][1].sum() == 0


def test_real_text_loses_no_target_and_crosses_no_document(folder: Path) -> None:
    stream = Stream([str(folder)], raw_length=129, stride=128, seed=0, lanes=8)
    found = stream.sequences(np.arange(100))
    arrays = causal().corrupt(found)
    assert lists(arrays) == oracle(found, causal().setting)
    assert arrays["weights"].min() == 1
    # A document changes exactly after an end-of-document input: that token is the begin token of what follows.
    ends = arrays["input_ids"] == END
    changes = np.diff(arrays["documents"], axis=1, prepend=0) == 1
    assert (changes[:, 1:] == ends[:, 1:]).all()
    assert (arrays["position_ids"][changes] == 0).all()
    # An end of document is a target of its own document.
    inner = (arrays["labels"] == END)[:, :-1]
    assert (np.diff(arrays["documents"], axis=1)[inner] == 1).all()
    strict = causal(cross_document_targets=False).corrupt(found)
    assert (strict["weights"] == 0).sum() == ends.sum()


@pytest.mark.parametrize("length", [16, 64])
def test_validation_predicts_every_token_exactly_once(folder: Path, texts: list[list[int]], length: int) -> None:
    stream = ValidationStream([str(folder)], raw_length=length + 1, stride=length)
    wanted = [token for document in texts[200::2] + texts[201::2] for token in [*document, END]]
    arrays = causal().corrupt(stream.sequences(np.array([*range(stream.num_sequences), -1, -1])))
    assert arrays["labels"][arrays["weights"] > 0].tolist() == wanted
    assert arrays["weights"].sum() == stream.num_tokens
    assert arrays["input_ids"][0, 0] == END
