"""What the ranks of the equivalence tests do: the real `train`, and what it left behind in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright.train import run as loop
from shardwright.train.metrics import read_metrics
from shardwright.train.settings import read_config


def run(raw: dict[str, Any], overrides: list[str]) -> list[dict[str, Any]]:
    """Train as a config says; the records of metrics.jsonl."""
    torch.set_num_threads(1)
    result = loop.train(read_config(raw, overrides))
    return read_metrics(Path(result.run))


class Left(Exception):
    """The test has seen enough."""


def leg(raw: dict[str, Any], overrides: list[str], until: int) -> dict[int, list[int]]:
    """Train up to step `until`, where a checkpoint is due, and leave without another word.

    Gives the sequence numbers that this rank took, by step; padding left out.
    """
    torch.set_num_threads(1)
    seen: dict[int, list[int]] = {}

    class Leg(loop.Run):
        def _one_step(self) -> None:
            super()._one_step()
            assert self.last is not None
            numbers = torch.cat([batch["sequence"] for batch in self.last.micro_batches])
            seen[self.position.step] = numbers[numbers >= 0].tolist()

        def _after_step(self) -> None:
            super()._after_step()
            if self.position.step == until:
                self.writer.wait()
                raise Left

    original, loop.Run = loop.Run, Leg  # type: ignore[misc]
    try:
        loop.train(read_config(raw, overrides))
    except Left:
        pass
    finally:
        loop.Run = original  # type: ignore[misc]
    return seen


def overflow(raw: dict[str, Any], overrides: list[str], step: int, rank: int) -> list[dict[str, Any]]:
    """Train in fp16; before step `step`, rank `rank` alone spoils its gradients."""
    torch.set_num_threads(1)

    class Spoiled(loop.Run):
        def _one_step(self) -> None:
            if self.position.step + 1 == step and self.world.rank == rank:
                masters = self.step.masters
                collect = masters.collect

                def spoil() -> None:
                    collect()
                    masters.collect = collect  # type: ignore[method-assign]
                    tensors = getattr(masters, "parts", masters.weights)
                    tensors[sorted(tensors)[-1]].grad.view(-1)[:1] = float("inf")

                masters.collect = spoil  # type: ignore[method-assign]
            super()._one_step()

    original, loop.Run = loop.Run, Spoiled  # type: ignore[misc]
    try:
        return read_metrics(Path(loop.train(read_config(raw, overrides)).run))
    finally:
        loop.Run = original  # type: ignore[misc]


class HostReads(TorchDispatchMode):
    """Counts the operations that bring a device value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += function in reads
        return function(*args, **(kwargs or {}))


def host_reads(raw: dict[str, Any], overrides: list[str]) -> list[int]:
    """Host reads in each step of a run: of `accumulate` and `update` together."""
    torch.set_num_threads(1)
    counts: list[int] = []

    class Counted(loop.Run):
        def _one_step(self) -> None:
            accumulate, update = self.step.accumulate, self.step.update

            def counted(function: Any) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    with HostReads() as mode:
                        answer = function(*args, **kwargs)
                    counts.append(mode.count)
                    return answer

                return call

            self.step.accumulate, self.step.update = counted(accumulate), counted(update)  # type: ignore[method-assign]
            super()._one_step()
            del self.step.accumulate, self.step.update

    original, loop.Run = loop.Run, Counted  # type: ignore[misc]
    try:
        loop.train(read_config(raw, overrides))
    finally:
        loop.Run = original  # type: ignore[misc]
    return [a + b for a, b in zip(counts[::2], counts[1::2], strict=True)]
