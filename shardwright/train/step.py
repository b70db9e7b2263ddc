"""One optimizer step: all its micro-batches forward and backward, then one guarded update.

The loss is divided by counts known over all micro-batches before the first forward, so that how
a step is cut changes nothing. No value of the device is read on the host here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shardwright.model.transformer import Inputs, LanguageModel
from shardwright.objective.causal import Causal
from shardwright.objective.cross_entropy import Head
from shardwright.parallel.precision import LossScaler, Masters
from shardwright.train.guard import SpikeDetector
from shardwright.train.optim import set_factor

Batch = Mapping[str, Tensor]


class Outcome(NamedTuple):
    """What one step was, as numbers on the host."""

    loss: float
    grad_norm: float
    skipped: bool
    overflow: bool
    spike: bool
    loss_scale: float

    @classmethod
    def read(cls, numbers: Sequence[float]) -> Outcome:
        """From the tensor that `Step.update` returns, once it is on the host."""
        loss, norm, skipped, overflow, spike, scale = numbers
        return cls(loss, norm, bool(skipped), bool(overflow), bool(spike), scale)


class LossModel(nn.Module):
    """A model with its objective: one module whose forward gives the sum of each loss term."""

    def __init__(self, model: LanguageModel, objective: Causal, seed: int) -> None:
        super().__init__()
        self.model, self.objective, self.seed = model, objective, seed

    def forward(self, batch: Batch, step: Tensor, scales: Batch | None = None) -> dict[str, Tensor]:
        """Loss sums of one micro-batch; `step` (0-dim int64) keys what is random, `scales` are their gradients."""
        inputs = Inputs(
            input_ids=batch["input_ids"],
            position_ids=batch.get("position_ids"),
            documents=batch.get("documents"),
            sequence=batch.get("sequence"),
            step=step,
            seed=self.seed,
        )
        hidden = self.model.hidden(inputs)
        head = Head(self.model.head_weight, self.model.head_bias, self.model.config.logit_softcap)
        return self.objective.loss(hidden, head, batch, scales)


class Step:
    """Owns what a step changes: masters, optimizer, loss scale, spike window."""

    def __init__(
        self,
        model: LossModel,
        masters: Masters,
        optimizer: torch.optim.Optimizer,
        scaler: LossScaler,
        spikes: SpikeDetector,
        clip: float | None,
    ) -> None:
        self.model, self.masters, self.optimizer = model, masters, optimizer
        self.scaler, self.spikes, self.clip = scaler, spikes, clip
        self._loss = torch.zeros(())

    def accumulate(self, batches: Sequence[Batch], step: Tensor) -> None:
        """Forward and backward of every micro-batch; gradients of the mean loss, times the scale."""
        self.masters.clear()
        scales = self.scales(batches)
        total = torch.zeros_like(self.scaler.scale)
        for batch in batches:
            sums = self.model(batch, step, scales)
            # Divided before it is scaled: a sum times 65,536 overflows fp16 at once.
            loss = torch.stack([sums[term] * scales[term] for term in sums]).sum()
            loss.backward()
            total += loss.detach()
        self._loss = total / self.scaler.scale

    def update(self, factor: float) -> Tensor:
        """Apply the gradients at `factor` of the peak learning rate, unless they are unusable.

        Returns float32 [6] on the device, for `Outcome.read`.
        """
        scale = self.scaler.scale
        norm = self.masters.grad_norm() / scale
        overflow = ~(torch.isfinite(norm) & torch.isfinite(self._loss))
        spike = self.spikes.judge(self._loss, overflow)
        skipped = overflow | (spike if self.spikes.config.spike != "ignore" else torch.zeros_like(spike))
        self._scale_grads(norm, scale, skipped)
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        set_factor(self.optimizer, factor)
        self.optimizer.step()
        self.masters.publish()
        self.scaler.update(overflow)
        return torch.stack([self._loss, norm, skipped.float(), overflow.float(), spike.float(), scale])

    def _scale_grads(self, norm: Tensor, scale: Tensor, skipped: Tensor) -> None:
        if self.clip is None and not self.scaler.enabled:
            return
        factor = 1 / scale
        if self.clip is not None:
            factor = factor * (self.clip / (norm + 1e-6)).clamp(max=1.0)
        # A factor that is not finite would leave its mark between the tensors of the flat buffer.
        self.masters.scale_grads(torch.where(skipped, 1.0, factor))

    def scales(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """What each term's sum is multiplied by: its weight and the loss scale over the count of the whole step."""
        counts = [self.model.objective.count(batch) for batch in batches]
        return {
            term: self.scaler.scale * weight / torch.stack([c[term] for c in counts]).sum().clamp(min=1)
            for term, weight in self.model.objective.terms.items()
        }
