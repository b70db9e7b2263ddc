"""Bytes and calls of every collective of a real step, by axis, are those of the formulas: one more is a failure."""

from typing import Any

import pytest

from shardwright.estimate.communication import leaving
from tests.ranks import Ranks

CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "zero 0": (2, "parallel.zero=0", {}),
    "zero 1": (2, "parallel.zero=1", {}),
    "zero 2": (2, "parallel.zero=2", {}),
    "zero 3": (2, "parallel.zero=3", {}),
    "zero 3 bf16, uneven": (3, "parallel.zero=3 precision.compute=bf16", {}),
    "hybrid zero 1": (4, "parallel.zero=1 parallel.shard=2", {}),
    "hybrid zero 2": (4, "parallel.zero=2 parallel.shard=2", {}),
    "hybrid zero 3": (4, "parallel.zero=3 parallel.shard=2", {}),
    "tensor": (2, "parallel.tensor=2", {}),
    "tensor, no sequence": (2, "parallel.tensor=2 parallel.sequence=false", {}),
    "tensor, recomputed": (2, "parallel.tensor=2 train.recompute=full", {}),
    "tensor, every 2nd": (2, "parallel.tensor=2 train.recompute=2 parallel.sequence=false", {"residual_dropout": 0.1}),
    "tensor, post-norm": (2, "parallel.tensor=2 train.recompute=full", {"norm_placement": "post"}),
    "tensor, llama": (2, "parallel.tensor=2", {"family": "llama", "kv_heads": 2, "qk_norm": True}),
    "tensor, head norms alone": (2, "parallel.tensor=2 parallel.sequence=false", {"qk_norm": True}),
    "context": (2, "parallel.context=2", {}),
    "context, recomputed": (2, "parallel.context=2 train.recompute=full", {"family": "llama", "kv_heads": 2}),
    "pipeline": (2, "parallel.pipeline=2", {}),
    "pipeline, free head, bf16": (
        2, "parallel.pipeline=2 parallel.schedule=gpipe precision.compute=bf16", {"tied": False},
    ),
    "pipeline, interleaved": (2, "parallel.pipeline=2 parallel.schedule=interleaved_1f1b", {"layers": 4}),
    "pipeline, zbv": (2, "parallel.pipeline=2 parallel.schedule=zbv", {}),
    "data x tensor": (4, "parallel.tensor=2 parallel.data=2", {}),
    "data x tensor, zero 2, bf16": (4, "parallel.tensor=2 parallel.zero=2 precision.compute=bf16", {}),
    "data x context, zero 3": (4, "parallel.context=2 parallel.data=2 parallel.zero=3", {}),
    "tensor x context": (4, "parallel.tensor=2 parallel.context=2", {}),
    "data x pipeline": (4, "parallel.pipeline=2 parallel.data=2", {}),
    "data x pipeline, zero 3": (4, "parallel.pipeline=2 parallel.data=2 parallel.zero=3", {}),
    "tensor x pipeline": (4, "parallel.tensor=2 parallel.pipeline=2", {}),
    "bart, zero 3": (2, "parallel.zero=3", {"family": "bart"}),
    "bart, tensor, recomputed": (2, "parallel.tensor=2 train.recompute=full", {"family": "bart"}),
    "bart, tensor, no sequence": (2, "parallel.tensor=2 parallel.sequence=false", {"family": "bart"}),
    "bart, tensor x pipeline": (4, "parallel.tensor=2 parallel.pipeline=2", {"family": "bart"}),
    "t5, tensor": (2, "parallel.tensor=2", {"family": "t5", "decoder_layers": 2}),
    "t5, context": (2, "parallel.context=2", {"family": "t5", "decoder_layers": 2}),
}  # fmt: skip


def measure(ranks: Ranks, size: int, overrides: str, model: dict[str, Any], spoil: str = "") -> list[Any]:
    """(counted, expected) of every rank."""
    function = "tests.parallel.work_communication:measure"
    return ranks.run(size, function, overrides.split(), model, spoil, timeout=120)


@pytest.mark.parametrize("case", CASES)
def test_a_step_sends_what_the_formulas_say(ranks: Ranks, case: str) -> None:
    """Every collective of every rank, by axis: calls and bytes, to the last one."""
    for rank, (counted, expected) in enumerate(measure(ranks, *CASES[case])):
        assert counted == expected, f"rank {rank}"


@pytest.mark.parametrize("spoil", ["gather", "reduce", "norm"])
def test_waste_is_noticed(ranks: Ranks, spoil: str) -> None:
    """Each slip shows in calls and bytes."""
    for counted, expected in measure(ranks, 2, "parallel.zero=1", {}, spoil):
        assert sum(a.calls for a in counted.values()) > sum(a.calls for a in expected.values())
        assert sum(a.size for a in counted.values()) > sum(a.size for a in expected.values())


def test_bytes_that_leave_a_rank() -> None:
    """Ring algorithms: an all-reduce is a reduce-scatter and an all-gather."""
    assert leaving("all-gather", 1200, 4) == leaving("reduce-scatter", 1200, 4) == 900
    assert leaving("all-reduce", 1200, 4) == 1800
    assert leaving("send", 1200, 2) == 1200
    assert leaving("receive", 1200, 2) == 0
