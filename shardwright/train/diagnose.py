"""Naming the first module whose numbers are not finite, by running a micro-batch once more, uncompiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.train.step import Batch, LossModel


def first_nonfinite(
    model: LossModel, batches: Sequence[Batch], step: Tensor, scales: dict[str, Tensor]
) -> str:
    """For instance "blocks.3.mlp.down (backward)"; leaves gradients and weights as they are.

    `scales` are those of the step (`Step.scales`), with its loss scale.
    """
    for number, batch in enumerate(batches):
        found = _run(model, batch, step, scales)
        if found:
            return f"{found}, micro-batch {number}"
    return "no single module: the sum over micro-batches"


def _run(model: LossModel, batch: Batch, step: Tensor, scales: dict[str, Tensor]) -> str | None:
    found: list[str] = []
    parts = [(n, m) for n, m in model.model.named_modules() if n and not any(m.children())]
    hooks = [module.register_forward_hook(_Watch(found, name)) for name, module in parts]
    try:
        with torch.compiler.set_stance("force_eager"):
            sums = model(batch, step, scales)
            loss = torch.stack([sums[term] * scales[term] for term in sums]).sum()
            if not found and not _is_finite(loss):
                found.append("the loss")
            if not found:
                parameters = [p for p in model.parameters() if p.requires_grad]
                grads = torch.autograd.grad(loss, parameters, allow_unused=True)
                if not found and not all(_is_finite(g) for g in grads if g is not None):
                    found.append("a weight's gradient")
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


class _Watch:
    """A forward hook that notes its module when what comes out of it, or back into it, is not finite."""

    def __init__(self, found: list[str], name: str) -> None:
        self.found, self.name = found, name

    def __call__(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if not _is_finite(output):
            self.found.append(f"{self.name} (forward)")
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        if not _is_finite(gradient):
            self.found.append(f"{self.name} (backward)")


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
