"""A checkpoint one tensor at a time: read by name, and written from what is made when its turn comes.

Beside load.py and save.py, for models that no host's memory holds. Both sides know shapes and dtypes beforehand from
tensors on the meta device. One process; a checkpoint that many ranks wrote reads the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem

from shardwright.checkpoint.folder import build_folder
from shardwright.checkpoint.integrity import DTYPES, CheckpointError, read_manifest, read_rank_manifest
from shardwright.checkpoint.load import fill
from shardwright.checkpoint.plan import LocalPlanner, build_local_plan, check_state
from shardwright.checkpoint.ranks import open_ranks
from shardwright.checkpoint.save import Keep, Task, write_checkpoint

RANK_MANIFESTS = 64  # kept while reading: neighbours among tensors lie with the same ranks


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a whole checkpoint by name; each is read, checked and made whole when it is asked for.

    `within` ("model.") picks the names that begin so and is left out of them. `meta` holds the same on the meta device.
    """

    def __init__(self, checkpoint: str | Path, within: str = "") -> None:
        self.checkpoint, self.within = Path(checkpoint), within
        self._manifest = read_manifest(self.checkpoint)
        self._read_rank = lru_cache(RANK_MANIFESTS)(read_rank_manifest)
        self.meta = {
            name.removeprefix(within): torch.empty(info.shape, dtype=DTYPES[info.dtype][0], device="meta")
            for name, info in self._manifest.tensors.items()
            if name.startswith(within)
        }
        if not self.meta:
            raise CheckpointError(f"{checkpoint} holds no tensor whose name begins with {within!r}")

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty_like(self.meta[name], device="cpu")
        with open_ranks(alone=True) as ranks:
            fill(self.checkpoint, self._manifest, {self.within + name: tensor}, ranks, self._read_rank)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)


class StreamPlanner(LocalPlanner):
    """A plan made from the meta device, whose tensors come from a function when they are written."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The tensor behind an item; nothing of it is kept."""
        return self._read(write_item.index.fqn)


def save_streamed(
    folder: str | Path,
    meta: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    state: Mapping[str, Any],
    *,
    step: int,
) -> Path:
    """As `save`, by this process alone and with no more than one tensor in memory: `read(name)` gives it when it is
    written, as `meta` says that it will be."""
    with open_ranks(alone=True) as ranks:
        build_folder(Path(folder))
        check_state(dict(state))
        plan, _ = build_local_plan(meta)
        return write_checkpoint(Path(folder), Task(step, dict(state), plan, StreamPlanner(read)), ranks, Keep())
