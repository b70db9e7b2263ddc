"""What ranks run for test_collectives.py: each function and its gradient against the same sums of whole tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.parallel.collectives import gather, scatter_sum, sum_gradients, sum_parts

Function = Callable[[Tensor], Tensor]
SHAPE = (2, 12, 4)


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, whose sums are exact in every format; not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (*shape[::-1],), generator=generator).to(dtype).permute(*reversed(range(len(shape))))


def check_all(dtype: torch.dtype, compiled: bool = False) -> list[str]:
    """Names of what is not to the bit what one process computes, or changes its arguments, or a second pass."""
    torch._dynamo.reset()
    dist.init_process_group("gloo")
    group, ranks, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    assert group is not None

    def joined(parts: list[Tensor], dim: int) -> Tensor:
        return torch.cat(parts, dim)

    def cut(parts: list[Tensor], dim: int) -> Tensor:
        return torch.stack(parts).sum(0).chunk(ranks, dim)[rank]

    def added(parts: list[Tensor], dim: int) -> Tensor:
        return torch.stack(parts).sum(0)

    def own(parts: list[Tensor], dim: int) -> Tensor:
        return parts[rank]

    wrong = []
    for dim in range(len(SHAPE)):
        # Name, function, and what it and its backward pass make of the tensors of all ranks.
        cases: list[tuple[str, Function, Callable[..., Tensor], Callable[..., Tensor]]] = [
            ("gather", lambda x, dim=dim: gather(x, dim, group), joined, cut),
            ("scatter_sum", lambda x, dim=dim: scatter_sum(x, dim, group), cut, joined),
            ("sum_parts", lambda x: sum_parts(x, group), added, own),
            ("sum_gradients", lambda x: sum_gradients(x, group), own, added),
        ]
        for name, function, forward, backward in cases:
            size = SHAPE[dim] * (ranks if name == "scatter_sum" else 1)
            shape = (*SHAPE[:dim], size, *SHAPE[dim + 1 :])
            inputs = [numbers(shape, n, dtype) for n in range(ranks)]
            outer = [numbers(tuple(forward(inputs, dim).shape), 100 + n, dtype) for n in range(ranks)]
            call = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
            if not agrees(call, inputs, outer, rank, (forward(inputs, dim), backward(outer, dim))):
                wrong.append(f"{name} {dim}")
    return wrong


def agrees(
    call: Function, inputs: list[Tensor], outer: list[Tensor], rank: int, expected: tuple[Tensor, Tensor]
) -> bool:
    """Whether value and gradient are the expected ones in two passes, and what was given is left as it was."""
    x, given = inputs[rank].clone().requires_grad_(), outer[rank].clone()
    value = call(x)
    first, second = (torch.autograd.grad(value, x, given, retain_graph=again)[0] for again in (True, False))
    found = (value.detach(), first, second, x.detach(), given)
    wanted = (expected[0], expected[1], expected[1], inputs[rank], outer[rank])
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def check_gradients() -> bool:
    """torch's own check, by differences, of a function of all four in a row."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    ranks, rank = dist.get_world_size(), dist.get_rank()

    def function(x: Tensor) -> Tensor:
        own = sum_gradients(x, group).chunk(ranks, 1)[rank]  # each rank computes a part with the whole of x
        whole = gather(own.sin(), 1, group)
        return sum_parts(scatter_sum(whole * (rank + 1), 0, group).cos(), group)

    x = torch.randn(ranks, 2 * ranks, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return torch.autograd.gradcheck(function, x.requires_grad_())
