"""Padding, packing and odd lengths against Hugging Face: logits, loss and gradients, each family and choice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.interop.huggingface import import_tensors
from shardwright.model.transformer import LanguageModel
from tests.interop.models import CASES, build_ours, to_theirs

pytest.importorskip("transformers")

IGNORED = -100


def random_ids(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 101, (length,), generator=generator) for length in lengths]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def next_tokens(ids: Tensor) -> Tensor:
    """The label of each token of a document; its last token has none."""
    return F.pad(ids[1:], (0, 1), value=IGNORED)


def expect_same_gradients(ours: LanguageModel, theirs: torch.nn.Module) -> None:
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, gradient in import_tensors(ours.config, expected):
        mine = ours.get_parameter(name).grad
        assert mine is not None
        torch.testing.assert_close(mine, gradient, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_padded_rows_equal(case: str, side: str) -> None:
    """Three rows of odd lengths, as transformers pads them; nothing is asked of the padding itself."""
    ours = build_ours(case)
    theirs = to_theirs(ours)
    rows = random_ids(17, 9, 1)

    def padded(row: Tensor, value: int) -> Tensor:
        missing = 17 - len(row)
        return F.pad(row, (missing, 0) if side == "left" else (0, missing), value=value)

    ids = torch.stack([padded(row, 0) for row in rows])
    mask = torch.stack([padded(torch.ones_like(row), 0) for row in rows])
    labels = torch.stack([padded(next_tokens(row), IGNORED) for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    logits = ours(ids, attention_mask=mask, position_ids=positions)["logits"]
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    seen = mask.bool()
    torch.testing.assert_close(logits[seen], expected[seen], atol=1e-5, rtol=1e-5)
    for row, found, where in zip(rows, logits, seen, strict=True):
        torch.testing.assert_close(found[where], ours(row[None])["logits"][0], atol=1e-5, rtol=1e-5)

    loss, target = loss_of(logits, labels), loss_of(expected, labels)
    torch.testing.assert_close(loss, target, atol=1e-6, rtol=1e-6)
    loss.backward()
    target.backward()
    expect_same_gradients(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_a_packed_row_equals_its_documents_one_by_one(case: str) -> None:
    """Ours in one row with document numbers, theirs in a call for each document."""
    ours = build_ours(case)
    theirs = to_theirs(ours)
    rows = random_ids(13, 1, 7, 20, 2)
    ids, labels = torch.cat(rows)[None], torch.cat([next_tokens(row) for row in rows])[None]
    documents = torch.cat([torch.full_like(row, number) for number, row in enumerate(rows)])[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]

    logits = ours(ids, position_ids=positions, documents=documents)["logits"]
    expected = torch.cat([theirs(row[None]).logits[0] for row in rows])[None]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)

    loss, target = loss_of(logits, labels), loss_of(expected, labels)
    torch.testing.assert_close(loss, target, atol=1e-6, rtol=1e-6)
    loss.backward()
    target.backward()
    expect_same_gradients(ours, theirs)


@pytest.mark.parametrize("case", ["gpt2", "llama-grouped", "qwen3"])
def test_what_one_document_says_moves_no_other(case: str) -> None:
    ours = build_ours(case)
    rows = random_ids(13, 20)
    ids = torch.cat(rows)[None]
    documents = (torch.arange(33) >= 13).long()[None]
    before = ours(ids, documents=documents)["logits"]
    ids[0, 5] = 0
    after = ours(ids, documents=documents)["logits"]
    assert torch.equal(before[:, 13:], after[:, 13:]) and not torch.equal(before[:, 5:13], after[:, 5:13])
