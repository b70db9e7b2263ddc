"""Masked language modelling: how much is hidden and by what, in any batch alike; the loss against torch's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.data.stream import Sequences
from shardwright.objective.cross_entropy import Head
from shardwright.objective.heads import Heads
from shardwright.objective.masked import Masked, MaskedConfig
from shardwright.objective.raw import Arrays
from tests.objective.given import (
    CLS,
    END,
    MASK,
    PAD,
    SEP,
    VOCABULARY,
    any_rows,
    check_shapes,
    rows_of_text,
    same_rows,
    setting,
    subset,
)

LENGTH = 64


def build(length: int = LENGTH, *, changes: dict[str, Any] | None = None, **config: Any) -> Masked:
    return Masked(MaskedConfig(**config), setting(length, **(changes or {})))


def restored(arrays: Arrays) -> np.ndarray:
    """The rows with what was hidden put back."""
    ids = arrays["input_ids"].copy()
    used = arrays["weights"] > 0
    ids[np.nonzero(used)[0], arrays["places"][used]] = arrays["labels"][used]
    return ids


@settings(max_examples=60, deadline=None)
@given(any_rows(LENGTH - 2), st.booleans(), st.sampled_from([1, 3]))
def test_what_was_hidden_put_back_is_the_text(raw: Sequences, words: bool, ngrams: int) -> None:
    arrays = build(whole_words=words, ngrams=ngrams).corrupt(raw)
    check_shapes(arrays, len(raw.tokens))
    ids = restored(arrays)
    for row, length in enumerate(raw.lengths.tolist()):
        rest = [PAD] * (LENGTH - 2 - length)
        assert ids[row].tolist() == [CLS, *raw.tokens[row, :length].tolist(), SEP, *rest]
        hidden = arrays["places"][row][arrays["weights"][row] > 0]
        assert len(set(hidden.tolist())) == len(hidden) and (np.diff(hidden) > 0).all()
        assert not set(ids[row][hidden].tolist()) & {CLS, SEP, PAD, END}
        assert (arrays["documents"][row] >= 0).sum() == (length + 2 if raw.numbers[row] >= 0 else 0)
        left = length - (raw.tokens[row, :length] == END).sum()
        if not words and ngrams == 1:
            assert len(hidden) == min(max(1, round(0.15 * (length + 2))), left, 10)


@pytest.mark.parametrize("config", [{}, {"whole_words": True, "ngrams": 3}, {"sentence": "order", "pairs": 3}])
def test_rows_are_the_same_in_any_company(config: dict) -> None:
    objective = build(**config)
    raw = rows_of_text(40, objective.raw_length(LENGTH), document=30, short=True)
    whole = objective.corrupt(raw)
    for rows in (np.arange(7), np.array([33, 2, 19, 6]), np.arange(40)[::-1]):
        same_rows(whole, objective.corrupt(subset(raw, rows)), rows)


def test_attention_and_positions_keep_to_documents() -> None:
    raw = rows_of_text(5, LENGTH - 2, document=20)
    arrays = build().corrupt(raw)
    for row in range(5):
        begins = raw.starts[raw.rows == row] + 1
        changes = np.flatnonzero(np.diff(arrays["documents"][row])) + 1
        assert changes.tolist() == begins.tolist()
        assert (arrays["position_ids"][row][begins] == 0).all()
    plain = build(changes={"mask_documents": False, "reset_positions": False}).corrupt(raw)
    assert "documents" not in plain and (plain["position_ids"] == np.arange(LENGTH)).all()
    last = build(changes={"mask_documents": False, "evaluation": True}).corrupt(rows_of_text(5, LENGTH - 2, short=True))
    assert ((last["documents"] == 0) | (last["documents"] == -1)).all() and (last["documents"] == -1).any()


def test_shares_over_a_million_tokens() -> None:
    raw = rows_of_text(2000, 510)
    arrays = build(512).corrupt(raw)
    assert arrays["places"].shape == (2000, 77) and arrays["weights"].all()  # round(0.15 * 512) of every row
    seen = np.take_along_axis(arrays["input_ids"], arrays["places"], 1)
    kept, masked = seen == arrays["labels"], seen == MASK
    shares = masked.mean(), (~masked & ~kept).mean(), kept.mean()
    # A random token is the right one once in VOCABULARY times.
    assert np.abs(np.array(shares) - [0.8, 0.1 * (1 - 1 / VOCABULARY), 0.1 * (1 + 1 / VOCABULARY)]).max() < 0.003
    others = seen[~masked & ~kept]
    counts = np.bincount(others, minlength=VOCABULARY)
    assert len(counts) == VOCABULARY and counts.std() / counts.mean() < 1.3 / counts.mean() ** 0.5
    columns = np.bincount(arrays["places"].reshape(-1), minlength=512)
    assert columns[0] == columns[511] == 0 and columns[1:511].std() / columns[1:511].mean() < 0.08


def test_every_epoch_has_another_mask_and_validation_its_own() -> None:
    raw = rows_of_text(1, 510)
    places = [build(512).corrupt(raw._replace(numbers=np.array([n])))["places"] for n in (0, 10**9)]
    places.append(build(512, changes={"evaluation": True}).corrupt(raw)["places"])
    places.append(build(512, changes={"seed": 8}).corrupt(raw)["places"])
    common = [len(set(places[0][0].tolist()) & set(other[0].tolist())) for other in places[1:]]
    assert max(common) < 30  # 77 of 510 tokens twice: 12 in common


def test_random_tokens_are_of_the_tokenizer() -> None:
    arrays = build(512, changes={"vocab_size": 5}, mask=0.0, random=1.0).corrupt(rows_of_text(50, 510))
    assert np.take_along_axis(arrays["input_ids"], arrays["places"], 1).max() == 4


@pytest.mark.parametrize("sentence", ["none", "order"])
def test_loss_is_that_of_the_pretraining_heads(sentence: str) -> None:
    """Hugging Face's BertForPreTraining: cross entropy of hidden tokens, labels -100 elsewhere, and of the pairs."""
    objective = build(sentence=sentence)
    arrays = objective.corrupt(rows_of_text(6, objective.raw_length(LENGTH), short=True))
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    hidden, weight = torch.randn(6, LENGTH, 8, requires_grad=True), torch.randn(VOCABULARY, 8) / 4
    transform, pair = torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)
    sums = objective.loss(hidden, Heads(Head(weight), transform, {"sentence": pair}), batch)
    counts = objective.count(batch)
    labels = torch.full((6, LENGTH), -100)
    used = batch["weights"] > 0
    labels[used.nonzero()[:, 0], batch["places"][used]] = batch["labels"][used]
    wanted = F.cross_entropy((transform(hidden) @ weight.T).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(sums["masked"] / counts["masked"], wanted, rtol=1e-5, atol=1e-6)
    total, theirs = sums["masked"] / counts["masked"], wanted
    assert list(sums) == list(objective.terms) == list(counts)
    if sentence == "order":
        real = batch["sentence_weights"][:, 0] > 0
        theirs_pair = F.cross_entropy(pair(hidden[real, 0]), batch["sentence_labels"][real, 0])
        torch.testing.assert_close(sums["sentence"] / counts["sentence"], theirs_pair, rtol=1e-5, atol=1e-6)
        total, theirs = total + sums["sentence"] / counts["sentence"], theirs + theirs_pair
    got, expected = torch.autograd.grad(total, hidden, retain_graph=True)[0], torch.autograd.grad(theirs, hidden)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_shares_over_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mask=0\.8 and random=0\.3"):
        MaskedConfig(random=0.3)
