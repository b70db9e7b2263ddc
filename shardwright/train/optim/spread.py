"""How a step's work is cut up where tensors are spread over ranks: batches whose sums travel together, and matrices
dealt out whole.

Beside guarded.py, below the rules that use it. Whatever is decided here follows from logical shapes, so that all ranks
of a mesh decide alike and meet in the same collectives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.parallel.logical import Axis, Logical

# Elements of this rank's parts that one batch updates: what it needs beside them exists for so many at a time.
MOST_TOGETHER = 2**22

Shapes = list[tuple[int, ...]]


def logical_by_parameter(
    groups: Sequence[Mapping[str, Any]], given: Mapping[Tensor, Logical] | None
) -> dict[Tensor, Logical]:
    """The logical tensor of every parameter of the groups: the `given` one, or whole where none is."""
    given = given or {}
    return {p: given.get(p) or Logical.whole(p) for group in groups for p in group["params"]}


def batch_by_size(logicals: Sequence[Logical]) -> Iterator[list[int]]:
    """Indices of tensors to update together, in order: MOST_TOGETHER elements of parts, or one tensor."""
    batch: list[int] = []
    size = 0
    for i, logical in enumerate(logicals):
        part = largest_part(logical)
        if batch and size + part > MOST_TOGETHER:
            yield batch
            batch, size = [], 0
        batch.append(i)
        size += part
    if batch:
        yield batch


def largest_part(logical: Logical) -> int:
    """Elements of the largest part that any rank holds, nearly."""
    return logical.shape.numel() // math.prod(cut.axis.size for cut in logical.cuts)


class Dealing:
    """Logical tensors dealt out to the ranks that hold their parts: each rank gets its hand of them whole.

    Axis by axis, so that the mesh's own groups do: the ranks of an axis deal what they hold together, each tensor to
    one of them, and exchange their parts of it. Where an axis shares, all hold the same and only results travel. All
    tensors must be cut by the same axes. hand: indices of the tensors that this rank gets.
    """

    def __init__(self, logicals: Sequence[Logical]) -> None:
        self.logicals = logicals
        hand = list(range(len(logicals)))
        self.shared: list[tuple[Axis, list[int]]] = []
        for axis in logicals[0].shared:
            self.shared.append((axis, hand))
            hand = hand[axis.index :: axis.size]
        self.needed = hand  # of these the parts are asked for
        self.cuts: list[tuple[Axis, int, list[int]]] = []  # innermost first
        for depth in reversed(range(len(logicals[0].cuts))):
            axis = logicals[0].cuts[depth].axis
            self.cuts.append((axis, depth, hand))
            hand = hand[axis.index :: axis.size]
        self.hand = hand

    def collect(self, parts: Mapping[int, Tensor], dtype: torch.dtype) -> dict[int, Tensor]:
        """Whole tensors of this rank's hand, from the parts of those `needed`."""
        parts = dict(parts)
        for axis, depth, hand in self.cuts:
            mine = hand[axis.index :: axis.size]
            sent = [[parts[i] for i in hand[to :: axis.size]] for to in range(axis.size)]
            shapes = [[self.logicals[i].part_shape(depth + 1, at) for i in mine] for at in range(axis.size)]
            got = self._exchange(axis, sent, shapes, dtype)
            dims = [self.logicals[i].cuts[depth].dim for i in mine]
            parts = {i: torch.cat([row[k] for row in got], dim=dims[k]) for k, i in enumerate(mine)}
        return parts

    def scatter(self, wholes: Mapping[int, Tensor], dtype: torch.dtype) -> dict[int, Tensor]:
        """This rank's part of every tensor, from the whole ones of each hand."""
        parts = dict(wholes)
        for axis, depth, hand in reversed(self.cuts):
            mine = hand[axis.index :: axis.size]
            sent = [[self._chunk(parts[i], i, depth, to) for i in mine] for to in range(axis.size)]
            parts = self._deal_back(axis, hand, sent, depth + 1, dtype)
        for axis, hand in reversed(self.shared):
            same = [parts[i] for i in hand[axis.index :: axis.size]]
            parts = self._deal_back(axis, hand, [same] * axis.size, None, dtype)
        return parts

    def _chunk(self, tensor: Tensor, i: int, depth: int, index: int) -> Tensor:
        return tensor.narrow(self.logicals[i].cuts[depth].dim, *self.logicals[i].chunk(depth, index))

    def _deal_back(
        self, axis: Axis, hand: list[int], sent: list[list[Tensor]], depth: int | None, dtype: torch.dtype
    ) -> dict[int, Tensor]:
        hands = [hand[at :: axis.size] for at in range(axis.size)]
        shapes = [[self.logicals[i].part_shape(depth) for i in theirs] for theirs in hands]
        got = self._exchange(axis, sent, shapes, dtype)
        return {i: part for theirs, row in zip(hands, got, strict=True) for i, part in zip(theirs, row, strict=True)}

    def _exchange(
        self, axis: Axis, sent: list[list[Tensor]], shapes: list[Shapes], dtype: torch.dtype
    ) -> list[list[Tensor]]:
        """One all-to-all: row `at` of `sent` goes to that rank of the axis, row `at` of what returns came from it."""
        device = self.logicals[0].local.device
        flat = [part.reshape(-1).to(dtype) for row in sent for part in row]
        sending = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=device)
        sizes = [[math.prod(shape) for shape in row] for row in shapes]
        received = torch.empty(sum(map(sum, sizes)), dtype=dtype, device=device)
        outgoing = [sum(part.numel() for part in row) for row in sent]
        dist.all_to_all_single(received, sending, [sum(row) for row in sizes], outgoing, group=axis.group)
        pieces = iter(received.split([size for row in sizes for size in row]))
        return [[next(pieces).view(shape) for shape in row] for row in shapes]


def deal(logicals: Sequence[Logical], most: int) -> Iterator[tuple[list[int], Dealing]]:
    """Dealings of tensors that are spread, with their indices, so that no rank holds much more than `most` elements.

    Tensors of one shape stand together, and so every rank gets as many of a shape as the others, or one more.
    """
    classes: dict[tuple[object, ...], list[int]] = {}
    for i, logical in enumerate(logicals):
        classes.setdefault((logical.shared, logical.axes()), []).append(i)
    for members in classes.values():
        members.sort(key=lambda i: logicals[i].shape)
        first = logicals[members[0]]
        ranks = first.copies * math.prod(cut.axis.size for cut in first.cuts)
        start = size = 0
        for stop, i in enumerate(members):
            part = max(largest_part(logicals[i]), logicals[i].shape.numel() // ranks)
            if stop - start >= ranks and size + part > most:
                yield _dealt(logicals, members[start:stop])
                start, size = stop, 0
            size += part
        yield _dealt(logicals, members[start:])


def _dealt(logicals: Sequence[Logical], members: list[int]) -> tuple[list[int], Dealing]:
    return members, Dealing([logicals[i] for i in members])
