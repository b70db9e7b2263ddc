"""Writing a checkpoint: tensors into safetensors files by DCP's plan, then manifests, then names.

Above plan.py and folder.py, below background.py. The order is what makes it safe to be killed anywhere:

    1. rank 0 clears what earlier interrupted saves left and makes `unfinished_step_N`
    2. every rank writes and syncs its tensor file and its manifest of checksums
    3. rank 0 reads those manifests one by one, checks that they cover every tensor, writes manifest.json, then the
       marker complete.json
    4. one rename gives the folder its name; `latest` moves; only now may older checkpoints go

After each of them the ranks agree: a failure on one fails the save on all, in one line, and removes the unfinished
folder.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from shardwright import __version__
from shardwright.checkpoint.folder import (
    UNFINISHED,
    apply_cleaning,
    apply_publishing,
    apply_retention,
    build_folder,
    next_serial,
    save_error,
    step_name,
    sync_folder,
    write_synced,
)
from shardwright.checkpoint.integrity import (
    BLOCK_BYTES,
    DTYPE_NAMES,
    DTYPES,
    MANIFEST,
    MARKER,
    RANKS_PER_FOLDER,
    CheckpointError,
    Chunk,
    Manifest,
    RankEntry,
    RankManifest,
    SaveError,
    TensorInfo,
    decode_rank,
    encode_manifest,
    encode_marker,
    encode_rank,
    rank_path,
    sha256,
)
from shardwright.checkpoint.plan import LocalPlanner, build_local_plan, check_state, check_tensors, shared_plan
from shardwright.checkpoint.ranks import Ranks, open_ranks
from shardwright.log import get_logger


@dataclass(frozen=True)
class Keep:
    """What stays after a save: the newest `last` (None: all) and those of steps that `every` divides."""

    last: int | None = None
    every: int | None = None


@dataclass(frozen=True)
class Task:
    """One rank's part of a save, ready to be written."""

    step: int
    state: dict[str, Any]
    plan: SavePlan
    planner: LocalPlanner


def save(
    folder: str | Path,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    *,
    step: int,
    keep_last: int | None = None,
    keep_every: int | None = None,
    group: dist.ProcessGroup | None = None,
    alone: bool = False,
) -> Path:
    """Write `folder/step_00000100` and wait until it is whole on the disk; returns its path.

    `tensors` are logical tensors by name: plain tensors (every rank that has the name holds the same values) or
    DTensors, on any device. `state` is JSON; rank 0's is kept. Where torch.distributed runs, every rank has to call
    this (`group`: a gloo group to use, by default a new one of the whole world; `alone`: this process only, whatever
    runs beside it). `SaveError` on a failure, on every rank, in one line; `ValueError` for what cannot be stored.
    """
    with open_ranks(group, alone=alone) as ranks:
        ranks.together("opening the folder", partial(build_folder, Path(folder)) if ranks.rank == 0 else None)
        task = build_task(tensors, state, step, ranks)
        return write_checkpoint(Path(folder), task, ranks, Keep(keep_last, keep_every))


def build_task(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], step: int, ranks: Ranks) -> Task:
    """Check what is to be saved, copy the state, and find this rank's part of the tensors. Collective."""

    def prepare() -> tuple[dict[str, Any], SavePlan, LocalPlanner]:
        check_tensors(tensors)
        check_state(dict(state))
        return json.loads(json.dumps(dict(state))), *build_local_plan(tensors)

    prepared = ranks.together(f"preparing to save step {step}", prepare)
    assert prepared is not None
    copied, plan, planner = prepared
    steps = ranks.gather(torch.tensor([step], device="cpu"))
    if int(steps.min()) != int(steps.max()):
        raise ValueError(f"ranks save different steps at once ({int(steps.min())} and {int(steps.max())})")
    return Task(step, copied, shared_plan(plan, tensors, ranks), planner)


