"""Naming the first module whose numbers are not finite, by running a micro-batch once more, uncompiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.train.step import Batch, LossModel


def first_nonfinite(model: LossModel, batches: Sequence[Batch], step: Tensor, scale: Tensor) -> str:
    """For instance "blocks.3.mlp.down (backward)"; leaves gradients and weights as they are."""
    for number, batch in enumerate(batches):
        found = _run(model, batch, step, scale)
        if found:
            return f"{found}, micro-batch {number}"
    return "no single module: the sum over micro-batches"


def _run(model: LossModel, batch: Batch, step: Tensor, scale: Tensor) -> str | None:
    found: list[str] = []
    hooks = []
    for name, module in model.model.named_modules():
        if name and not any(module.children()):
            hooks.append(module.register_forward_hook(_Watch(found, f"{name} (forward)")))
            hooks.append(module.register_full_backward_hook(_Watch(found, f"{name} (backward)")))
    try:
        with torch.compiler.set_stance("force_eager"):
            sums = model(batch, step)
            counts = model.objective.count(batch)
            loss = torch.stack([sums[t] / counts[t].clamp(min=1) for t in sums]).sum()
            if not found and not torch.isfinite(loss):
                found.append("the loss")
            if not found:
                parameters = [p for p in model.parameters() if p.requires_grad]
                grads = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
                if not found and not _all_finite(grads):
                    found.append("a weight's gradient")
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


class _Watch:
    """A hook that notes its module's name when an output or gradient is not finite."""

    def __init__(self, found: list[str], name: str) -> None:
        self.found, self.name = found, name

    def __call__(self, _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        if not _all_finite(tensors):
            self.found.append(self.name)


def _all_finite(tensors: Sequence[Any]) -> bool:
    floats = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    return all(bool(torch.isfinite(t).all()) for t in floats)
