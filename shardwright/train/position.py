"""Where a run stands: the part of its state that is numbers, not tensors; and the names of those tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from shardwright.train.optim import load_state_tensors, state_tensors
from shardwright.train.step import Step


@dataclass
class Position:
    """Counts of finished steps; with the config they say which data comes next and at which learning rate."""

    step: int = 0
    drawn: int = 0  # sequences taken by finished steps, skipped steps included
    excluded: list[tuple[int, int]] = field(default_factory=list)  # [start, stop) of sequence numbers never taken
    elapsed: float = 0.0  # seconds of training, over all starts
    startup: float = 0.0  # of these, until the first step was done: building and compiling
    interventions: int = 0  # skips and roll-backs so far
    done: bool = False  # the run has had its whole length; under a budget the clock alone could not say so again
    progress: dict[str, Any] = field(default_factory=dict)  # of train.schedule.Progress

    def state(self) -> dict[str, Any]:
        """For a checkpoint, JSON."""
        return asdict(self)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Position:
        """From what `state` gave."""
        ranges = [(int(a), int(b)) for a, b in state["excluded"]]
        return cls(**{**state, "excluded": ranges})


def checkpoint_tensors(step: Step) -> dict[str, Tensor]:
    """Every tensor that a run needs to go on, under its logical name; live, to be saved or filled."""
    parts = {
        "model": step.masters.weights,
        "optimizer": state_tensors(step.optimizer),
        "loss_scale": step.scaler.state_tensors(),
        "spikes": step.spikes.state_tensors(),
    }
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def apply_tensors(step: Step, tensors: dict[str, Tensor]) -> None:
    """Bring what was loaded into `checkpoint_tensors` into force."""

    def part(name: str) -> dict[str, Tensor]:
        prefix = f"{name}."
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    load_state_tensors(step.optimizer, part("optimizer"))
    step.scaler.load_state_tensors(part("loss_scale"))
    step.spikes.load_state_tensors(part("spikes"))
    step.masters.restore(part("model"))
