"""Optimizers over logical tensors: `build_optimizer` makes one, a schedule sets its factor every step.

What all of them share: float32 masters with `.grad`, groups by logical name, one learning-rate factor for all
groups (`set_factor`), state as named tensors that exist from the start, and `optimizer.found_inf`: a 0-dim
float32 tensor on the device, where 1 leaves parameters, moments and counters untouched without a host read.

Under a layout the masters are this rank's parts, plain tensors that may be empty, with a `Logical` beside each. A step
is then a collective call, and a parameter has a gradient on all ranks that hold it or on none. Ranks that hold the
same part stay equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shardwright.config import ConfigError, OptimizerConfig
from shardwright.parallel.logical import Logical
from shardwright.train.optim import muon
from shardwright.train.optim.adafactor import Adafactor
from shardwright.train.optim.apex import build_fused_adam, wants_apex
from shardwright.train.optim.groups import Named, build_decay_groups, set_factor
from shardwright.train.optim.guarded import align_gradients
from shardwright.train.optim.lamb import Lamb
from shardwright.train.optim.muon import Muon
from shardwright.train.optim.spread import logical_by_parameter
from shardwright.train.optim.state import (
    build_adam_state,
    build_momentum_state,
    load_state_tensors,
    state_tensors,
)

__all__ = ["Adafactor", "Lamb", "Muon", "build_optimizer", "load_state_tensors", "set_factor", "state_tensors"]

Spread = Mapping[Tensor, Logical]  # a local tensor's logical one


def build_optimizer(
    config: OptimizerConfig,
    named_parameters: Named,
    *,
    logical: Mapping[str, Logical] | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of a config over (logical name, contiguous float tensor) pairs.

    logical: by name, how the whole of each tensor is spread; None where this process holds all of it. matmul_dtype:
    number format of Muon's products, None takes the device's fast one; float32 where layouts are to be compared.
    Raises ConfigError for a setting that the optimizer cannot honour.
    """
    _check(named_parameters)
    spread = _logical_by_tensor(named_parameters, logical or {})
    optimizer = BUILDERS[config.name](config, named_parameters, spread)
    if isinstance(optimizer, Muon):
        optimizer.matmul_dtype = matmul_dtype
    optimizer.logical = logical_by_parameter(optimizer.param_groups, spread)  # type: ignore[attr-defined]
    optimizer.found_inf = None  # type: ignore[attr-defined]
    optimizer.register_step_pre_hook(align_gradients)
    return optimizer


def _check(named: Named) -> None:
    if not named:
        raise ConfigError("optimizer: was given no parameter to train; unfreeze at least one")
    names = [name for name, _ in named]
    assert len(set(names)) == len(names), "logical names are unique"
    for name, tensor in named:
        assert tensor.is_contiguous(), f"{name}: the fused kernels walk raw memory, masters must be contiguous"


def _logical_by_tensor(named: Named, logical: Mapping[str, Logical]) -> Spread:
    spread = {tensor: logical[name] for name, tensor in named} if logical else {}
    for name, tensor in named:
        assert not logical or tensor.shape == logical[name].local.shape, f"{name}: is not the part that logical says"
    return spread


def _build_adamw(config: OptimizerConfig, named: Named, spread: Spread) -> torch.optim.Optimizer:
    groups = _decay_groups(config, named)
    if wants_apex("optimizer.fused", config.fused, named[0][1].device):
        return build_fused_adam(groups, betas=_betas(config), eps=config.eps, decoupled=True)
    optimizer = torch.optim.AdamW(groups, betas=_betas(config), eps=config.eps, fused=True)
    return _with_state(optimizer, build_adam_state)


def _build_adam(config: OptimizerConfig, named: Named, spread: Spread) -> torch.optim.Optimizer:
    """Kingma & Ba 2015; the decay is added to the gradient, unlike AdamW's."""
    groups = _decay_groups(config, named)
    if wants_apex("optimizer.fused", config.fused, named[0][1].device):
        return build_fused_adam(groups, betas=_betas(config), eps=config.eps, decoupled=False)
    optimizer = torch.optim.Adam(groups, betas=_betas(config), eps=config.eps, fused=True)
    return _with_state(optimizer, build_adam_state)


def _build_sgd(config: OptimizerConfig, named: Named, spread: Spread) -> torch.optim.Optimizer:
    """SGD with heavy-ball or Nesterov momentum; the decay is added to the gradient."""
    nesterov = config.nesterov and config.momentum > 0
    groups = _decay_groups(config, named)
    optimizer = torch.optim.SGD(groups, momentum=config.momentum, nesterov=nesterov, fused=True)
    return _with_state(optimizer, build_momentum_state) if config.momentum > 0 else optimizer


def _build_adafactor(config: OptimizerConfig, named: Named, spread: Spread) -> torch.optim.Optimizer:
    """T5's form: no first moment (betas and eps are not read), steps relative to each parameter's scale.

    With `relative_step` the schedule's factor multiplies the paper's own rule and `lr` is not read.
    """
    groups = _decay_groups(config, named, lr=1.0 if config.relative_step else config.lr)
    return Adafactor(groups, relative_step=config.relative_step, logical=spread)


def _build_lamb(config: OptimizerConfig, named: Named, spread: Spread) -> torch.optim.Optimizer:
    groups = _decay_groups(config, named, betas=_betas(config), eps=config.eps)
    return Lamb(groups, logical=spread)


def _build_muon(config: OptimizerConfig, named: Named, spread: Spread) -> torch.optim.Optimizer:
    groups = muon.build_groups(
        named,
        lr=config.lr,
        matrix_lr=config.matrix_lr,
        weight_decay=config.weight_decay,
        decay_embeddings=config.decay_embeddings,
        momentum=config.momentum,
        nesterov=config.nesterov,
        betas=_betas(config),
        eps=config.eps,
    )
    return Muon(groups, logical=spread)


BUILDERS: dict[str, Callable[[OptimizerConfig, Named, Spread], torch.optim.Optimizer]] = {
    "adamw": _build_adamw,
    "adam": _build_adam,
    "sgd": _build_sgd,
    "adafactor": _build_adafactor,
    "lamb": _build_lamb,
    "muon": _build_muon,
}


def _decay_groups(
    config: OptimizerConfig, named: Named, lr: float | None = None, **options: Any
) -> list[dict[str, Any]]:
    return build_decay_groups(
        named,
        lr=config.lr if lr is None else lr,
        weight_decay=config.weight_decay,
        decay_embeddings=config.decay_embeddings,
        **options,
    )


def _betas(config: OptimizerConfig) -> tuple[float, float]:
    first, second = config.betas
    return first, second


def _with_state(
    optimizer: torch.optim.Optimizer, build: Callable[[torch.Tensor], dict[str, torch.Tensor]]
) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = build(parameter)
    return optimizer
