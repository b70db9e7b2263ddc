"""Reading a checkpoint into tensors that exist already, whatever layout wrote it, checking every byte on the way.

Above integrity.py. Before any tensor is touched, every name, shape and dtype is accounted for over all ranks; then
DCP's planner says which boxes of which files this rank needs, and those are read, checked block by block, and copied
in place. What is opened: the marker, manifests, and the tensor files that they list, whose paths come from rank
numbers. JSON and raw tensor bytes are all that is parsed; no path leads to a pickle, whatever else lies in the
folder.

A rank reads the manifests of those ranks that hold what it needs, its own place in the old layout first, and stops when
its boxes are covered: under the same layout that is a few, whatever the world's size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultLoadPlanner, HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor
from torch.futures import Future

from shardwright.checkpoint.integrity import (
    DTYPE_NAMES,
    DTYPES,
    CheckpointError,
    Chunk,
    Manifest,
    RankEntry,
    RankManifest,
    TensorInfo,
    open_tensor_file,
    rank_path,
    read_checked,
    read_manifest,
    read_rank_manifest,
)
from shardwright.checkpoint.ranks import Ranks, open_ranks
from shardwright.log import Bar, get_logger, progress

GROUP_BYTES = 32 << 20  # read, checked and copied at a time
QUIET_BYTES = 2 << 30  # less than this takes about two seconds: no bar
NAMES_SHOWN = 8
ReadRank = Callable[[Path, int, RankEntry], RankManifest]


def load(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    partial_load: bool = False,
    within: str = "",
    cast: bool = False,
    group: dist.ProcessGroup | None = None,
    alone: bool = False,
) -> dict[str, Any]:
    """Fill `tensors` (plain or DTensor, any device) in place from the checkpoint folder `path`; returns its state.

    Logs "restored N of N tensors". `CheckpointError` before anything is touched where a name is missing in the
    checkpoint, where a stored one is asked for by no rank (unless `partial_load`), or where a shape or dtype (unless
    `cast`) differs. `within` leaves out of account stored names that do not begin so. `DamagedError` where bytes do not
    match their checksums: it names file and tensor, on every rank, and the tensors are then partly filled. Where
    torch.distributed runs, every rank has to call this; `group` and `alone` as for `save`.
    """
    path, begin = Path(path), time.monotonic()
    with open_ranks(group, alone=alone) as ranks:
        doing = f"loading {path}"
        manifest = ranks.together(doing, partial(read_manifest, path))
        assert manifest is not None
        asked = _union_of_names(manifest, tensors, ranks)
        stored = {name: info for name, info in manifest.tensors.items() if name.startswith(within)}
        ranks.together(doing, partial(_check_match, path, stored, tensors, asked, partial_load, cast))
        count = ranks.together(doing, partial(fill, path, manifest, tensors, ranks))
    get_logger().info(
        "checkpoint: restored %d of %d tensors from %s (%.1f MB on this rank, %.1f s)",
        len(asked), len(stored), path, (count or 0) / 1e6, time.monotonic() - begin,
    )  # fmt: skip
    return manifest.state


def _union_of_names(manifest: Manifest, tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> set[str]:
    """Stored names that any rank asks for (a pipeline stage asks for its own layers)."""
    names = sorted(manifest.tensors)
    mask = torch.tensor([name in tensors for name in names], dtype=torch.int32, device="cpu")
    found = ranks.union(mask).tolist() if names else []
    return {name for name, hit in zip(names, found, strict=True) if hit}


def _check_match(
    path: Path,
    stored: Mapping[str, TensorInfo],
    tensors: Mapping[str, torch.Tensor],
    asked: set[str],
    partial_load: bool,
    cast: bool,
) -> None:
    """Refuse, naming everything that does not fit, before anything is changed."""
    missing = sorted(set(tensors) - set(stored))
    unexpected = [] if partial_load else sorted(set(stored) - asked)
    different = sorted(_differences(stored, tensors, cast))
    if not (missing or unexpected or different):
        return
    lists = [
        ("missing in the checkpoint", missing),
        ("in the checkpoint but not asked for", unexpected),
        ("different", different),
    ]
    parts = [f"{len(names)} {what}: {_some(names)}" for what, names in lists if names]
    good = len(asked) - len(different)
    raise CheckpointError(
        f"{path} does not fit ({good} of {len(stored)} tensors do): {'; '.join(parts)}; "
        "use the config that wrote it, or another checkpoint"
    )


def _differences(stored: Mapping[str, TensorInfo], tensors: Mapping[str, torch.Tensor], cast: bool) -> Iterator[str]:
    for name, tensor in tensors.items():
        info = stored.get(name)
        if info is None:
            continue
        dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        if tuple(tensor.shape) != info.shape:
            yield f"{name} (stored {list(info.shape)}, asked {list(tensor.shape)})"
        elif dtype != info.dtype and not cast:
            yield f"{name} (stored {info.dtype}, asked {dtype})"
        elif tensor.device.type == "meta":
            yield f"{name} (asked on the meta device: it has no memory to fill)"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def fill(
    path: Path,
    manifest: Manifest,
    tensors: Mapping[str, torch.Tensor],
    ranks: Ranks,
    read_rank: ReadRank = read_rank_manifest,
) -> int:
    """Read this rank's boxes of tensors that fit; returns their bytes. `read_rank` may keep the ranks' manifests."""
    reader = CheckedReader(path, manifest, wanted_boxes(tensors), ranks, read_rank)
    planner = TensorPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=ranks.rank == 0)
    reader.set_up_storage_reader(metadata, ranks.rank == 0)
    plan = planner.create_local_plan()
    total = sum(_num_bytes(manifest, item) for item in plan.items)
    quiet = True if total < QUIET_BYTES else None
    with progress(total, "bytes", "restoring", quiet=quiet) as reader.bar, torch.no_grad():
        reader.read_data(planner.finish_plan(plan), planner).wait()
    return total


def _num_bytes(manifest: Manifest, item: ReadItem) -> int:
    return math.prod(item.lengths) * DTYPES[manifest.tensors[item.dest_index.fqn].dtype][0].itemsize


def wanted_boxes(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[ChunkStorageMetadata]]:
    """The boxes of logical tensors that this rank holds memory for."""
    boxes = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            on_mesh = tensor.device_mesh.get_coordinate() is not None
            boxes[name] = tensor.__create_chunk_list__() if on_mesh else []
        else:
            boxes[name] = [ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.shape)]
    return boxes


class TensorPlanner(DefaultLoadPlanner):
    """DCP's planner without the one path that unpickles."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """Never: DCP's own would call torch.load(weights_only=False) here."""
        raise CheckpointError(f"{read_item.dest_index.fqn} is not a tensor; pickled objects are never loaded")


class CheckedReader(HuggingFaceStorageReader):
    """DCP's safetensors storage, located by this project's manifests and checked by their checksums.

    The stock reader opens the file of every rank to learn where tensors lie, and checks nothing.
    """

    def __init__(
        self,
        checkpoint: Path,
        manifest: Manifest,
        wanted: Mapping[str, list[ChunkStorageMetadata]],
        ranks: Ranks,
        read_rank: ReadRank = read_rank_manifest,
    ) -> None:
        super().__init__(str(checkpoint))
        self.read_rank = read_rank
        self.checkpoint, self.manifest, self.wanted = checkpoint, manifest, wanted
        self.guess = ranks.rank * len(manifest.ranks) // ranks.size  # who held this rank's place when it was written
        self.bar = Bar(None, "bytes", "restoring")
        self.places: dict[MetadataIndex, tuple[int, Chunk]] = {}  # box -> rank whose file holds it, its place there
        self.files: dict[int, RankManifest] = {}

    def read_metadata(self) -> Metadata:
        """Only the boxes that overlap what this rank wants."""
        table = {
            name: TensorStorageMetadata(TensorProperties(dtype=_dtype(info)), torch.Size(info.shape), [])
            for name, info in self.manifest.tensors.items()
            if name in self.wanted
        }
        lacking = {name: sum(math.prod(box.sizes) for box in boxes) for name, boxes in self.wanted.items()}
        lacking = {name: count for name, count in lacking.items() if count}
        for rank in sorted(range(len(self.manifest.ranks)), key=lambda rank: abs(rank - self.guess)):
            if not lacking:
                break
            if any(first <= rank <= last for name in lacking for first, last in self.manifest.tensors[name].ranks):
                self._look_into(rank, table, lacking)
        if lacking:
            raise CheckpointError(f"{self.checkpoint} holds no complete copy of {_some(sorted(lacking))}")
        return Metadata(dict(table), storage_data=self.places)

    def _look_into(self, rank: int, table: dict[str, TensorStorageMetadata], lacking: dict[str, int]) -> None:
        manifest = self.read_rank(self.checkpoint, rank, self.manifest.ranks[rank])
        for chunk in manifest.chunks:
            index = MetadataIndex(chunk.name, chunk.offsets)
            if chunk.name not in lacking or index in self.places:
                continue
            box = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            overlap = _overlap(table[chunk.name], box, self.wanted[chunk.name])
            if overlap:
                table[chunk.name].chunks.append(box)
                self.places[index] = rank, chunk
                self.files[rank] = manifest
                lacking[chunk.name] -= overlap
                if not lacking[chunk.name]:
                    del lacking[chunk.name]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read each box that the plan names, file by file, checked before it is copied."""
        by_rank: dict[int, list[ReadItem]] = {}
        for item in plan.items:
            by_rank.setdefault(self.places[item.storage_index][0], []).append(item)
        for rank, items in sorted(by_rank.items()):
            path = rank_path(self.checkpoint, rank, ".safetensors")
            with open_tensor_file(path, self.files[rank]) as stream:
                for item in sorted(items, key=lambda item: self.places[item.storage_index][1].start):
                    target = planner.resolve_tensor(item).detach()
                    self._read_box(stream, path, self.places[item.storage_index][1], item, target)
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_box(self, stream: BinaryIO, path: Path, chunk: Chunk, item: ReadItem, target: torch.Tensor) -> None:
        """Copy part of a stored box into `target`, a few rows (of dim 0) at a time. A scalar is one row."""
        dtype = DTYPES[chunk.dtype][0]
        row_shape = chunk.sizes[1:]
        row_bytes = math.prod(row_shape) * dtype.itemsize
        first, rows = (item.storage_offsets[0], item.lengths[0]) if chunk.sizes else (0, 1)
        target = target.view(1) if not chunk.sizes else target
        at_once = max(1, GROUP_BYTES // row_bytes)
        for row in range(0, rows, at_once):
            count = min(at_once, rows - row)
            data = read_checked(stream, path, chunk, (first + row) * row_bytes, (first + row + count) * row_bytes)
            source = torch.frombuffer(data, dtype=dtype).view(count, *row_shape)
            for dim in range(1, len(chunk.sizes)):
                source = source.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
            target.narrow(0, row, count).copy_(source)
            self.bar.advance(source.numel() * dtype.itemsize)


def _dtype(info: TensorInfo) -> torch.dtype:
    return DTYPES[info.dtype][0]


def _overlap(table: TensorStorageMetadata, box: ChunkStorageMetadata, wanted: list[ChunkStorageMetadata]) -> int:
    """Elements that a stored box has in common with wanted ones."""
    one = TensorStorageMetadata(table.properties, table.size, [box])
    return sum(math.prod(item.lengths) for item in create_read_items_for_chunk_list("", one, wanted))
