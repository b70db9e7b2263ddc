"""Which rank writes which part of which tensor, found without sending a plan to anybody.

Above ranks.py, below save.py. DCP's own planner says which box of each logical tensor this rank holds (DTensor or
plain). DCP would then gather all plans on rank 0 to drop what several ranks hold alike, which grows with world size
times tensors. Here each rank sends a few 128-bit digests instead: its boxes are sorted into classes by placement,
ranks with the same digest of a class hold exactly the same boxes, and every one of them deals these out in the same
way. So each box is written at least once whatever the meshes are, the work of replicas is shared, and nothing is
gathered.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from shardwright.checkpoint.integrity import DTYPE_NAMES, DTYPES
from shardwright.checkpoint.ranks import Ranks

MAX_CLASSES = 16
RESERVED = "__metadata__"  # safetensors' own key


class LocalPlanner(DefaultSavePlanner):
    """DCP's planner for a flat dict of tensors. Once `staged` is set (name -> CPU tensor), that is what gets
    written."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.staged: dict[str, torch.Tensor] | None = None

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The bytes behind an item: this rank's box, detached, on whatever device it lives."""
        if self.staged is not None:
            return self.staged[write_item.index.fqn]
        data = super().resolve_data(write_item)
        assert isinstance(data, torch.Tensor), "check_tensors lets nothing else in"
        return data.detach()


def check_tensors(tensors: Mapping[str, Any]) -> None:
    """`ValueError` naming the first thing that cannot be stored as plain tensor bytes."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name or name == RESERVED:
            raise ValueError(f"tensor name {name!r} cannot be used in a checkpoint; give a non-empty string")
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}, not a tensor; other values belong into the state")
        if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or tensor.device.type == "meta":
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device.type}"
            raise ValueError(f"{name} cannot be stored ({kind}); expected a dense tensor of {', '.join(DTYPES)}")
        if isinstance(tensor, DTensor) and any(p.is_partial() for p in tensor.placements):
            raise ValueError(f"{name} holds partial sums ({tensor.placements}); reduce it before saving")


def check_state(value: Any, where: str = "state") -> None:
    """`ValueError` naming the first value that JSON would lose or change."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; JSON would turn it into text: use a string")
            check_state(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            check_state(item, f"{where}[{i}]")
    elif not (value is None or type(value) in (str, int, float, bool)):
        raise ValueError(f"{where} is a {type(value).__name__}; the state holds JSON values, tensors go beside it")


def build_local_plan(tensors: Mapping[str, torch.Tensor]) -> tuple[SavePlan, LocalPlanner]:
    """The boxes that this rank holds, each tensor name at most once, in the order of its file. Not collective."""
    planner = LocalPlanner()
    planner.set_up_planner(dict(tensors))
    plan = planner.create_local_plan()
    # An uneven DTensor is empty on some ranks: they have nothing to write. A tensor that is empty as a whole is kept.
    items = [item for item in plan.items if _num_elements(item) or not math.prod(_data(item).size)]
    return dataclasses.replace(plan, items=sorted(items, key=_file_order)), planner


def shared_plan(plan: SavePlan, tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> SavePlan:
    """What of `plan` this rank writes, when other ranks hold some of it too. A collective call over `ranks`."""
    if ranks.size == 1:
        return plan
    classes = _classes(plan.items, tensors)
    digests = torch.zeros(MAX_CLASSES, 2, dtype=torch.int64, device="cpu")
    for i, members in enumerate(classes):
        digests[i] = _digest(members)
    table = ranks.gather(digests)  # [ranks, classes, 2]
    own: list[WriteItem] = []
    for members, digest in zip(classes, digests, strict=False):
        holders = (table == digest).all(-1).any(-1).nonzero().flatten().tolist()
        own += _deal(members, len(holders))[holders.index(ranks.rank)]
    return dataclasses.replace(plan, items=sorted(own, key=_file_order))


def _classes(items: list[WriteItem], tensors: Mapping[str, torch.Tensor]) -> list[list[WriteItem]]:
    """Items grouped by what their replication depends on: whole tensors, and each kind of sharding over each mesh."""
    groups: dict[str, list[WriteItem]] = {}
    for item in items:
        tensor, key = tensors[item.index.fqn], "whole"
        if isinstance(tensor, DTensor) and any(not place.is_replicate() for place in tensor.placements):
            mesh = tensor.device_mesh
            key = f"{tensor.placements} over {mesh.mesh_dim_names} {tuple(mesh.shape)}"
        groups.setdefault(key, []).append(item)
    classes = [groups[key] for key in sorted(groups)]
    return classes[: MAX_CLASSES - 1] + [sum(classes[MAX_CLASSES - 1 :], [])] if len(classes) > MAX_CLASSES else classes


def _digest(items: list[WriteItem]) -> torch.Tensor:
    """128 bits of a class's boxes: equal on two ranks just where both hold the same boxes."""
    hasher = hashlib.blake2b(digest_size=16)
    for item in sorted(items, key=_file_order):
        data = _data(item)
        hasher.update(repr((item.index.fqn, [*data.size], [*data.chunk.offsets], [*data.chunk.sizes])).encode())
    return torch.frombuffer(bytearray(hasher.digest()), dtype=torch.int64)


def _deal(items: list[WriteItem], hands: int) -> list[list[WriteItem]]:
    """Deal boxes, the largest first, each to the hand that holds least: the same answer on every rank."""
    dealt: list[list[WriteItem]] = [[] for _ in range(hands)]
    heap = [(0, hand) for hand in range(hands)]
    for item in sorted(items, key=lambda item: (-_num_bytes(item), item.index.fqn)):
        load, hand = heap[0]
        dealt[hand].append(item)
        heapq.heapreplace(heap, (load + _num_bytes(item), hand))
    return dealt


def _file_order(item: WriteItem) -> tuple[int, str]:
    """Wide dtypes first, as safetensors does, so that every tensor starts aligned."""
    return -_data(item).properties.dtype.itemsize, item.index.fqn


def _data(item: WriteItem) -> Any:
    assert item.tensor_data is not None, "a flat dict of tensors gives tensor items only"
    return item.tensor_data


def _num_elements(item: WriteItem) -> int:
    return math.prod(_data(item).chunk.sizes)


def _num_bytes(item: WriteItem) -> int:
    return _num_elements(item) * _data(item).properties.dtype.itemsize
