"""Adafactor: second moments of a matrix kept as one row and one column, clipped updates, relative scale.

Shazeer & Stern 2018 (arXiv 1804.04235), as T5 was trained; the same arithmetic as `transformers.Adafactor`,
with the counters and every decision on the device. Means and root mean squares are over whole logical tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwright.parallel.logical import Logical, mean_all, norm_all
from shardwright.train.optim.guarded import guarded_copy_, guarded_descend_
from shardwright.train.optim.spread import batch_by_size, logical_by_parameter
from shardwright.train.optim.state import build_counter

# The paper's constants: added to squared gradients; least scale of a parameter; largest root mean square of
# an update; how the decay of second moments approaches 1; most of a relative step.
SQUARE_EPS = 1e-30
LEAST_SCALE = 1e-3
CLIP_THRESHOLD = 1.0
DECAY_EXPONENT = 0.8
MOST_RELATIVE = 1e-2


@dataclass
class Work:
    """One parameter on its way through a step."""

    p: Tensor
    grad: Tensor
    logical: Logical
    state: dict[str, Tensor]
    step: Tensor  # the counter after this step

    @property
    def is_matrix(self) -> bool:
        """Whether its second moments are kept as rows and columns."""
        return self.p.ndim >= 2


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
        logical: Mapping[Tensor, Logical] | None = None,
    ) -> None:
        super().__init__(groups, {})
        self.logical = logical_by_parameter(self.param_groups, logical)
        self.relative_step, self.scale_parameter, self.beta1 = relative_step, scale_parameter, beta1
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = self._build_state(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, or nothing at all where `found_inf` is 1."""
        assert closure is None and getattr(self, "grad_scale", None) is None
        for group in self.param_groups:
            works = [self._begin(p, p.grad) for p in group["params"] if p.grad is not None]
            for indices in batch_by_size([work.logical for work in works]):
                self._update(group, [works[i] for i in indices])

    def _begin(self, p: Tensor, grad: Tensor) -> Work:
        state = self.state[p]
        return Work(p, grad, self.logical[p], state, state["step"] + 1)

    def _update(self, group: dict[str, Any], works: Sequence[Work]) -> None:
        sizes = self._step_sizes(group["lr"], works)
        self._take_squares(works)
        updates = self._precondition(works)
        for update, size, rms in zip(updates, sizes, _rms(works, updates), strict=True):
            update *= size / (rms / CLIP_THRESHOLD).clamp(min=1.0)
        for work, update, size in zip(works, updates, sizes, strict=True):
            self._descend(work, update, group["weight_decay"] * size if group["weight_decay"] else None)

    def _take_squares(self, works: Sequence[Work]) -> None:
        """Bring the second moments up to date."""
        targets: list[tuple[Tensor, Tensor]] = []  # a mean's moment, and how much of the mean it takes
        means: list[tuple[Logical, Tensor, int]] = []
        for work in works:
            weight = (work.step**-DECAY_EXPONENT).to(work.grad.dtype)  # 1 at the first step: the zeros never count
            square = work.grad.square().add_(SQUARE_EPS)
            if work.is_matrix:
                targets += [(work.state["exp_avg_sq_row"], weight), (work.state["exp_avg_sq_col"], weight)]
                means += [(work.logical, square, -1), (work.logical, square, -2)]
            else:
                moment = work.state["exp_avg_sq"]
                guarded_copy_(moment, moment.lerp(square, weight), self.found_inf)
        for (moment, weight), mean in zip(targets, mean_all(means), strict=True):
            guarded_copy_(moment, moment.lerp(mean, weight), self.found_inf)

    def _precondition(self, works: Sequence[Work]) -> list[Tensor]:
        """Gradients over the roots of their second moments; shaped as the gradients."""
        rows = [work.state["exp_avg_sq_row"] for work in works if work.is_matrix]
        logicals = [work.logical for work in works if work.is_matrix]
        means = mean_all([(logical, row.unsqueeze(-1), -2) for logical, row in zip(logicals, rows, strict=True)])
        factors = ((row / mean).rsqrt_().unsqueeze(-1) for row, mean in zip(rows, means, strict=True))
        return [
            (work.grad * next(factors)).mul_(work.state["exp_avg_sq_col"].rsqrt().unsqueeze(-2))
            if work.is_matrix
            else work.state["exp_avg_sq"].rsqrt().mul_(work.grad)
            for work in works
        ]

    def _step_sizes(self, lr: float, works: Sequence[Work]) -> list[Tensor]:
        ones = [torch.ones_like(work.step) for work in works]
        relatives = [work.step.rsqrt().clamp(max=MOST_RELATIVE) for work in works] if self.relative_step else ones
        scales = ones
        if self.scale_parameter:
            scales = [rms.clamp(min=LEAST_SCALE) for rms in _rms(works, [work.p for work in works])]
        return [lr * relative * scale for relative, scale in zip(relatives, scales, strict=True)]

    def _descend(self, work: Work, update: Tensor, decay: Tensor | None) -> None:
        if self.beta1 is not None:
            average = work.state["exp_avg"]
            guarded_descend_([average], [update], step=self.beta1 - 1.0, decay=-1.0, found_inf=self.found_inf)
            update = average
        if decay is not None:
            update = torch.addcmul(update, work.p, decay)
        guarded_descend_([work.p], [update], step=1.0, found_inf=self.found_inf)
        guarded_copy_(work.state["step"], work.step, self.found_inf)

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


def _rms(works: Sequence[Work], parts: Sequence[Tensor]) -> list[Tensor]:
    """Root mean squares (0-dim) of tensors that lie as the parameters do."""
    norms = norm_all([(work.logical, part) for work, part in zip(works, parts, strict=True)])
    return [norm / work.logical.shape.numel() ** 0.5 for norm, work in zip(norms, works, strict=True)]
