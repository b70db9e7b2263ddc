"""One optimizer step: all its micro-batches forward and backward, then one guarded update.

The loss is divided by counts known over all ranks and micro-batches before the first forward, so that how a step is
cut changes nothing. What all ranks have to agree on (norm, loss, whether to stop) travels in one sum of three numbers.
No value of the device is read on the host here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from shardwright.adapt.prune import ZeroKeeper
from shardwright.parallel.logical import Logical
from shardwright.parallel.precision import LossScaler
from shardwright.train.guard import SpikeDetector
from shardwright.train.optim import set_factor
from shardwright.train.stages import Batch, Stages


class Outcome(NamedTuple):
    """What one step was, as numbers on the host."""

    loss: float
    grad_norm: float
    skipped: bool
    overflow: bool
    spike: bool
    loss_scale: float
    stop: bool

    @classmethod
    def read(cls, numbers: Sequence[float]) -> Outcome:
        """From the tensor that `Step.update` returns, once it is on the host."""
        loss, norm, skipped, overflow, spike, scale, stop = numbers
        return cls(loss, norm, bool(skipped), bool(overflow), bool(spike), scale, bool(stop))


class Masters(Protocol):
    """The float32 weights behind a model: `parallel.precision.Masters`, `parallel.zero.ShardedMasters`, an engine's."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """By logical name: live, or a copy where an engine owns them."""

    def clear(self) -> None:
        """Forget the gradients."""

    def set_aside(self) -> AbstractContextManager[None]:
        """For a block that computes gradients once more and leaves those that are there."""

    def collect(self) -> None:
        """All gradients are there: make them whole and fit for the optimizer."""

    def grad_square(self, scale: Tensor) -> Tensor:
        """This rank's share of the squared norm of the gradients over `scale`."""

    def scale_grads(self, factor: Tensor) -> None:
        """Multiply every gradient."""

    def publish(self) -> None:
        """The weights have changed."""

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """`weights`, as this object gave them, were filled from a checkpoint: bring them into force."""


@runtime_checkable
class GivesCopies(Protocol):
    """Masters of an engine, which shows what it holds by copies alone."""

    def copies(self, kind: str) -> dict[str, tuple[Logical, Tensor]]:
        """This rank's part of every `gradient` (before clipping) or `weight`; every rank has to ask."""


class Step:
    """Owns what a step changes: masters, optimizer, loss scale, spike window."""

    def __init__(
        self,
        stages: Stages,
        masters: Masters,
        optimizer: torch.optim.Optimizer,
        scaler: LossScaler,
        spikes: SpikeDetector,
        clip: float | None,
        zeros: ZeroKeeper | None = None,
    ) -> None:
        self.stages, self.masters, self.optimizer = stages, masters, optimizer
        self.scaler, self.spikes, self.clip, self.zeros = scaler, spikes, clip, zeros
        self._loss = torch.zeros(())

    def accumulate(self, batches: Sequence[Batch], number: Tensor) -> None:
        """Forward and backward of every micro-batch; gradients of the mean loss, times the scale."""
        batches = [self.stages.cut(batch) for batch in batches]
        self.masters.clear()
        self.stages.begin(number, self.scales(batches))
        self._loss = self.stages.run(batches) / self.scaler.scale
        self.masters.collect()

    def scales(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """What each term's sum is multiplied by: its weight and the loss scale over the count of the whole step.

        `batches` as `cut` made them.
        """
        counts = self.stages.counts(batches).clamp(min=1).to(self.scaler.scale.dtype).unbind()
        terms = self.stages.objective.terms.items()
        return {t: self.scaler.scale * weight / count for (t, weight), count in zip(terms, counts, strict=True)}

    def update(self, factor: float, *, stop: bool = False) -> Tensor:
        """Apply the gradients at `factor` of the peak learning rate, unless they are unusable.

        Returns float32 [7] on the device, for `Outcome.read`; `stop` is set there if any rank asked for it.
        """
        scale = self.scaler.scale
        if self.zeros is not None:
            self.zeros.note()
        square = self.masters.grad_square(scale)
        asked = torch.full_like(square, float(stop))
        world = self.stages.world
        total = world.sum(torch.stack([square, self._loss / world.loss_copies, asked]))
        norm, loss = total[0].sqrt(), total[1]
        overflow = ~(torch.isfinite(norm) & torch.isfinite(loss))
        spike = self.spikes.judge(loss.float(), overflow)
        skipped = overflow | (spike if self.spikes.config.spike != "ignore" else torch.zeros_like(spike))
        self._scale_grads(norm, scale, skipped)
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        set_factor(self.optimizer, factor)
        self.optimizer.step()
        if self.zeros is not None:
            self.zeros.apply()
        self.masters.publish()
        self.scaler.update(overflow)
        return torch.stack([loss, norm, skipped.float(), overflow.float(), spike.float(), scale, total[2]])

    def _scale_grads(self, norm: Tensor, scale: Tensor, skipped: Tensor) -> None:
        if self.clip is None and not self.scaler.enabled:
            return
        factor = 1 / scale
        if self.clip is not None:
            factor = factor * (self.clip / (norm + 1e-6)).clamp(max=1.0)
        # A factor that is not finite would leave its mark between the tensors of a flat buffer.
        self.masters.scale_grads(torch.where(skipped, 1.0, factor))
