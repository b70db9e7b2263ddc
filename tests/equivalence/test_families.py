"""Families of one stack train under ZeRO 3 and under three axes as one process does.

The rest of their cells is in the matrix.
"""

from pathlib import Path

import pytest

from tests.equivalence.cells import ALIKE, EIGHT, OWN_KINDS, Cell
from tests.equivalence.matrix import Matrix
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def bench(ranks: Ranks, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Cells of one shape share one process."""
    return Matrix(ranks, prepared, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("layout", ["zero3", EIGHT])
@pytest.mark.parametrize("shape", ["gpt2", "llama", *ALIKE, *OWN_KINDS])
def test_a_layout_changes_nothing(bench: Matrix, shape: str, layout: str) -> None:
    verdict = bench.check(Cell(shape, layout))
    assert not verdict.problem, verdict
