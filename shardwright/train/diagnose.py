"""What was wrong with a step; running it once more, uncompiled, finds the first module with numbers not finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.data.loader import StepBatch
from shardwright.train.stages import Batch, LossModel, Stages
from shardwright.train.step import Masters, Outcome, Step

_NOTHING = "no single module: the sum over micro-batches"
_LOSS, _NEVER = 10**9, 4 * 10**9  # what is earlier in a step has the smaller number


def describe(step: Step, number: int, batch: StepBatch, outcome: Outcome) -> str:
    """Step `number`, its sequences and what was wrong with it, in one line; every rank has to call it."""
    where = f"step {number} (sequences {batch.first} to {batch.last})"
    if not outcome.overflow:
        return f"{where}: the loss {outcome.loss:.4f} is a spike"
    before = torch.tensor(number - 1, device=step.stages.world.device)
    batches = [step.stages.cut(micro) for micro in batch.micro_batches]
    # The scale has fallen since.
    ratio = outcome.loss_scale / step.scaler.scale
    scales = {term: scale * ratio for term, scale in step.scales(batches).items()}
    step.stages.begin(before, scales)
    module = first_nonfinite(step.stages, step.masters, batches)
    return f"{where}: not finite, first in {module}"


def first_nonfinite(stages: Stages, masters: Masters, batches: Sequence[Batch]) -> str:
    """For instance "blocks.3.mlp.down (backward)"; leaves gradients and weights as they are.

    The stages are told before of the step that was not finite (`Stages.begin`), with its scales; `batches` are cut.
    Every rank has to call it; all give the answer of the rank that was first.
    """
    found = Found()
    with _watched(stages, found), torch.compiler.set_stance("force_eager"):
        if stages.world.mesh is None:
            _run_alone(stages.models[0], batches, found)
        else:
            with masters.set_aside():
                if not torch.isfinite(stages.run(batches)):
                    found.note(_LOSS, "the loss")
    return stages.world.first(found.place, found.text)


class Found:
    """The earliest place that was not finite: forward through the layers, then the loss, then backward."""

    def __init__(self) -> None:
        self.place, self.text = _NEVER, _NOTHING

    def note(self, place: int, text: str) -> None:
        """Take it if it is earlier than what was found."""
        if place < self.place:
            self.place, self.text = place, text


def _run_alone(model: LossModel, batches: Sequence[Batch], found: Found) -> None:
    """One process: gradients are asked for, so that none reaches a parameter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for number, batch in enumerate(batches):
        loss = model(batch["input_ids"], **batch).sum()
        if not _is_finite(loss):
            found.note(_LOSS, "the loss")
        if found.place > _LOSS:
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            if not all(_is_finite(g) for g in grads if g is not None):
                found.note(_NEVER - 1, "a weight's gradient")
        if found.place < _NEVER:
            found.text += f", micro-batch {number}"
            return


@contextmanager
def _watched(stages: Stages, found: Found) -> Iterator[None]:
    """Within the block, every module of this rank that has no parts notes what is not finite."""
    hooks = []
    for stage in stages.models.values():
        parts = [(n, m) for n, m in stage.model.named_modules() if n and not any(m.children())]
        for index, (name, module) in enumerate(parts):
            hooks.append(module.register_forward_hook(_Watch(found, name, _place(name, index))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _place(name: str, index: int) -> int:
    """Where a module stands in the forward pass of the whole model."""
    area, *rest = name.split(".")
    layer = {"embed": 0, "blocks": int(rest[0]) + 1 if rest and rest[0].isdigit() else 0}.get(area, 10**5)
    return layer * 1000 + index % 1000


class _Watch:
    """A forward hook that notes its module when what comes out of it, or back into it, is not finite."""

    def __init__(self, found: Found, name: str, place: int) -> None:
        self.found, self.name, self.place = found, name, place

    def __call__(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if not _is_finite(output):
            self.found.note(self.place, f"{self.name} (forward)")
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        if not _is_finite(gradient):
            self.found.note(_NEVER - 2 - self.place, f"{self.name} (backward)")


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
