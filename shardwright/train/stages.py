"""The part of a model that one rank computes, and how the micro-batches of a step pass through it.

Below step.py, which updates the weights, and evaluate.py, which does not; layout.py builds it.
Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shardwright.model.transformer import Inputs, LanguageModel
from shardwright.objective.cross_entropy import Head
from shardwright.objective.heads import Heads
from shardwright.objective.objective import Objective
from shardwright.parallel.mesh import World
from shardwright.parallel.zero import begin_micro_batch, reshard, sharded_modules

Batch = Mapping[str, Tensor]
Cut = Callable[[Batch], Batch]


class LossModel(nn.Module):
    """A model, or one stage of it, with its objective: the module that a pass runs.

    Called as ``module(x, **batch)``: `x` is the token ids [B, T] for the first stage, activations [B, T, D] for a later
    one. Gives activations for an inner stage; for the last one the sum of each loss term, float32 [terms], times its
    scale where scales were given.
    """

    def __init__(
        self, model: LanguageModel, objective: Objective, seed: int, *, first: bool = True, last: bool = True
    ) -> None:
        super().__init__()
        self.model, self.objective, self.seed = model, objective, seed
        self.first, self.last = first, last
        self.number = torch.zeros((), dtype=torch.int64)
        self.scales: Mapping[str, Tensor] | None = None
        #: What an engine multiplies losses by before it goes back from them.
        self.factor = 1.0
        self.passes = 0  # begun since `begin`: where in the step this stage is
        #: Turns hidden states and heads into what this rank computes the loss with; a tensor axis puts its own here.
        self.localize: Callable[[Tensor, Heads], tuple[Tensor, Heads]] = lambda hidden, heads: (hidden, heads)
        #: Of [B, T] the part [B, t] that travels with this rank's activations, and back; set by sequence parallelism.
        self.own_tokens: Callable[[Tensor], Tensor] = lambda x: x
        self.all_tokens: Callable[[Tensor], Tensor] = lambda x: x
        #: Sums of the terms that an earlier stage than the last one knew, since they were last taken; [terms].
        self.early: Tensor | None = None

    def begin(self, number: Tensor, scales: Mapping[str, Tensor] | None = None) -> None:
        """Before the passes of a step: its number (0-dim int64), which keys what is random, and the terms' scales."""
        self.number, self.scales, self.passes, self.early = number, scales, 0, None

    def forward(self, x: Tensor, **batch: Tensor) -> Tensor:
        """See the class."""
        self.passes += 1
        inputs = self.inputs(batch)
        hidden = self.model.hidden(inputs, None if self.first else x)
        return self.sums(self.model.output(hidden, inputs), self.heads(), batch) if self.last else hidden

    def border(self, shapes: Mapping[str, torch.Size]) -> tuple[int, int, int]:
        """Shape of what it gives or is given between stages, from the shapes of a batch by name: [B, tokens, width]."""
        return shapes["input_ids"][0], self.model.border(shapes), self.model.config.width

    def inputs(self, batch: Batch) -> Inputs:
        """What the model reads of a batch."""
        given: dict[str, Any] = {name: batch[name] for name in Inputs._fields if name in batch}
        return Inputs(**given, step=self.number, seed=self.seed)

    def heads(self) -> Heads:
        """What the last stage computes losses with."""
        if self.model.config.classify != "none":
            return Heads(None, None, self.model.other_heads())
        return Heads(self.vocabulary(), self.model.transform, self.model.other_heads())

    def vocabulary(self) -> Head:
        """The head over the vocabulary."""
        return Head(self.model.head_weight, self.model.head_bias, self.model.config.logit_softcap)

    def sums(self, hidden: Tensor, heads: Heads, batch: Batch) -> Tensor:
        """Hidden states [B, T, D] -> [terms]."""
        return self.stacked(self.objective.loss(*self.localize(hidden, heads), batch, self.scales))

    def stacked(self, sums: Mapping[str, Tensor]) -> Tensor:
        """The terms' sums in their order, times their scales: divided first, for a sum times 65,536 overflows fp16."""
        return torch.stack([sums[t] if self.scales is None else sums[t] * self.scales[t] for t in self.objective.terms])


class Passes(Protocol):
    """Runs the micro-batches of a step: `Loop` in one stage, `parallel.pipeline.Pipeline` in several."""

    def run(self, batches: Sequence[Batch]) -> Tensor:
        """Forward and backward of all; the sum of the outputs of the last stage (0-dim), 0 on other ranks."""

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """The sums of the terms, float32 [terms], without gradients; 0 on ranks without the last stage.

        Takes `at_once` batches.
        """

    @property
    def at_once(self) -> int:
        """Batches of one evaluation pass."""


class Loop:
    """One micro-batch after the other, through the one stage there is. `zero`: the ZeRO stage where FSDP wraps it.

    `around`: what has to stand around passes.
    """

    at_once = 1

    def __init__(
        self,
        model: LossModel,
        zero: int | None = None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model, self.zero, self.around = model, zero, around
        self._wrapped = tuple(sharded_modules(model))

    def run(self, batches: Sequence[Batch]) -> Tensor:
        """Gradients accumulate in the parameters."""
        total: Tensor | None = None
        with self.around():
            for number, batch in enumerate(batches, 1):
                if self.zero is not None:
                    begin_micro_batch(self._wrapped, self.zero, last=number == len(batches))
                loss = self.model(batch["input_ids"], **batch).sum()
                loss.backward()
                total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Sums over all batches."""
        with torch.no_grad(), self.around():
            sums = [self.model(batch["input_ids"], **batch) for batch in batches]
        return torch.stack(sums).sum(0)


def whole(batch: Batch) -> Batch:
    """A batch as it is: the cut of a rank that computes whole sequences."""
    return batch


class Stages:
    """All stages of this rank, with what runs them. `cut` takes from a batch of whole sequences what they compute."""

    def __init__(
        self,
        models: Mapping[int, LossModel],
        passes: Passes,
        world: World,
        cut: Cut = whole,
    ) -> None:
        self.models, self.passes, self.world, self.cut = models, passes, world, cut
        self.objective = next(iter(models.values())).objective

    def run(self, batches: Sequence[Batch]) -> Tensor:
        """Forward and backward of the micro-batches of a step; the sum of all terms here (0-dim)."""
        total, early = self.passes.run(batches), self._early()
        return total if early is None else total + early.sum()

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """The sums of the terms that are known here, [terms], without gradients."""
        sums, early = self.passes.evaluate(batches), self._early()
        return sums if early is None else sums + early

    def _early(self) -> Tensor | None:
        """What a stage here that is not the last one knew of the terms; no two of them do."""
        for model in self.models.values():
            found, model.early = model.early, None
            if found is not None:
                return found
        return None

    def begin(self, number: Tensor, scales: Mapping[str, Tensor] | None = None) -> None:
        """Tell every stage which step comes."""
        for model in self.models.values():
            model.begin(number, scales)

    def train(self, mode: bool) -> None:
        """Training or evaluation mode. Gathered weights are let go, for those that come are others."""
        for model in self.models.values():
            model.train(mode)
            reshard(sharded_modules(model))

    def counts(self, batches: Sequence[Batch]) -> Tensor:
        """Denominator of each term over these batches, cut, of all ranks: float64 [terms]."""
        counts = [self.objective.count(batch) for batch in batches]
        total = torch.stack([torch.stack([c[term] for c in counts]).double().sum() for term in self.objective.terms])
        return self.world.sum(total) / self.world.token_copies
