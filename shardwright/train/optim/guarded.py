"""In-place updates that a flag on the device can switch off, without the host reading it.

A step whose gradients overflowed must leave parameters and state as they were, and the host must
not wait for the device to learn that. The fused optimizers of torch do so by their `found_inf`
argument; this file gives the project's own rules the same, through the same kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def guarded_descend_(
    targets: Sequence[Tensor],
    directions: Sequence[Tensor],
    *,
    step: float,
    decay: float = 0.0,
    found_inf: Tensor | None = None,
) -> None:
    """``target -= step * (direction + decay * target)`` for all pairs; nothing where `found_inf` is 1.

    It is the fused kernel of plain SGD, which torch has for every device. ``step=-w, decay=-1`` makes it
    ``target.lerp_(direction, w)``, bit for bit. The kernel walks raw memory: each pair must share its strides.
    """
    torch._fused_sgd_(
        list(targets),
        list(directions),
        [],
        weight_decay=decay,
        momentum=0.0,
        lr=step,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        grad_scale=None,
        found_inf=found_inf,
    )


def guarded_adamw_(
    targets: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    found_inf: Tensor | None = None,
) -> None:
    """A step of AdamW on `targets` by torch's fused kernel; nothing where `found_inf` is 1.

    states: as `state.build_adam_state` makes them, brought up to date.
    """
    adamw(
        list(targets),
        list(grads),
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        fused=True,
        found_inf=found_inf,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def guarded_copy_(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """``target.copy_(value)`` unless `found_inf` is 1; for small tensors, since it costs two passes."""
    target.copy_(value if found_inf is None else torch.where(found_inf > 0, target, value))


def align_gradients(optimizer: torch.optim.Optimizer, args: Any = None, kwargs: Any = None) -> None:
    """Copy each gradient whose strides are not its parameter's; made to be a step pre-hook.

    torch 2.13's fused CPU kernels (AdamW, Adam, SGD) silently pair the wrong elements otherwise.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)
