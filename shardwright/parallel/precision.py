"""Number formats of a step: float32 masters, compute copies, and the loss scale of fp16.

One rule for every layout: all parameters and activations are in the compute format; norms,
softmax statistics, the loss, gradients once they reach a parameter, and the optimizer are in
float32; all of it is in float64 where the compute format is, for comparisons. Masters, gradients
and copies lie in three flat buffers, so that one kernel each makes the copies, clears the gradients
and takes their norm; nothing here reads a value on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from shardwright.config import LossScaleConfig
from shardwright.parallel.logical import norm_here

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_ALIGNMENT = 64  # elements: every tensor starts on a cache line in either format


def master_format(compute: torch.dtype) -> torch.dtype:
    """The format of masters, gradients, reductions and losses: float32, or float64 where the passes are in it."""
    return torch.promote_types(compute, torch.float32)


class Masters:
    """The logical weights in float32, with their gradients, behind the parameters of a model.

    After construction the model's parameters are views of one buffer in the compute format (of the
    masters themselves in float32). A gradient that reaches a parameter moves on at once, in float32,
    to the master: `parameter.grad` stays None. What is frozen has no master and no gradient: it is in the compute
    format alone. `weights` are all of them, `parts` those that an optimizer updates.
    """

    def __init__(self, model: nn.Module, compute: torch.dtype) -> None:
        parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        device = parameters[0][1].device
        offsets, size = _offsets([p.numel() for _, p in parameters])
        self._weights = torch.zeros(size, dtype=master_format(compute), device=device)
        self._grads = torch.zeros_like(self._weights)
        same = compute == self._weights.dtype
        self._copies = self._weights if same else torch.zeros(size, dtype=compute, device=device)
        self.parts: dict[str, Tensor] = {}
        for (name, parameter), offset in zip(parameters, offsets, strict=True):
            self._adopt(name, parameter, offset)
        cast_frozen(model, compute)
        self.weights = {n: self.parts.get(n, p.detach()) for n, p in model.named_parameters()}
        self._untouched = dict(self.parts)
        self.publish()

    def _adopt(self, name: str, parameter: nn.Parameter, offset: int) -> None:
        def view(flat: Tensor) -> Tensor:
            return flat[offset : offset + parameter.numel()].view(parameter.shape)

        master = view(self._weights)
        master.copy_(parameter.detach())
        master.grad = view(self._grads)
        parameter.data = view(self._copies)
        parameter.register_post_accumulate_grad_hook(partial(self._take, name))
        self.parts[name] = master

    @torch.no_grad()
    def _take(self, name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        accumulated = self.parts[name].grad
        assert gradient is not None and accumulated is not None
        if self._untouched.pop(name, None) is None:
            accumulated.add_(gradient)
        else:
            accumulated.copy_(gradient)

    def publish(self) -> None:
        """Bring the model's copies up to date with the masters, after a step or a load."""
        if self._copies is not self._weights:
            self._copies.copy_(self._weights)

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """`weights`, which are the masters themselves, were filled from a checkpoint."""
        self.publish()

    def clear(self) -> None:
        """Forget the gradients: the next one of each parameter replaces what is there."""
        self._untouched = dict(self.parts)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within the block gradients may be asked of autograd; none may reach a parameter."""
        yield

    def collect(self) -> None:
        """All gradients are there: those that none came for are zero."""
        for master in self._untouched.values():
            assert master.grad is not None
            master.grad.zero_()
        self._untouched = {}

    def grad_square(self, scale: Tensor) -> Tensor:
        """The squared 2-norm of all gradients over `scale`, a scalar on the device."""
        return (norm_here(self._grads) / scale).square()

    def scale_grads(self, factor: Tensor) -> None:
        """Multiply every gradient by a scalar on the device."""
        self._grads.mul_(factor)


def cast_frozen(model: nn.Module, compute: torch.dtype) -> None:
    """Bring what is not trained into the compute format, in place: no step changes it, so nothing wider is needed."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(compute)


def _offsets(sizes: list[int]) -> tuple[list[int], int]:
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


class LossScaler:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018), decided on the device.

    The scale grows after `window` clean steps and falls after `hysteresis` overflows in a row, never
    under `floor`. Without fp16 it is the constant 1. `dtype` is that of masters.
    """

    def __init__(
        self, config: LossScaleConfig, device: torch.device, *, enabled: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        self.config, self.enabled = config, enabled
        self.scale = torch.tensor(config.initial if enabled else 1.0, dtype=dtype, device=device)
        self.clean = torch.zeros((), dtype=torch.int64, device=device)
        self.overflows = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, overflow: Tensor) -> None:
        """Take in whether this step overflowed (0-dim bool)."""
        if not self.enabled:
            return
        config = self.config
        self.clean = torch.where(overflow, 0, self.clean + 1)
        self.overflows = torch.where(overflow, self.overflows + 1, 0)
        grow, fall = self.clean >= config.window, self.overflows >= config.hysteresis
        scale = torch.where(fall, self.scale * config.backoff, self.scale)
        scale = torch.where(grow, scale * config.growth, scale)
        self.scale = scale.clamp(min=config.floor)
        self.clean = torch.where(grow, 0, self.clean)
        self.overflows = torch.where(fall, 0, self.overflows)

    def state_tensors(self) -> dict[str, Tensor]:
        """Tensors a checkpoint holds."""
        return {"scale": self.scale, "clean": self.clean, "overflows": self.overflows}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_tensors` gave."""
        for name, tensor in state.items():
            getattr(self, name).copy_(tensor)
