"""Pairs and classes: rows of given ids, and their losses against torch's own."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shardwright.objective.classify import Classify, ClassifyConfig
from shardwright.objective.cross_entropy import Head
from shardwright.objective.heads import Heads
from shardwright.objective.pairs import PairsConfig, SupervisedPairs
from shardwright.objective.raw import Ragged
from tests.objective.given import BOS, CLS, END, PAD, SEP, check_shapes, setting


class Examples(NamedTuple):
    numbers: np.ndarray
    sources: Ragged
    targets: Ragged


def ragged(lists: list[list[int]]) -> Ragged:
    return Ragged(np.array(sum(lists, []), np.int64), np.cumsum([0, *map(len, lists)]))


def examples(sources: list[list[int]], targets: list[list[int]]) -> Examples:
    numbers = np.array([n if source else -1 for n, source in enumerate(sources)])
    return Examples(numbers, ragged(sources), ragged(targets))


GIVEN = examples([[1, 2, 3], [4] * 20, []], [[11, 12], [13] * 20, []])


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("start", ["pad", "bos", "end"])
def test_rows_of_pairs(begin: bool, start: str) -> None:
    config: Any = {"begin": begin, "start": start, "target_length": 6}
    arrays = SupervisedPairs(PairsConfig(**config), setting(8)).corrupt(GIVEN)
    check_shapes(arrays, 3)
    first = [BOS] if begin else []
    assert arrays["encoder_ids"][0].tolist() == [*first, 1, 2, 3, END, *[PAD] * (4 - begin)]
    assert arrays["encoder_ids"][1].tolist() == [*first, *[4] * (7 - begin), END]
    assert arrays["labels"][0].tolist() == [*first, 11, 12, END, *[PAD] * (3 - begin)]
    assert arrays["weights"].sum(1).tolist() == [3 + begin, 6, 0]
    opening = {"pad": PAD, "bos": BOS, "end": END}[start]
    assert (arrays["input_ids"][:, 0] == opening).all() and (
        arrays["input_ids"][:, 1:] == arrays["labels"][:, :-1]
    ).all()
    assert (arrays["encoder_documents"] >= 0).sum(1).tolist() == [4 + begin, 8, 0]
    assert arrays["documents"].max(1).tolist() == [0, 0, -1]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_pairs_is_torchs(smoothing: float) -> None:
    """Hugging Face's sequence-to-sequence heads, and Vaswani et al.'s label smoothing."""
    objective = SupervisedPairs(PairsConfig(smoothing=smoothing), setting(8))
    batch = {name: torch.from_numpy(array) for name, array in objective.corrupt(GIVEN).items()}
    hidden, weight = torch.randn(3, 8, 5, requires_grad=True), torch.randn(910, 5)
    loss = objective.loss(hidden, Heads(Head(weight)), batch)["lm"] / objective.count(batch)["lm"]
    labels = batch["labels"].masked_fill(batch["weights"] == 0, -100)
    wanted = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    got, expected = torch.autograd.grad(loss, hidden)[0], torch.autograd.grad(wanted, hidden)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_classes_of_texts() -> None:
    objective = Classify(ClassifyConfig(classes=3), setting(8))
    arrays = objective.corrupt(examples([[1, 2, 3], [4] * 20, []], [[3], [1], []]))
    check_shapes(arrays, 3)
    assert arrays["input_ids"].tolist() == [
        [CLS, 1, 2, 3, SEP, PAD, PAD, PAD], [CLS, *[4] * 6, SEP], [CLS, SEP, *[PAD] * 6],
    ]  # fmt: skip
    assert arrays["labels"][:2, 0].tolist() == [2, 0] and arrays["weights"].tolist() == [[1], [1], [0]]
    assert (arrays["documents"] >= 0).sum(1).tolist() == [5, 8, 0]
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    hidden, head = torch.randn(3, 8, 5), torch.nn.Linear(5, 3)
    loss = objective.loss(hidden, Heads(Head(torch.empty(0, 5)), None, {"label": head}), batch)["label"]
    wanted = F.cross_entropy(head(hidden[:2, 0]), torch.tensor([2, 0]))
    torch.testing.assert_close(loss / objective.count(batch)["label"], wanted)


def test_classes_of_tokens() -> None:
    objective = Classify(ClassifyConfig(of="tokens", classes=4), setting(8))
    arrays = objective.corrupt(examples([[1, 2, 3], [4] * 20, []], [[3, 0, 4], [1] * 20, []]))
    check_shapes(arrays, 3)
    assert arrays["labels"].shape == arrays["weights"].shape == (3, 8)
    assert arrays["weights"].tolist() == [[0, 1, 0, 1, 0, 0, 0, 0], [0, *[1] * 6, 0], [0] * 8]
    assert arrays["labels"][0, [1, 3]].tolist() == [2, 3]
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    hidden, head = torch.randn(3, 8, 5), torch.nn.Linear(5, 4)
    loss = objective.loss(hidden, Heads(Head(torch.empty(0, 5)), None, {"label": head}), batch)["label"]
    labels = batch["labels"].masked_fill(batch["weights"] == 0, -100)
    torch.testing.assert_close(
        loss / objective.count(batch)["label"], F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
    )