def write_checkpoint(folder: Path, task: Task, ranks: Ranks, keep: Keep) -> Path:
    """The four phases of the module's docstring. Collective; fit for a thread if `ranks` has a group of its own."""
    unfinished = folder / f"{UNFINISHED}{step_name(task.step)}"
    doing = f"saving step {task.step}"

    def phase(work: Callable[[], Any], *, everywhere: bool = False) -> Any:
        mine = everywhere or ranks.rank == 0
        return ranks.together(doing, partial(_guarded, work, folder, task.step) if mine else None)

    try:
        phase(partial(_prepare, folder, unfinished, ranks.size))
        phase(partial(_write_rank, unfinished, task, ranks.rank), everywhere=True)
        phase(partial(_finish, folder, unfinished, task, ranks.size))
    except CheckpointError as error:
        if ranks.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)  # on a full disk, the space is needed
        raise error if isinstance(error, SaveError) else SaveError(str(error)) from error
    if ranks.rank == 0:
        _tidy(folder, keep)
    return folder / step_name(task.step)


def _guarded(work: Callable[[], Any], folder: Path, step: int) -> Any:
    try:
        return work()
    except SaveError:
        raise
    except Exception as error:
        raise save_error(error, folder, step) from error


def _prepare(folder: Path, unfinished: Path, num_ranks: int) -> None:
    apply_cleaning(folder)
    for first in range(0, num_ranks, RANKS_PER_FOLDER):
        rank_path(unfinished, first, "").parent.mkdir(parents=True)


def _write_rank(unfinished: Path, task: Task, rank: int) -> None:
    writer = RankWriter(unfinished, rank)
    writer.write_data(task.plan, task.planner).wait()
    write_synced(rank_path(unfinished, rank, ".json"), encode_rank(writer.manifest))
    sync_folder(rank_path(unfinished, rank, "").parent)


def _finish(folder: Path, unfinished: Path, task: Task, num_ranks: int) -> None:
    tensors, entries = _survey(unfinished, num_ranks)
    versions = {"shardwright": __version__, "torch": torch.__version__, "safetensors": safetensors.__version__}
    manifest = Manifest(task.step, next_serial(folder), task.state, tensors, tuple(entries), versions)
    data = encode_manifest(manifest)
    write_synced(unfinished / MANIFEST, data)
    sync_folder(unfinished / "tensors")
    sync_folder(unfinished)
    write_synced(unfinished / MARKER, encode_marker(manifest, data))
    sync_folder(unfinished)
    apply_publishing(unfinished, step_name(task.step))


def _tidy(folder: Path, keep: Keep) -> None:
    """Retention. The new checkpoint is whole by now, so a failure here is worth a warning and no more."""
    try:
        apply_retention(folder, keep.last, keep.every)
    except OSError as error:
        get_logger().warning("checkpoint: an old checkpoint in %s could not be removed (%s)", folder, error.strerror)


def _survey(unfinished: Path, num_ranks: int) -> tuple[dict[str, TensorInfo], list[RankEntry]]:
    """Table of all tensors and of all ranks' files, from one rank's manifest at a time."""
    infos: dict[str, TensorInfo] = {}
    volumes: dict[str, int] = {}
    entries: list[RankEntry] = []
    for rank in range(num_ranks):
        data = _read_other_rank(unfinished, rank)
        manifest = decode_rank(data)
        entries.append(RankEntry(len(data), sha256(data), manifest.file_bytes))
        for chunk in manifest.chunks:
            infos[chunk.name] = _merged(infos.get(chunk.name), chunk, rank)
            volumes[chunk.name] = volumes.get(chunk.name, 0) + chunk.num_elements
    odd = {name for name, info in infos.items() if volumes[name] != math.prod(info.shape)}
    _check_cover(unfinished, odd, infos)
    return dict(sorted(infos.items())), entries


def _read_other_rank(unfinished: Path, rank: int) -> bytes:
    path = rank_path(unfinished, rank, ".json")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise SaveError(
            f"rank 0 cannot see {path}, which rank {rank} wrote: checkpoints need storage that all hosts share"
        ) from None


def _merged(info: TensorInfo | None, chunk: Chunk, rank: int) -> TensorInfo:
    """A tensor's entry with one more holder; ranges of ranks stay short where neighbours hold it."""
    if info is None:
        return TensorInfo(chunk.shape, chunk.dtype, ((rank, rank),))
    if (info.shape, info.dtype) != (chunk.shape, chunk.dtype):
        raise SaveError(
            f"{chunk.name} is {info.dtype} {list(info.shape)} on rank {info.ranks[0][0]} and {chunk.dtype} "
            f"{list(chunk.shape)} on rank {rank}; one name means one tensor"
        )
    first, last = info.ranks[-1]
    tail = ((first, rank),) if last >= rank - 1 else ((first, last), (rank, rank))
    return TensorInfo(info.shape, info.dtype, info.ranks[:-1] + tail)


