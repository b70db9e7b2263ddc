"""Who writes what, and how little a rank of a large world has to read."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from shardwright.checkpoint import SaveError, damage, load, read_manifest
from shardwright.checkpoint.folder import UNFINISHED, step_name
from shardwright.checkpoint.load import CheckedReader, wanted_boxes
from shardwright.checkpoint.plan import MAX_CLASSES, LocalPlanner, _classes, _deal, build_local_plan
from shardwright.checkpoint.ranks import Ranks
from shardwright.checkpoint.save import Task, _finish, _prepare, _write_rank

NUM_RANKS, ROWS = 450, 3


def box(name: str, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> WriteItem:
    """A write item as DCP makes it for a shard of a float32 tensor."""
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size(shape))
    return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)


def task_of(boxes: dict[str, tuple[WriteItem, torch.Tensor]]) -> Task:
    planner = LocalPlanner()
    planner.staged = {name: tensor for name, (_, tensor) in boxes.items()}
    return Task(7, {"world": "large"}, SavePlan([item for item, _ in boxes.values()]), planner)


def write_world(folder: Path, parts: Callable[[int], dict[str, tuple[WriteItem, torch.Tensor]]], size: int) -> Path:
    """What a world of `size` ranks would write, one rank after the other, by the code that each of them runs."""
    unfinished = folder / f"{UNFINISHED}{step_name(7)}"
    _prepare(folder, unfinished, size)
    for rank in range(size):
        _write_rank(unfinished, task_of(parts(rank)), rank)
    _finish(folder, unfinished, task_of({}), size)
    return folder / step_name(7)


def rows_of(rank: int) -> dict[str, tuple[WriteItem, torch.Tensor]]:
    """Every rank holds three rows of `w`; the bias lies with rank 0."""
    part = torch.arange(ROWS * 2.0).view(ROWS, 2) + 2 * ROWS * rank
    found = {"w": (box("w", (ROWS * NUM_RANKS, 2), (ROWS * rank, 0), (ROWS, 2)), part)}
    return found | ({"b": (box("b", (4,), (0,), (4,)), torch.ones(4))} if rank == 0 else {})


def test_a_large_world_keeps_folders_small_and_manifests_short(tmp_path: Path) -> None:
    path = write_world(tmp_path, rows_of, NUM_RANKS)
    folders = [folder for folder in path.rglob("*") if folder.is_dir()]
    assert max(sum(1 for _ in folder.iterdir()) for folder in folders) <= 1000
    manifest = read_manifest(path)
    assert manifest.tensors["w"].ranks == ((0, NUM_RANKS - 1),) and manifest.tensors["b"].ranks == ((0, 0),)
    assert next(damage(path), None) is None

    fresh = {"w": torch.zeros(ROWS * NUM_RANKS, 2), "b": torch.zeros(4)}
    load(path, fresh)
    assert torch.equal(fresh["w"].flatten(), torch.arange(2.0 * ROWS * NUM_RANKS)) and bool(fresh["b"].all())

    # Under the same layout a rank opens its own manifest and the one that holds the bias; 2 x the ranks, the same.
    for rank, size, first, count in ((0, 450, 0, 3), (311, 450, 933, 3), (449, 450, 1347, 3), (622, 900, 933, 1)):
        ranks = Ranks(None)
        ranks.rank, ranks.size = rank, size
        wanted = wanted_boxes({"b": torch.zeros(4)})
        wanted["w"] = [ChunkStorageMetadata(torch.Size([first, 0]), torch.Size([count, 2]))]
        reader = CheckedReader(path, manifest, wanted, ranks)
        (chunk,) = reader.read_metadata().state_dict_metadata["w"].chunks  # type: ignore[union-attr]
        assert set(reader.files) == {0, first // ROWS}
        assert list(chunk.offsets) == [first // ROWS * ROWS, 0]


def test_a_gap_is_found_before_the_checkpoint_gets_its_name(tmp_path: Path) -> None:
    def parts(rank: int) -> dict[str, tuple[WriteItem, torch.Tensor]]:
        return {"w": (box("w", (6, 2), (2 * rank, 0), (2, 2)), torch.zeros(2, 2))}

    with pytest.raises(SaveError, match="w was given in parts that make 8 of 12 elements"):
        write_world(tmp_path, parts, 2)
    assert not (tmp_path / step_name(7)).exists()


def test_copies_under_two_layouts_are_no_gap(tmp_path: Path) -> None:
    """A tied tensor that two pipeline stages hold is written by both."""

    def parts(rank: int) -> dict[str, tuple[WriteItem, torch.Tensor]]:
        return {"tied": (box("tied", (2, 2), (0, 0), (2, 2)), torch.full((2, 2), 3.0))}

    fresh = {"tied": torch.zeros(2, 2)}
    load(write_world(tmp_path, parts, 2), fresh)
    assert fresh["tied"].tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_a_missing_rank_is_blamed_on_storage_that_is_not_shared(tmp_path: Path) -> None:
    unfinished = tmp_path / f"{UNFINISHED}{step_name(7)}"
    _prepare(tmp_path, unfinished, 2)
    _write_rank(unfinished, task_of(rows_of(0)), 0)
    with pytest.raises(SaveError, match="which rank 1 wrote: checkpoints need storage that all hosts share"):
        _finish(tmp_path, unfinished, task_of({}), 2)


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_dealing_is_complete_disjoint_and_even(sizes: list[int], hands: int) -> None:
    items = [box(f"w{i}", (size,), (0,), (size,)) for i, size in enumerate(sizes)]
    dealt = _deal(items, hands)
    assert sorted(item.index.fqn for hand in dealt for item in hand) == sorted(item.index.fqn for item in items)
    loads = [sum(math.prod(item.tensor_data.chunk.sizes) for item in hand) for hand in dealt]  # type: ignore[union-attr]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_a_plan_lists_wide_dtypes_first_so_that_tensors_start_aligned() -> None:
    tensors = {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(3), "c": torch.zeros(1, dtype=torch.int64)}
    plan, _ = build_local_plan(tensors)
    assert [item.index.fqn for item in plan.items] == ["c", "b", "a"]
    assert len(_classes(plan.items, tensors)) == 1 <= MAX_CLASSES
