"""Context parallelism: ranks that share each sequence compute the loss and the gradients of one process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwright.config import ConfigError
from shardwright.parallel.context import ContextRows, fits_context, nearest_length, own_chunks
from tests.parallel.work_context import LENGTH, SHAPES, Case, whole_batch
from tests.ranks import Ranks

WORK = "tests.parallel.work_context"
DROPOUT = {"residual_dropout": 0.1, "embed_dropout": 0.1}
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def check(ranks: Ranks, n: int, case: Case, dtypes: list[torch.dtype], graphs: int = 0) -> None:
    """Loss and gradients of n ranks within the bound of each dtype."""
    for found in ranks.run(n, f"{WORK}:compare", case, dtypes):
        for dtype, (loss, gradients, compiled) in found.items():
            assert loss <= BOUNDS[dtype], (dtype, loss)
            assert gradients <= BOUNDS[dtype], (dtype, gradients)
            assert compiled == graphs


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole"])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@pytest.mark.parametrize("n", [2, 4])
def test_loss_and_gradients_are_those_of_one_process(ranks: Ranks, n: int, shape: str, packed: bool) -> None:
    check(ranks, n, Case(shape, packed), [torch.float32, torch.float64, torch.bfloat16])


@pytest.mark.parametrize("shape", SHAPES)
def test_any_positions_heads_and_dropout(ranks: Ranks, shape: str) -> None:
    check(ranks, 2, Case(shape, True, DROPOUT), [torch.float32, torch.float64])


@pytest.mark.parametrize(
    ("recompute", "dtype"),
    [("none", torch.float32), ("none", torch.bfloat16), ("full", torch.float32), ("selective", torch.float32)],
)
def test_compiled_blocks_are_one_graph(ranks: Ranks, recompute: str, dtype: torch.dtype) -> None:
    check(ranks, 2, Case("llama", True, DROPOUT, compiled=True, recompute=recompute), [dtype], graphs=1)


def test_recomputation(ranks: Ranks) -> None:
    for recompute in ("full", "selective"):
        check(ranks, 2, Case("gpt2", True, DROPOUT, recompute=recompute), [torch.float32])


def test_evaluation(ranks: Ranks) -> None:
    assert max(ranks.run(4, f"{WORK}:evaluate", "llama")) < 1e-5


def test_one_collective_a_block_each_way(ranks: Ranks) -> None:
    """Two blocks: keys and values travel together, and so do their gradients."""
    for counts in ranks.run(2, f"{WORK}:count_collectives"):
        assert counts == {"forward _allgather_base_": 2, "backward _reduce_scatter_base_": 2}


def test_a_mistake_shows(ranks: Ranks) -> None:
    """The comparison is worth something only if a wrong mask fails it."""
    with pytest.raises(AssertionError):
        check(ranks, 2, Case("gpt2", True, wrong=True), [torch.float32])


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3))
def test_rows_are_shared_out_evenly(size: int, chunk: int, batch: int) -> None:
    length = 2 * size * chunk
    held = [ContextRows(size, index, length) for index in range(size)]
    assert sorted(torch.cat([h.rows for h in held]).tolist()) == list(range(length))
    assert all(h.rows.tolist() == sorted(h.rows.tolist()) for h in held)
    # What a causal row costs is its number of keys.
    assert len({int((h.rows + 1).sum()) for h in held}) == 1
    whole = torch.arange(batch * length).view(batch, length)
    given_batch = {"input_ids": whole, "documents": whole // 3, "sequence": torch.arange(batch)}
    for h in held:
        own = h.slice(given_batch)
        assert torch.equal(own["input_ids"], whole[:, h.rows])
        assert torch.equal(own["documents"], whole[:, h.rows] // 3)
        assert torch.equal(own["key_documents"], (whole // 3)[:, h.order])
        assert torch.equal(own["sequence"], given_batch["sequence"])
        assert own["row_index"].tolist() == [h.rows.tolist()] * batch
        assert own["key_index"].tolist() == [h.order.tolist()] * batch
    assert "key_documents" not in held[0].slice({"input_ids": whole})


@given(st.integers(1, 9))
def test_one_rank_has_every_row(length: int) -> None:
    whole = torch.arange(2 * length).view(2, length)
    rows = ContextRows(1, 0, length)
    assert rows.rows.tolist() == list(range(length))
    assert torch.equal(rows.slice({"input_ids": whole})["input_ids"], whole)


@given(st.integers(1, 3000), st.integers(1, 70))
def test_the_nearest_length_fits(length: int, size: int) -> None:
    near = nearest_length(length, size)
    assert fits_context(near, size)
    others = [n for n in range(1, length + 4 * size) if n % (2 * size) == 0]
    assert abs(near - length) == min(abs(n - length) for n in others)
    if size > 1 and length % (2 * size):
        message = f"data.sequence_length={length}: parallel.context={size} .* data.sequence_length={near}$"
        with pytest.raises(ConfigError, match=message):
            ContextRows(size, 0, length)


def test_head_and_tail() -> None:
    assert [own_chunks(3, r) for r in range(3)] == [(0, 5), (1, 4), (2, 3)]


def test_a_tensor_without_tokens_to_share_is_named() -> None:
    rows = ContextRows(2, 0, LENGTH)
    with pytest.raises(ValueError, match=r"spans \[3, 5\]: has no dim of 32 tokens"):
        rows.slice({**whole_batch(packed=False), "spans": torch.zeros(3, 5)})


def test_only_attention_changes_and_only_among_several(ranks: Ranks) -> None:
    assert ranks.run(1, f"{WORK}:names_of_cores") == [["Core", "Core"]]
    assert ranks.run(2, f"{WORK}:names_of_cores") == [["ContextCore", "ContextCore"]] * 2