def _check_cover(unfinished: Path, names: set[str], infos: dict[str, TensorInfo]) -> None:
    """Look again at tensors whose boxes do not add up: copies held under two layouts are fine, gaps are not."""
    boxes: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = {name: set() for name in names}
    for rank in sorted({r for name in names for first, last in infos[name].ranks for r in range(first, last + 1)}):
        for chunk in decode_rank(_read_other_rank(unfinished, rank)).chunks:
            if chunk.name in boxes:
                boxes[chunk.name].add((chunk.offsets, chunk.sizes))
    for name, found in sorted(boxes.items()):
        held, whole = sum(math.prod(sizes) for _, sizes in found), math.prod(infos[name].shape)
        if held != whole:
            raise SaveError(
                f"{name} was given in parts that make {held} of {whole} elements; each name must be one tensor, "
                "whole on a rank or a DTensor over all its ranks"
            )


class RankWriter(HuggingFaceStorageWriter):
    """DCP's safetensors storage for one rank, streamed: `manifest` holds the checksums afterwards.

    The stock writer first serialises a rank's whole share into one bytes object with the interpreter lock held (0.2 s
    for 168 MB), which would stop the training step. Here bytes go from the tensors to the file a block at a time,
    checksummed on the way. The files are the same: the stock reader, or safetensors alone, reads them.
    """

    def __init__(self, checkpoint: Path, rank: int) -> None:
        super().__init__(str(checkpoint), save_distributed=True)
        self.file, self.rank_number = rank_path(checkpoint, rank, ".safetensors"), rank
        self.manifest = RankManifest(rank, 0, 0, 0, ())

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, synced; no file where there is nothing to write."""
        chunks: list[Chunk] = []
        if plan.items:
            header, starts = build_header(plan.items)
            with open(self.file, "xb") as stream:
                stream.write(header)
                for item, start in zip(plan.items, starts, strict=True):
                    sums = _write_tensor(stream, planner.resolve_data(item))  # type: ignore[arg-type]
                    chunks.append(_chunk(item, start, sums))
                size = stream.tell()
                stream.flush()
                os.fsync(stream.fileno())
            self.manifest = RankManifest(self.rank_number, size, len(header), zlib.crc32(header), tuple(chunks))
        future: Future[list[WriteResult]] = Future()
        pairs = zip(plan.items, chunks, strict=True)
        future.set_result([WriteResult(item.index, chunk.num_bytes, None) for item, chunk in pairs])
        return future


def build_header(items: Iterable[WriteItem]) -> tuple[bytes, list[int]]:
    """The safetensors header as DCP writes it (boxes stand in `DCP_SHARDING_INFO`), and where each tensor starts."""
    entries: dict[str, Any] = {}
    places: dict[str, Any] = {}
    ends = [0]
    for item in items:
        data = item.tensor_data
        assert data is not None and item.index.fqn not in entries, "each name at most once a rank"
        dtype = data.properties.dtype
        ends.append(ends[-1] + math.prod(data.chunk.sizes) * dtype.itemsize)
        code = DTYPES[DTYPE_NAMES[dtype]][1]
        entries[item.index.fqn] = {"dtype": code, "shape": [*data.chunk.sizes], "data_offsets": ends[-2:]}
        places[item.index.fqn] = {"saved_offsets": [*data.chunk.offsets]}
    metadata = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, [len(header) + end for end in ends[:-1]]


def _write_tensor(stream: BinaryIO, tensor: torch.Tensor) -> tuple[int, ...]:
    """Write a tensor's bytes, row-major; returns the checksum of each block. Both calls free the interpreter lock."""
    data = memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    sums = []
    for start in range(0, len(data), BLOCK_BYTES):
        block = data[start : start + BLOCK_BYTES]
        sums.append(zlib.crc32(block))
        stream.write(block)
    return tuple(sums)


def _chunk(item: WriteItem, start: int, sums: tuple[int, ...]) -> Chunk:
    data = item.tensor_data
    assert data is not None
    box = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
    return Chunk(item.index.fqn, tuple(data.size), *box, DTYPE_NAMES[data.properties.dtype], start, sums)
