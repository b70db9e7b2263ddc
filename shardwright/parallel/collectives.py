"""Collectives that autograd passes through, in conjugate pairs: the backward pass of each is another one of them.

    gather      all-gather along a dim        <->  scatter_sum  reduce-scatter along a dim
    sum_parts   all-reduce, then identity     <->  sum_gradients  identity, then all-reduce

These are f, g (Shoeybi et al. 2019) and their forms for cut activations (Korthikanti et al. 2022), on plain tensors:
through DTensor each costs half a millisecond of Python more, longer than a small block computes. The collectives are
torch.distributed's own, which Dynamo turns into functional ones in a compiled graph. A pass may be run twice (by
recomputation, by zero-bubble schedules): nothing is saved, and no tensor given is written to. Any floating format;
sums are taken in it. Beside mesh.py; tensor.py and context.py say with it what travels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The parts of all ranks, joined: [.., n, ..] -> [.., ranks x n, ..] in `dim`; gradients are summed, then cut."""
    return _Gather.apply(x, dim, group)


def scatter_sum(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of the sum over ranks: [.., ranks x n, ..] -> [.., n, ..] in `dim`; gradients are joined."""
    return _ScatterSum.apply(x, dim, group)


def sum_parts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, of any shape; its gradient is the same on every rank, and that of each summand."""
    return _SumParts.apply(x, group)


def sum_gradients(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x` itself, of any shape, where each rank computes a part with the whole of it: gradients are summed."""
    return _SumGradients.apply(x, group)


def share_gradient(x: Tensor, ranks: int) -> Tensor:
    """`x` itself, of any shape, where `ranks` compute the same from it and their gradients are summed further down."""
    return _ShareGradient.apply(x, ranks)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return _scatter_sum(outer[0], ctx.dim, ctx.group), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _scatter_sum(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(outer[0], ctx.dim, ctx.group), None, None


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return outer[0], None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(outer[0], ctx.group), None


class _ShareGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return outer[0] / ctx.ranks, None


def _gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    ranks = group.size()
    parts = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    dist.all_gather_single(parts, x.contiguous(), group=group)
    return parts if dim == 0 else parts.unflatten(0, (ranks, -1)).movedim(0, dim).flatten(dim, dim + 1)


def _scatter_sum(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    parts = x if dim == 0 else x.unflatten(dim, (group.size(), -1)).movedim(dim, 0).flatten(0, 1)
    own = x.new_empty(parts.shape[0] // group.size(), *parts.shape[1:])
    dist.reduce_scatter_single(own, parts.contiguous(), group=group)
    return own


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
