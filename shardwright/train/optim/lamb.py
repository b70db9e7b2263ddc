"""LAMB: Adam's direction, scaled layer by layer to the size of the weights, for very large batches.

You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (arXiv 1904.00962),
algorithm 2 with phi the identity and bias correction; the norms are those of whole logical tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.parallel.logical import Logical, norm_all
from shardwright.train.optim.guarded import guarded_adamw_, guarded_descend_
from shardwright.train.optim.spread import batch_by_size, logical_by_parameter
from shardwright.train.optim.state import build_adam_state


class Lamb(torch.optim.Optimizer):
    """LAMB over parameter groups with the options lr, betas, eps and weight_decay.

    A matrix moves by lr * |w| / |r + weight_decay w| * (r + weight_decay w), with r Adam's bias-corrected direction;
    the ratio is 1 where either norm is 0, and for norms and biases.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], *, logical: Mapping[Tensor, Logical] | None = None) -> None:
        super().__init__(groups, {})
        self.logical = logical_by_parameter(self.param_groups, logical)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = build_adam_state(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, or nothing at all where `found_inf` is 1."""
        assert closure is None and getattr(self, "grad_scale", None) is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            logicals = [self.logical[p] for p in params]
            for indices in batch_by_size(logicals):
                self._update(group, [params[i] for i in indices], [logicals[i] for i in indices])

    def _update(self, group: dict[str, Any], params: Sequence[Tensor], logicals: Sequence[Logical]) -> None:
        directions = self._adam(group, params)
        for p, direction in zip(params, directions, strict=True):
            direction.add_(p, alpha=group["weight_decay"])
        scaled = [i for i, p in enumerate(params) if p.ndim >= 2]
        norms = norm_all([(logicals[i], params[i]) for i in scaled] + [(logicals[i], directions[i]) for i in scaled])
        for n, i in enumerate(scaled):
            weight, update = norms[n], norms[len(scaled) + n]
            directions[i] *= torch.where((weight > 0) & (update > 0), weight / update, 1.0)
        guarded_descend_(params, directions, step=group["lr"], found_inf=self.found_inf)

    def _adam(self, group: dict[str, Any], params: Sequence[Tensor]) -> list[Tensor]:
        """Bias-corrected m / (sqrt(v) + eps): how far AdamW's own kernel moves a zero at a rate of -1."""
        directions = [torch.zeros_like(p, requires_grad=False) for p in params]
        guarded_adamw_(
            directions,
            [p.grad for p in params if p.grad is not None],
            [self.state[p] for p in params],
            lr=-1.0,
            weight_decay=0.0,
            betas=group["betas"],
            eps=group["eps"],
            found_inf=self.found_inf,
        )
        return directions
