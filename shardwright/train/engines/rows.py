"""Whole tensors as stretches of rows, one a rank, in host memory: how an engine's state meets a checkpoint.

Engines shard in their own ways (DeepSpeed cuts flat buffers in the middle of tensors), of which a checkpoint knows
nothing. So each tensor is made whole once, for a moment, on every rank, and each rank keeps its rows; nobody ever
holds more than one whole tensor and its own share of all.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from shardwright.parallel.logical import CuttingOrder, Logical
from shardwright.parallel.mesh import World


class Rows:
    """The rows of this rank, of tensors spread over all ranks of a world."""

    def __init__(self, world: World) -> None:
        self.size, self.device = world.size, world.device
        mesh = DeviceMesh("cpu", list(range(world.size)), mesh_dim_names=("rows",)) if world.size > 1 else None
        self._order = CuttingOrder(mesh, [0], "cpu") if mesh is not None else None

    def logical(self, whole: Tensor) -> Logical:
        """How a tensor of this shape is spread, with a copy of this rank's part in host memory."""
        if self._order is None or whole.ndim == 0:
            return Logical.whole(whole.detach().to("cpu", copy=True))
        frame = Logical(whole.shape, whole.new_empty(0), self._order, [Shard(0)])
        part = frame.part(whole.detach()).to("cpu", copy=True).contiguous()
        return Logical(whole.shape, part, self._order, [Shard(0)])

    def spread(self, whole: Tensor) -> Tensor:
        """This rank's part as a checkpoint takes it: a DTensor over all ranks, or a plain tensor where none is cut."""
        logical = self.logical(whole)
        return logical.wrap(logical.local)

    def whole(self, spread: Tensor) -> Tensor:
        """The tensor that `spread` gave the parts of, on the device of the run. Every rank has to call it."""
        if not isinstance(spread, DTensor):
            return spread.to(self.device)
        local, shape = spread.to_local(), spread.shape
        height = -(-shape[0] // self.size)
        own = torch.zeros((height, *shape[1:]), dtype=local.dtype, device=self.device)
        own[: local.shape[0]].copy_(local)
        gathered = own.new_empty((height * self.size, *shape[1:]))
        dist.all_gather_single(gathered, own)
        return gathered[: shape[0]]
