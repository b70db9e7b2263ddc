"""Families whose blocks are of a kind of their own, under the axes that cut them: the same loss and gradients as in one
process. tests/equivalence has them through whole runs.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.test_context import BOUNDS
from tests.parallel.test_context import check as check_context
from tests.parallel.test_tensor import check as check_tensor
from tests.parallel.work_context import Case
from tests.parallel.work_tensor import GPT2
from tests.ranks import Ranks

DROPOUT = {"residual_dropout": 0.1, "embed_dropout": 0.1}
FAMILIES: dict[str, dict[str, Any]] = {
    "deberta": {**GPT2, "family": "deberta", "layers": 3, "relative_span": 6},
    "deberta_v2": {**GPT2, "family": "deberta_v2", "layers": 3, "buckets": 8, "convolution": 3, **DROPOUT},
    "albert": {**GPT2, "family": "albert", "embed_width": 16, "sentence_head": False, **DROPOUT},
    "crammed": {**GPT2, "family": "crammed"},
    "modernbert": {**GPT2, "family": "modernbert", "layers": 3, "window": 6, "mlp_width": 48},
}


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_ranks(ranks: Ranks, family: str, sequence: bool) -> None:
    case = {"model": FAMILIES[family], "sequence": sequence}
    check_tensor(ranks.run(2, "tests.parallel.work_tensor:compare", case), 1e-6)


@pytest.mark.parametrize("family", ["deberta", "deberta_v2", "albert"])  # the others compute positions in float32
def test_tensor_ranks_in_float64(ranks: Ranks, family: str) -> None:
    case = {"model": FAMILIES[family], "linear": True}
    check_tensor(ranks.run(2, "tests.parallel.work_tensor:compare", case), 1e-12)


@pytest.mark.in_turn
@pytest.mark.parametrize("family", ["deberta_v2", "albert"])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_data_times_tensor_with_accumulation(ranks: Ranks, family: str, recompute: str) -> None:
    case = {"model": FAMILIES[family], "data": 2, "micro": 2, "recompute": recompute}
    check_tensor(ranks.run(4, "tests.parallel.work_tensor:compare", case), 1e-6)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole"])
@pytest.mark.parametrize("family", ["deberta_v2", "modernbert"])
def test_context_ranks(ranks: Ranks, family: str, packed: bool) -> None:
    """Four of them, so that neighbours within a window are on three ranks; test_context.py has two for every family."""
    check_context(ranks, 4, Case(family, packed, DROPOUT), list(BOUNDS)[:2])
