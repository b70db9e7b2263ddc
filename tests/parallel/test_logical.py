"""Logical tensors: parts, sums and descriptions, on the layouts that FSDP2 and tensor parallelism make."""

import pytest
import torch

from shardwright.parallel.logical import Logical, Share, mean_all, norm_all, norm_here, sum_all
from tests.parallel.work_logical import LAYOUTS, SHAPES
from tests.ranks import Ranks

WORK = "tests.parallel.work_logical"
SIZES = {layout: torch.tensor(sizes).prod().item() for layout, sizes in LAYOUTS.items()}


def test_one_process_holds_all_of_it_and_copies_nothing() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    logical = Logical.whole(tensor)
    assert Logical.of(tensor).local is tensor and logical.here and logical.copies == 1
    assert logical.box() == ((0, 0), (3, 4)) and logical.axes() == ()
    assert logical.gather(tensor) is tensor and logical.wrap(tensor) is tensor
    assert logical.part(tensor).data_ptr() == tensor.data_ptr() and torch.equal(logical.part(tensor), tensor)
    value = tensor.sum()
    assert logical.sum(value) is value and sum_all([Share(logical, value)])[0] is value
    row = tensor.mean(dim=1)
    assert logical.wrap(row, [0]) is row and logical.keep(row, [0]).shape == (3,)
    assert torch.equal(mean_all([(logical, tensor, -1)])[0], row)
    assert torch.equal(norm_all([(logical, tensor)])[0], tensor.norm())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_sums_and_descriptions(ranks: Ranks, layout: str) -> None:
    """Even, uneven and empty parts, cut by rows, columns or twice by rows."""
    replicate, _, tensor = LAYOUTS[layout]
    for copies in ranks.run(SIZES[layout], f"{WORK}:geometry", layout):
        by_name = dict(zip(SHAPES, copies, strict=True))
        assert by_name["blocks.0.mlp.up.weight"] == by_name["blocks.0.mlp.down.weight"] == replicate
        assert by_name["blocks.0.attention_norm.weight"] == replicate * tensor


def test_placements_of_any_mesh(ranks: Ranks) -> None:
    ranks.run(4, f"{WORK}:other_placements")


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("shard 2", (1, 0)),
        ("replicate 2", (0, 0)),
        ("replicate 2 x shard 2", (1, 1)),
        # What both axes cut; norms and such, which the tensor axis shares.
        ("shard 2 x tensor 2", (2 + 1, 1)),
    ],
)
def test_sums_travel_together(ranks: Ranks, layout: str, expected: tuple[int, int]) -> None:
    """One all-reduce an axis for all tensors that lie alike, one broadcast where parts are shared."""
    assert set(ranks.run(SIZES[layout], f"{WORK}:coalesced", layout)) == {expected}


def test_a_norm_is_right_to_rounding_however_large_the_tensor() -> None:
    """torch's own is 1e-4 off here, on a CPU and one thread, and the more the larger the tensor."""
    x = torch.randn(5_000_001, generator=torch.Generator().manual_seed(0))
    expected = x.double().square().sum().sqrt()
    for shape in ((-1,), (3, -1)):
        torch.testing.assert_close(norm_here(x.view(shape)).double(), expected, rtol=5e-7, atol=0)
    assert norm_here(torch.zeros(0)) == 0 and not torch.isfinite(norm_here(torch.full((5000,), torch.inf)))
