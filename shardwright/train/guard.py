"""Watching the loss: what is not finite and what jumps, decided on the device for all ranks alike.

The verdict of a step guards its own update (a skipped step changes no weight). What needs the
host (rolling back, stopping) is decided one step later, from a copy that did not stop the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardwright.config import GuardConfig


class SpikeDetector:
    """Mean and deviation of the last losses, and whether a new one stands far above them."""

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self.config = config
        self.losses = torch.zeros(config.window, dtype=torch.float32, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self._slots = torch.arange(config.window, device=device)

    def judge(self, loss: Tensor, unusable: Tensor) -> Tensor:
        """Whether `loss` (0-dim) is a spike; takes it into the window where it is not.

        No loss is a spike until half the window is filled.
        """
        if self.config.spike == "ignore":
            return torch.zeros_like(unusable)
        filled = self._slots < self.count
        n = filled.sum().clamp(min=1)
        mean = (self.losses * filled).sum() / n
        deviation = (((self.losses - mean) ** 2 * filled).sum() / n).sqrt()
        # Losses that hardly vary would make any step a spike: 1 % of the mean is the least deviation.
        limit = mean + self.config.threshold * torch.maximum(deviation, mean.abs() * 0.01)
        ready = self.count[0] * 2 >= self.config.window
        spike = ready & (loss > limit) & ~unusable
        here = (self._slots == self.count % self.config.window) & ~(spike | unusable)
        self.losses = torch.where(here, loss, self.losses)
        self.count = self.count + here.any()
        return spike

    def state_tensors(self) -> dict[str, Tensor]:
        """Tensors a checkpoint holds."""
        return {"losses": self.losses, "count": self.count}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_tensors` gave."""
        self.losses, self.count = state["losses"].clone(), state["count"].clone()


class DelayedRead:
    """A small device tensor, read on the host one step after it was made, without stopping the device."""

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def put(self, tensor: Tensor) -> None:
        """Begin to copy a float32 tensor [n] to the host."""
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = tensor.clone()

    def take(self) -> list[float] | None:
        """What was put last, once; waits for that copy alone."""
        host, self._host = self._host, None
        if host is None:
            return None
        if self._event is not None:
            self._event.synchronize()
        return host.numpy().tolist()
