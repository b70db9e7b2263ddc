"""ELECTRA's two terms, and what stands between them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from shardwright.objective.cross_entropy import Head
from shardwright.objective.heads import Heads
from shardwright.objective.replaced import Replaced, ReplacedConfig
from tests.objective.given import MASK, VOCABULARY, rows_of_text, setting

LENGTH = 64


def _batch(rows: int = 6) -> tuple[Replaced, dict[str, torch.Tensor]]:
    objective = Replaced(ReplacedConfig(), setting(LENGTH))
    arrays = objective.corrupt(rows_of_text(rows, LENGTH - 2, short=True))
    return objective, {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_hidden_tokens_are_masked_or_left() -> None:
    objective = Replaced(ReplacedConfig(), setting(512))
    arrays = objective.corrupt(rows_of_text(2000, 510))
    seen = np.take_along_axis(arrays["input_ids"], arrays["places"], 1)
    assert abs((seen == MASK).mean() - 0.85) < 0.003 and ((seen == MASK) | (seen == arrays["labels"])).all()
    assert arrays["replaced_weights"].all() and arrays["replaced_weights"].shape == (2000, 512)


def test_what_is_drawn_stands_in_its_place_and_what_is_right_counts_as_original() -> None:
    objective, batch = _batch()
    torch.manual_seed(0)
    drawn = torch.where(torch.rand(batch["labels"].shape) < 0.3, batch["labels"], batch["labels"] + 1)
    ids, labels = objective.replace(batch, drawn)
    wanted, found = batch["input_ids"].clone(), torch.zeros_like(ids)
    for row, place in (batch["weights"] > 0).nonzero().tolist():
        at = batch["places"][row, place]
        wanted[row, at] = drawn[row, place]
        found[row, at] = int(drawn[row, place] != batch["labels"][row, place])
    assert torch.equal(ids, wanted) and torch.equal(labels, found) and labels.sum() > 10
    # A part of the places, the others of weight zero at place 0, as a context rank has them.
    own = torch.arange(batch["places"].shape[1]) % 2 == 0
    part = {**batch, "weights": batch["weights"] * own, "places": batch["places"] * own}
    part["places"][:, 0] = 0  # a used place may be the first one as well
    ids, labels = objective.replace(part, drawn)
    used = part["weights"] > 0
    assert torch.equal(ids.gather(1, part["places"])[used], drawn[used])


def test_losses_are_those_of_the_pretraining_heads() -> None:
    """Hugging Face's ElectraForMaskedLM and ElectraForPreTraining."""
    objective, batch = _batch()
    hidden, weight = torch.randn(6, LENGTH, 8), torch.randn(VOCABULARY, 8)
    heads = Heads(Head(weight), torch.nn.Linear(8, 8), {"replaced": lambda x: x.sum(-1)})
    masked = objective.generator_loss(hidden, heads, batch)
    used = batch["weights"] > 0
    rows = used.nonzero()[:, 0]
    assert heads.transform is not None
    logits = heads.transform(hidden[rows, batch["places"][used]]) @ weight.T
    torch.testing.assert_close(masked, F.cross_entropy(logits, batch["labels"][used], reduction="sum"))
    _, labels = objective.replace(batch, batch["labels"] + 1)
    sums = objective.loss(hidden, heads, {**batch, "masked_sum": masked, "replaced_labels": labels})
    counts = objective.count(batch)
    real = batch["replaced_weights"] > 0
    assert (real.sum(1)[batch["sequence"] < 0] == 0).all() and not (labels[~real]).any()
    wanted = F.binary_cross_entropy_with_logits(hidden.sum(-1)[real], labels[real].float())
    torch.testing.assert_close(sums["replaced"] / counts["replaced"], wanted)
    assert list(sums) == list(objective.terms) == ["masked", "replaced"] and objective.terms["replaced"] == 50
    assert sums["masked"] is masked
