"""Adafactor: second moments of a matrix kept as one row and one column, clipped updates, relative scale.

Shazeer & Stern 2018 (arXiv 1804.04235), as T5 was trained; the same arithmetic as `transformers.Adafactor`,
with the counters and every decision on the device. Means and root mean squares are over whole logical tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardwright.train.optim.guarded import guarded_copy_, guarded_descend_
from shardwright.train.optim.state import build_counter

# The paper's constants: added to squared gradients; least scale of a parameter; largest root mean square of
# an update; how the decay of second moments approaches 1; most of a relative step.
SQUARE_EPS = 1e-30
LEAST_SCALE = 1e-3
CLIP_THRESHOLD = 1.0
DECAY_EXPONENT = 0.8
MOST_RELATIVE = 1e-2


class Adafactor(torch.optim.Optimizer):
    """Adafactor over parameter groups.

    relative_step: the step size is min(1e-2, 1/sqrt(t)) times the group's lr (then a factor, 1 by default
    of the builder), else the group's lr itself. scale_parameter: times the parameter's root mean square.
    beta1: decay of a first moment, None keeps none. weight_decay is decoupled, times the step size.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        relative_step: bool = False,
        scale_parameter: bool = True,
        beta1: float | None = None,
    ) -> None:
        super().__init__(groups, {})
        self.relative_step, self.scale_parameter, self.beta1 = relative_step, scale_parameter, beta1
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = self._build_state(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, or nothing at all where `found_inf` is 1."""
        assert closure is None and getattr(self, "grad_scale", None) is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(group, p, p.grad, self.state[p])

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        step = state["step"] + 1
        size = self._step_size(group["lr"], p, step)
        update = self._precondition(grad, state, step)
        update *= size / (_rms(update) / CLIP_THRESHOLD).clamp(min=1.0)
        if self.beta1 is not None:
            guarded_descend_([state["exp_avg"]], [update], step=self.beta1 - 1.0, decay=-1.0, found_inf=self.found_inf)
            update = state["exp_avg"]
        if group["weight_decay"]:
            update = torch.addcmul(update, p, group["weight_decay"] * size)
        guarded_descend_([p], [update], step=1.0, found_inf=self.found_inf)
        guarded_copy_(state["step"], step, self.found_inf)

    def _precondition(self, grad: Tensor, state: dict[str, Tensor], step: Tensor) -> Tensor:
        """The gradient over the root of its second moment, which is brought up to date; shaped as grad."""
        weight = (step**-DECAY_EXPONENT).to(grad.dtype)  # 1 at the first step: the zeros never count
        square = grad.square().add_(SQUARE_EPS)
        if grad.ndim < 2:
            guarded_copy_(state["exp_avg_sq"], state["exp_avg_sq"].lerp(square, weight), self.found_inf)
            return state["exp_avg_sq"].rsqrt().mul_(grad)
        for key, mean in (("exp_avg_sq_row", square.mean(dim=-1)), ("exp_avg_sq_col", square.mean(dim=-2))):
            guarded_copy_(state[key], state[key].lerp(mean, weight), self.found_inf)
        row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        row_factor = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        return (grad * row_factor).mul_(column.rsqrt().unsqueeze(-2))

    def _step_size(self, lr: float, p: Tensor, step: Tensor) -> Tensor:
        relative = step.rsqrt().clamp(max=MOST_RELATIVE) if self.relative_step else torch.ones_like(step)
        scale = _rms(p).clamp(min=LEAST_SCALE) if self.scale_parameter else torch.ones_like(step)
        return lr * relative * scale

    def _build_state(self, p: Tensor) -> dict[str, Tensor]:
        state = {"step": build_counter(p)}
        if p.ndim >= 2:
            state["exp_avg_sq_row"] = p.new_zeros(p.shape[:-1])
            state["exp_avg_sq_col"] = p.new_zeros(p.shape[:-2] + p.shape[-1:])
        else:
            state["exp_avg_sq"] = torch.zeros_like(p, requires_grad=False)
        if self.beta1 is not None:
            state["exp_avg"] = torch.zeros_like(p, requires_grad=False)
        return state


def _rms(tensor: Tensor) -> Tensor:
    return tensor.norm() / tensor.numel() ** 0.5
