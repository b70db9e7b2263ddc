"""An optimizer's state as tensors under logical names, for checkpoints that any layout can read.

Every state tensor exists from the start, so that a fresh optimizer can be filled in place; torch would
make them at the first step. Step counters are 0-dim tensors like the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


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
    """The live state tensors by ``<what>.<logical name>``, for instance ``exp_avg.blocks.0.mlp.up.weight``."""
    return {
        f"{what}.{name}": tensor
        for name, parameter in named_parameters(optimizer)
        for what, tensor in optimizer.state[parameter].items()
    }


@torch.no_grad()
def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved state into the optimizer; ValueError, with nothing changed, unless all of it fits."""
    own = state_tensors(optimizer)
    _refuse("lacks", own.keys() - tensors.keys(), len(own))
    _refuse("has unknown", tensors.keys() - own.keys(), len(own))
    misshapen = {n for n, t in own.items() if t.shape != tensors[n].shape}
    _refuse("has other shapes for", misshapen, len(own))
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _refuse(what: str, names: set[str], expected: int) -> None:
    if names:
        first = ", ".join(sorted(names)[:3])
        raise ValueError(
            f"optimizer state: the saved one {what} {len(names)} tensors, first {first} (this optimizer has "
            f"{expected}); resume with the optimizer and model that saved it"
        )
