"""Logical tensors of which this rank holds a part: where the part lies in the whole, and sums over all parts.

Optimizers update plain local parts, yet norms, means and matrices are those of whole tensors, whatever the layout; a
`Logical` beside each part says how. Beside mesh.py; torch's DTensor gives and takes the description.

One thing of DTensor's is not taken over. FSDP2 cuts the part that a tensor rank holds, and describes two cuts of one
dim as a strided shard. torch 2.13 reads that description differently where the sizes are uneven: of 13 rows over
tensor 2 x shard 3, or 50,257 over 2 x 4, it gives the last ranks other rows than they hold. Here mesh axes stand in
the order in which they cut, outermost first, where plain shards say the same and are read right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

_ROW = 4096  # elements whose squares are added up one after the other


@dataclass(frozen=True)
class Axis:
    """A mesh axis as this rank sees it."""

    group: dist.ProcessGroup
    size: int
    index: int


class CuttingOrder:
    """A mesh with its axes in the order in which they cut, outermost first, for tensors on `device`.

    That may be another than the mesh's own: masters may lie in host memory.
    """

    def __init__(self, mesh: DeviceMesh, order: Sequence[int], device: str) -> None:
        self._mesh, self._order, self._device = mesh, order, device
        self.axes = tuple(Axis(mesh.get_group(i), mesh.size(i), mesh.get_local_rank(i)) for i in order)

    @cached_property
    def mesh(self) -> DeviceMesh:
        """As DTensor takes it; no group is made. Not under FakeTensorMode, where torch makes no mesh."""
        given, order = self._mesh, self._order
        if order == sorted(order) and self._device == given.device_type:
            return given
        names = given.mesh_dim_names or tuple(f"axis{i}" for i in range(given.ndim))
        ranks = given.mesh.permute(*order).contiguous()
        groups = [axis.group for axis in self.axes]
        return DeviceMesh.from_group(groups, self._device, ranks, mesh_dim_names=tuple(names[i] for i in order))


class Cut(NamedTuple):
    """A dim split into chunks, one a rank of the axis."""

    axis: Axis
    dim: int


class Logical:
    """A logical tensor of which `local` is this rank's part; all of it in one process.

    shape: of the whole. cuts: outermost first; each splits what the one before left. shared: axes whose ranks all
    hold this same part.
    """

    def __init__(
        self, shape: torch.Size, local: Tensor, order: CuttingOrder | None = None, placements: Sequence[Placement] = ()
    ) -> None:
        self.shape, self.local = torch.Size(shape), local
        self._order, self._placements = order, tuple(placements)  # plain shards, or replicas
        axes = order.axes if order is not None else ()
        placed = [(axis, place) for axis, place in zip(axes, placements, strict=True) if axis.size > 1]
        self.cuts = tuple(Cut(axis, place.dim) for axis, place in placed if isinstance(place, Shard))
        self.shared = tuple(axis for axis, place in placed if place.is_replicate())

    @classmethod
    def whole(cls, tensor: Tensor) -> Logical:
        """A tensor that this process holds alone and in full."""
        return cls(tensor.shape, tensor)

    @classmethod
    def of(cls, tensor: Tensor) -> Logical:
        """A DTensor's, sharing its memory; a plain tensor is whole. ValueError where it holds partial sums."""
        if not isinstance(tensor, DTensor):
            return cls.whole(tensor)
        with torch.no_grad():
            local = tensor.to_local().detach()
        logical = cls(tensor.shape, local, *_in_cutting_order(tensor.device_mesh, tensor.placements, local))
        if logical.box()[1] != tuple(local.shape):
            raise ValueError(
                f"{list(tensor.shape)} as {tensor.placements} leaves {list(logical.box()[1])} here, "
                f"not {list(local.shape)}; shard it as torch.chunk does"
            )
        return logical

    @property
    def here(self) -> bool:
        """Whether this rank alone holds it, in full."""
        return not self.cuts and not self.shared

    @property
    def copies(self) -> int:
        """How many ranks hold this same part."""
        return math.prod(axis.size for axis in self.shared)

    def axes(self, dims: Iterable[int] | None = None) -> tuple[Axis, ...]:
        """The axes that cut any of `dims` (negative ones count from the end; None: any dim)."""
        if dims is None or not self.cuts:
            return tuple(cut.axis for cut in self.cuts)
        wanted = {dim % len(self.shape) for dim in dims}
        return tuple(cut.axis for cut in self.cuts if cut.dim in wanted)

    def chunk(self, depth: int, index: int | None = None) -> tuple[int, int]:
        """(start, length) in what the cuts before left, of the part that cut `depth` gives its rank `index`."""
        axis, dim = self.cuts[depth]
        length = self.part_shape(depth)[dim]
        size = -(-length // axis.size)
        start = min((axis.index if index is None else index) * size, length)
        return start, min(size, length - start)

    def part_shape(self, depth: int | None = None, last: int | None = None) -> tuple[int, ...]:
        """Shape after the first `depth` cuts (None: all); `last`: at that place of the last of their axes."""
        depth = len(self.cuts) if depth is None else depth
        shape = list(self.shape)
        for i, (axis, dim) in enumerate(self.cuts[:depth]):
            size = -(-shape[dim] // axis.size)
            index = axis.index if last is None or i < depth - 1 else last
            shape[dim] = min(size, max(shape[dim] - index * size, 0))
        return tuple(shape)

    def box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(offsets, sizes) of the part in the whole; an empty part begins where its dim ends."""
        offsets = [0] * len(self.shape)
        for depth, cut in enumerate(self.cuts):
            offsets[cut.dim] += self.chunk(depth)[0]
        return tuple(offsets), self.part_shape()

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor: a view of it."""
        assert whole.shape == self.shape, f"{list(whole.shape)} is not {list(self.shape)}"
        for dim, (start, length) in enumerate(zip(*self.box(), strict=True)):
            whole = whole.narrow(dim, start, length)
        return whole

    def gather(self, local: Tensor) -> Tensor:
        """The whole tensor of which every rank gives its part; call it on all ranks of the mesh."""
        wrapped = self.wrap(local)
        return wrapped.full_tensor() if isinstance(wrapped, DTensor) else local

    def sum(self, value: Tensor, dims: Iterable[int] | None = None) -> Tensor:
        """The sum of `value` over the ranks that hold other parts along `dims`; see `sum_all`."""
        return sum_all([Share(self, value, None if dims is None else tuple(dims))])[0]

    def keep(self, local: Tensor, dims: Sequence[int]) -> Logical:
        """A statistic of this tensor that has `dims` of it alone, such as a mean of every row; `local` is its part."""
        kept = [dim % len(self.shape) for dim in dims]
        places = [
            Shard(kept.index(place.dim)) if isinstance(place, Shard) and place.dim in kept else Replicate()
            for place in self._placements
        ]
        return Logical(torch.Size(self.shape[dim] for dim in kept), local, self._order, places)

    def wrap(self, local: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """A DTensor that lies as this one does (`dims`: as `keep` says) in the memory of `local`, for checkpoints.

        `local` itself where nothing is spread.
        """
        if dims is not None:
            return self.keep(local, dims).wrap(local)
        if self._order is None:
            return local
        assert tuple(local.shape) == self.part_shape(), f"{list(local.shape)} is no part of {list(self.shape)}"
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local, self._order.mesh, self._placements, run_check=False, shape=self.shape, stride=stride
        )


def _in_cutting_order(
    mesh: DeviceMesh, placements: Sequence[Placement], local: Tensor
) -> tuple[CuttingOrder, list[Placement]]:
    """The same description by plain shards alone, on a mesh of `local`'s device whose axes cut from left to right."""
    cutting: list[int] = []  # axes, outermost first
    plain: list[Placement] = [Replicate()] * mesh.ndim
    for i in reversed(range(mesh.ndim)):
        place = placements[i]
        if place.is_partial():
            raise ValueError(f"a tensor of partial sums ({placements}) has no parts; reduce it first")
        if mesh.size(i) > 1 and isinstance(place, Shard | _StridedShard):
            cutting.insert(_depth(mesh, place, [n if plain[n] == Shard(place.dim) else None for n in cutting]), i)
            plain[i] = Shard(place.dim)
    order = [i for i in range(mesh.ndim) if i not in cutting] + cutting
    device = mesh.device_type if local.is_meta else local.device.type
    return CuttingOrder(mesh, order, device), [plain[i] for i in order]


def _depth(mesh: DeviceMesh, place: Shard | _StridedShard, right: Sequence[int | None]) -> int:
    """Where a placement belongs among the axes to its `right` (in cutting order; None where of another dim).

    It cuts before those of its dim; a strided one after as many of them as make its split factor.
    """
    wanted, before = (place.split_factor if isinstance(place, _StridedShard) else 1), 1
    for depth, axis in enumerate(right):
        if axis is not None:
            if before == wanted:
                return depth
            before *= mesh.size(axis)
    if before != wanted:
        raise ValueError(
            f"{place}: no axes to its right on the mesh {mesh.mesh_dim_names} make {wanted} parts of that dim"
        )
    return len(right)


class Share(NamedTuple):
    """What this rank's part adds to a sum over the parts of a logical tensor that lie along `dims` (None: all)."""

    logical: Logical
    value: Tensor
    dims: tuple[int, ...] | None = None


def sum_all(shares: Sequence[Share]) -> list[Tensor]:
    """The sums, each shaped as its value. Those over the same axes travel together: one all-reduce an axis.

    Call it with the same tensors in the same order on all ranks of the mesh. Ranks that hold the same part get the
    same bits: groups of a GPU cluster may add in different orders, hence the broadcast.
    """
    results = [share.value for share in shares]
    together: dict[Any, list[int]] = {}
    for i, (logical, value, dims) in enumerate(shares):
        over = logical.axes(dims)
        if over:
            together.setdefault((value.dtype, over, logical.shared), []).append(i)
    for (_, over, shared), members in together.items():
        flat = torch.cat([results[i].reshape(-1) for i in members])
        for axis in over:
            dist.all_reduce(flat, group=axis.group)
        for axis in shared:
            dist.broadcast(flat, group=axis.group, group_src=0)
        for i, values in zip(members, flat.split([results[i].numel() for i in members]), strict=True):
            results[i] = values.view(results[i].shape)
    return results


def norm_here(tensor: Tensor) -> Tensor:
    """2-norm (0-dim) of all elements of what lies on this device.

    On a CPU torch adds their squares up one after the other: in float32 that of 10^8 elements comes out 1 % small, and
    another layout's by another amount. Row after row it is right to rounding, in the same time.
    """
    whole = tensor.numel() // _ROW * _ROW
    if tensor.device.type != "cpu" or not whole:
        return torch.linalg.vector_norm(tensor)
    flat = tensor.reshape(-1)
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    return torch.cat([rows, rest.view(1)]).square().sum().sqrt()


def norm_all(tensors: Sequence[tuple[Logical, Tensor]]) -> list[Tensor]:
    """2-norms (0-dim) of logical tensors by their parts."""
    norms = [norm_here(part) for _, part in tensors]
    spread = [i for i, (logical, _) in enumerate(tensors) if logical.cuts]
    squares = sum_all([Share(tensors[i][0], norms[i].square()) for i in spread])
    for i, square in zip(spread, squares, strict=True):
        norms[i] = square.sqrt()
    return norms


def mean_all(tensors: Sequence[tuple[Logical, Tensor, int]]) -> list[Tensor]:
    """Means over one dim of logical tensors by their parts; that dim is left out."""
    return sum_all([Share(logical, _mean_share(logical, part, dim), (dim,)) for logical, part, dim in tensors])


def _mean_share(logical: Logical, part: Tensor, dim: int) -> Tensor:
    return part.sum(dim=dim) / logical.shape[dim] if logical.axes((dim,)) else part.mean(dim=dim)
