"""Encoder-decoders train under ZeRO 3 and under three axes as one process does, through whole runs on real text.

tests/parallel/test_streams.py has every layout on batches of its own; the rest of the cells is in the matrix.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.equivalence.cells import EIGHT, PAIRED, Cell
from tests.equivalence.matrix import Matrix
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def bench(ranks: Ranks, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Cells of one shape share one process."""
    return Matrix(ranks, prepared, tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("layout", ["zero3", EIGHT])
@pytest.mark.parametrize("shape", PAIRED)
def test_a_layout_changes_nothing(bench: Matrix, shape: str, layout: str) -> None:
    verdict = bench.check(Cell(shape, layout))
    assert not verdict.problem, verdict
