"""Which part of a model a pipeline stage is, and which stages a rank has: pure rules, decided before anything is built.

A model is a list of named layers; a stage is a slice of it. Slices are cut so that the costliest is as cheap as it can
be, embedding and head included. Pipeline.py runs what is decided here. Symbols: P ranks of the pipeline axis, S stages.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

from torch import nn


class Schedule(NamedTuple):
    """What the rules need to know of a schedule."""

    placement: Literal["single", "loop", "v"]  # which stages a rank has, see `stage_indices`
    splits_backward: bool  # gradients of weights are taken later than those of activations


SCHEDULES: dict[str, Schedule] = {
    "gpipe": Schedule("single", False),
    "1f1b": Schedule("single", False),
    "interleaved_1f1b": Schedule("loop", False),
    "interleaved_zero_bubble": Schedule("loop", True),
    "zbv": Schedule("v", True),
    "dualpipev": Schedule("v", True),
}


def check_virtual(schedule: str, virtual: int) -> str | None:
    """Why a rank cannot have `virtual` stages under `schedule`, or None."""
    placement = SCHEDULES[schedule].placement
    if placement == "single" and virtual != 1:
        return f"{schedule} has 1 stage a rank, not {virtual}"
    if placement == "v" and virtual != 2:
        return f"{schedule} has exactly 2 stages a rank, not {virtual}"
    return f"{schedule} needs at least 1 stage a rank, not {virtual}" if virtual < 1 else None


def check_micro_batches(schedule: str, size: int, virtual: int, count: int) -> str | None:
    """Why a step of `count` micro-batches cannot run on `size` ranks with `virtual` stages each, or None.

    These are the rules of torch's own schedules; a test holds them against the constructors.
    """
    if count < 1:
        return f"{schedule} needs at least 1 micro-batch"
    if schedule == "1f1b" and count < size:
        return f"1f1b needs as many micro-batches as stages: {size}, not {count}"
    if schedule == "dualpipev" and count < virtual * size:
        return f"dualpipev needs as many micro-batches as stages: {virtual * size}, not {count}"
    rounds = max(1, count // size)
    if SCHEDULES[schedule].placement == "loop" and count % rounds:
        return (
            f"{schedule} cuts {count} micro-batches into {rounds} rounds (micro-batches // {size} ranks), "
            f"which must divide them; a multiple of {size} always fits"
        )
    return None


def stage_indices(schedule: str, rank: int, size: int, virtual: int) -> list[int]:
    """The stages of a rank, ascending: rank, rank + P, ... in a loop; rank and 2 P - 1 - rank in a V."""
    if reason := check_virtual(schedule, virtual):
        raise ValueError(reason)
    if SCHEDULES[schedule].placement == "v":
        return [rank, 2 * size - 1 - rank]
    return list(range(rank, size * virtual, size))


#: FLOPs a device does while it would update one parameter: about 20 bytes of traffic at 130 FLOPs a byte (H100, bf16).
UPDATE_FLOPS = 2600.0


def layer_costs(
    flops: Sequence[float], parameters: Sequence[int], *, head_flops: float = 0.0, update_flops: float = UPDATE_FLOPS
) -> list[float]:
    """What each layer costs a rank in one step, in FLOPs: its passes, and the update of its parameters.

    `flops` are forward and backward of all the tokens that a rank sees in a step. `head_flops` are those of a head
    that is no layer of its own, because its weight is the embedding's: they fall on the last layer.
    """
    costs = [f + update_flops * p for f, p in zip(flops, parameters, strict=True)]
    costs[-1] += head_flops
    return costs


_UNITS = 2**40  # costs become integers, so that equal layers are equal in every sum


def split_layers(costs: Sequence[float], num_stages: int) -> list[range]:
    """Cut layers into contiguous stages, none empty, so that the costliest stage is as cheap as possible.

    Among those cuts the one with the smallest sum of squares, and of these the one whose early stages are shortest:
    they hold the activations of most micro-batches. ValueError where there are fewer layers than stages.
    """
    if not 1 <= num_stages <= len(costs):
        raise ValueError(
            f"{len(costs)} layers (embedding, blocks, final norm, head) cannot make {num_stages} pipeline stages; "
            f"use at most {len(costs)}"
        )
    if min(costs) < 0:
        raise ValueError("the cost of a layer cannot be negative")
    largest = max(costs) or 1.0
    sums = list(accumulate((round(cost / largest * _UNITS) for cost in costs), initial=0))
    return _cut(sums, num_stages, _smallest_bound(sums, num_stages))


def _smallest_bound(sums: list[int], num_stages: int) -> int:
    """The cost of the costliest stage in the best cut, by bisection; `sums` are running totals."""
    low, high = max(b - a for a, b in zip(sums, sums[1:], strict=False)), sums[-1]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _num_stages(sums, middle) <= num_stages else (middle + 1, high)
    return low


def _num_stages(sums: list[int], bound: int) -> int:
    """Stages that a greedy cut needs where none may cost more than `bound`."""
    count, start = 1, 0
    for before, after in zip(sums, sums[1:], strict=False):
        if after - start > bound:
            count, start = count + 1, before
    return count


def _cut(sums: list[int], num_stages: int, bound: int) -> list[range]:
    """The cut with the smallest sum of squares in which no stage costs more than `bound`, by dynamic programming."""
    num_layers = len(sums) - 1
    # (sum of squares, end of the first stage) of layers [start:] in so many stages; absent where it cannot be.
    best: list[dict[int, tuple[int, int]]] = [{num_layers: (0, num_layers)}]
    for _ in range(num_stages):
        rest, here = best[-1], {}
        for start in range(num_layers):
            options = (
                ((sums[end] - sums[start]) ** 2 + rest[end][0], end)
                for end in range(start + 1, num_layers + 1)
                if end in rest and sums[end] - sums[start] <= bound
            )
            if (option := min(options, default=None)) is not None:
                here[start] = option
        best.append(here)
    stages, start = [], 0
    for row in reversed(best[1:]):
        end = row[start][1]
        stages.append(range(start, end))
        start = end
    return stages


def keep_layers(model: nn.Module, names: Collection[str], *, shared: str | None = None) -> None:
    """Drop every layer of `model` that is not in `names`, in place: a stage is what is left, under the same names.

    `model.layers()` lists (name, module) in the order of the forward pass. Dropped blocks are deleted, other layers set
    to None. `shared` names a module whose weight is the head's as well ("embed.tokens"): the last stage keeps that
    module, and nothing else of the layer it belongs to. ValueError for a name that is no layer.
    """
    known = [name for name, _ in model.layers()]  # type: ignore[operator]
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"no such layer: {', '.join(unknown)}; the model has {', '.join(known)}")
    last = known[-1] in names
    for name in (name for name in known if name not in names):
        if shared is not None and last and shared.startswith(f"{name}."):
            _prune(model.get_submodule(name), shared.removeprefix(f"{name}."))
        else:
            _drop(model, name)


def _drop(model: nn.Module, name: str) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(owner, nn.ModuleDict):
        del owner[leaf]
    else:
        setattr(owner, leaf, None)


def _prune(module: nn.Module, path: str) -> None:
    """Drop every submodule and parameter of `module` but the submodule at `path`."""
    keep, _, rest = path.partition(".")
    for name, _ in list(module.named_parameters(recurse=False)):
        setattr(module, name, None)
    for name, child in list(module.named_children()):
        if name != keep:
            setattr(module, name, None)
        elif rest:
            _prune(child, rest)
