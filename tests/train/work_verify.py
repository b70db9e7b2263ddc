"""What the ranks of the tests of `verify` do: the real function, with an error planted under the layout where asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardwright.config import RunError
from shardwright.parallel import tensor
from shardwright.parallel.zero import ShardedMasters
from shardwright.train import verify as subject
from shardwright.train.settings import read_config

SCALED, STALE, TIED = "blocks.1.mlp.down.weight", "blocks.0.attention.out.weight", "embed.tokens.weight"


def check(
    raw: dict[str, Any], overrides: list[str], number_format: str = "fp32", plant: str | None = None
) -> dict[str, Any]:
    """Verify two steps; the report, and what is left beside the run folder at the end."""
    torch.set_num_threads(1)
    with PLANTS[plant]() if plant else nothing():
        report = subject.verify(read_config(raw, overrides), steps=2, number_format=number_format)
    if dist.is_initialized():
        dist.barrier()
    return report.as_dict() | {"left": left(raw)}


def fail(raw: dict[str, Any], overrides: list[str]) -> tuple[str, list[str]]:
    """Verify while the run of one process fails on rank 0; what this rank hears of it, and what is left."""
    torch.set_num_threads(1)

    def breaks(*_: Any) -> None:
        raise RunError("no such luck")

    original, subject._run_alone = subject._run_alone, breaks  # type: ignore[assignment]
    try:
        subject.verify(read_config(raw, overrides))
    except RunError as error:
        return str(error), left(raw)
    finally:
        subject._run_alone = original
    return "", []


def left(raw: dict[str, Any]) -> list[str]:
    """What lies beside the run folder."""
    return [path.name for path in Path(raw["run"]).parent.iterdir()]


@contextmanager
def nothing() -> Iterator[None]:
    """No error."""
    yield


@contextmanager
def _after(method: str, change: Callable[[ShardedMasters, int], None]) -> Iterator[None]:
    """Within, `change(masters, number of the call)` follows each call of a method of the layout's masters."""
    original, calls = getattr(ShardedMasters, method), 0

    def changed(self: ShardedMasters) -> None:
        nonlocal calls
        original(self)
        calls += 1
        with torch.no_grad():
            change(self, calls)

    setattr(ShardedMasters, method, changed)
    try:
        yield
    finally:
        setattr(ShardedMasters, method, original)


def scaled_gradient(name: str = SCALED) -> Any:
    """The last rank's part of a gradient is 1 % too large."""

    def change(masters: ShardedMasters, call: int) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            masters.parts[name].grad.mul_(1.01)

    return _after("collect", change)


def stale_weight() -> Any:
    """The last rank forgets one update, that of the second step."""
    kept: dict[int, torch.Tensor] = {}

    def change(masters: ShardedMasters, call: int) -> None:
        part = masters.parts[STALE]
        if call == 2 and dist.get_rank() == dist.get_world_size() - 1:
            part.copy_(kept[1])
        kept[call] = part.clone()

    return _after("publish", change)


def unsteady_gradient() -> Any:
    """The last digit of a gradient depends on how often the program has run."""

    def change(masters: ShardedMasters, call: int) -> None:
        gradient = masters.parts[SCALED].grad
        if call > 2 and gradient.numel():
            gradient.view(-1)[0] *= 1 + 2 * torch.finfo(gradient.dtype).eps

    return _after("collect", change)


@contextmanager
def unsummed_norms() -> Iterator[None]:
    """Under sequence parallelism each tensor rank keeps its own tokens' gradient of the norms."""
    original = tensor.Style.held

    def held(self: tensor.Style) -> dict[str, torch.Tensor | None]:
        if not isinstance(self, tensor.Stream) or self.base is torch.nn.Embedding:
            return original(self)
        parts = self._parameters.items()
        return {name: None if p is None else p.to_local(grad_placements=[tensor.Replicate()]) for name, p in parts}

    tensor.Style.held = held  # type: ignore[method-assign]
    try:
        yield
    finally:
        tensor.Style.held = original  # type: ignore[method-assign]


PLANTS: dict[str, Callable[[], Any]] = {
    "scaled gradient": scaled_gradient,
    "scaled copy": partial(scaled_gradient, TIED),
    "stale weight": stale_weight,
    "unsteady gradient": unsteady_gradient,
    "unsummed norms": unsummed_norms,
}
