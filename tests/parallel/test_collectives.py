"""The conjugate pairs of collectives against one process, to the bit, in every format."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import Ranks

WORK = "tests.parallel.work_collectives"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 3])
def test_values_and_gradients_of_two_passes_are_those_of_one_process(ranks: Ranks, n: int, dtype: torch.dtype) -> None:
    assert ranks.run(n, f"{WORK}:check_all", dtype) == [[]] * n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_they_are_one_graph_and_the_same(ranks: Ranks, dtype: torch.dtype) -> None:
    assert ranks.run(2, f"{WORK}:check_all", dtype, True) == [[]] * 2


def test_gradients_are_those_of_small_differences(ranks: Ranks) -> None:
    assert ranks.run(2, f"{WORK}:check_gradients") == [True] * 2
