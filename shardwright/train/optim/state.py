"""An optimizer's state as tensors under logical names, for checkpoints that any layout can read.

Every state tensor exists from the start, so that a fresh optimizer can be filled in place; torch would
make them at the first step. Step counters are 0-dim tensors like the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwright.parallel.logical import Logical


@runtime_checkable
class KeepsState(Protocol):
    """An optimizer that an engine owns, and that gives and takes its state by itself."""

    def state_tensors(self) -> dict[str, Tensor]:
        """As `state_tensors` of this file, but copies; every rank has to ask."""

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in what `state_tensors` gave."""


def build_adam_state(parameter: Tensor) -> dict[str, Tensor]:
    """The state that torch's fused Adam and AdamW keep for a parameter."""
    return {
        "step": build_counter(parameter),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }


def build_momentum_state(parameter: Tensor) -> dict[str, Tensor]:
    """The state of SGD with momentum, and of Muon.

    Zeros, where torch's fused SGD would take fresh memory at its first step and keep what happens to lie
    there if that step is skipped by `found_inf`.
    """
    return {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}


def build_counter(parameter: Tensor) -> Tensor:
    """Finished steps: float32 (as the fused kernels want it), 0-dim, on the parameter's device."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device)


def named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of every group with its logical name."""
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The live state tensors by ``<what>.<logical name>``, for instance ``exp_avg.blocks.0.mlp.up.weight``.

    Those of a parameter that is spread are DTensors that lie as it does, in the memory of the state.
    """
    if isinstance(optimizer, KeepsState):
        return optimizer.state_tensors()
    return {key: logical.wrap(logical.local) for key, logical in _logical_states(optimizer)}


@torch.no_grad()
def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved state, whole tensors or such as `state_tensors` gives, into the optimizer.

    ValueError, with nothing changed, unless all of it fits.
    """
    if isinstance(optimizer, KeepsState):
        optimizer.load_state_tensors(tensors)
        return
    own = dict(_logical_states(optimizer))
    _refuse("lacks", own.keys() - tensors.keys(), len(own))
    _refuse("has unknown", tensors.keys() - own.keys(), len(own))
    misshapen = {n for n, logical in own.items() if logical.shape != tensors[n].shape}
    _refuse("has other shapes for", misshapen, len(own))
    for name, logical in own.items():
        logical.local.copy_(_part(logical, tensors[name]))


def _part(logical: Logical, saved: Tensor) -> Tensor:
    if not isinstance(saved, DTensor):
        return logical.part(saved)
    own = logical.wrap(logical.local)
    assert isinstance(own, DTensor), "one process saves and loads whole tensors"
    if (saved.device_mesh, saved.placements) == (own.device_mesh, own.placements):
        return saved.to_local()
    return logical.part(saved.full_tensor())


def _logical_states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Logical]]:
    """Every state tensor as the logical tensor that this rank holds a part of."""
    logicals: Mapping[Tensor, Logical] = optimizer.logical  # type: ignore[attr-defined]
    for name, parameter in named_parameters(optimizer):
        logical = logicals[parameter]
        for what, local in optimizer.state[parameter].items():
            counts = what == "step"  # alike on all ranks
            kept = Logical.whole(local) if counts else logical.keep(local, _kept_dims(what, local, logical))
            yield f"{what}.{name}", kept


def _kept_dims(what: str, local: Tensor, logical: Logical) -> list[int]:
    """The dims of the parameter that a state has: Adafactor's rows and columns lack one."""
    dims = list(range(len(logical.shape)))
    if what == "exp_avg_sq_row":
        dims.pop(-1)
    elif what == "exp_avg_sq_col":
        dims.pop(-2)
    assert len(dims) == local.ndim, f"{what}: {local.ndim} dims where {len(dims)} are kept"
    return dims


def _refuse(what: str, names: set[str], expected: int) -> None:
    if names:
        first = ", ".join(sorted(names)[:3])
        raise ValueError(
            f"optimizer state: the saved one {what} {len(names)} tensors, first {first} (this optimizer has "
            f"{expected}); resume with the optimizer and model that saved it"
        )
