"""ELECTRA and XLNet train under layouts as in one process: stages of two stacks, and of two streams.

ELECTRA draws tokens, so a difference in the last bit may draw another one: in float32 that did not happen in these
runs, and in float64, with bounds of its own, it cannot be told from chance.
"""

import pytest

from tests.equivalence.cells import TWOFOLD, Cell
from tests.equivalence.matrix import Matrix

THREE_AXES = "data2_tensor2_pipeline2_1f1b"
CELLS = [
    *(Cell(shape, layout) for shape in TWOFOLD for layout in ("zero3", "tensor2", "context2", "pipeline2_zbv")),
    *(Cell("electra", layout, "fp64") for layout in ("zero3", "pipeline2_1f1b")),
]


@pytest.fixture(scope="module")
def bench(ranks, prepared, tmp_path_factory):
    """Cells share the one process that they are held against."""
    return Matrix(ranks, prepared, tmp_path_factory.mktemp("cells"))


@pytest.mark.in_turn
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_layout_changes_nothing(cell, bench):
    assert bench.check(cell).problem == ""


@pytest.mark.parametrize("shape", TWOFOLD)
def test_a_product_of_three_axes(shape, bench):
    assert bench.check(Cell(shape, THREE_AXES)).problem == ""
