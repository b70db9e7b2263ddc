"""Engines: DeepSpeed or Accelerate in the place of PyTorch's own sharding, behind the same loop.

Between layout.py and step.py. What an engine replaces is narrow on purpose: the passes that `Stages` runs, the masters
and the optimizer of `Step`. Loss scale, spike guard, verdicts, norm, clipping factor and learning rate stay with
`Step`, so that a run means the same under every engine; checkpoints hold the same tensors under the same names, so that
each engine reads the others'. A library is imported by its own file alone, and only where a config asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from shardwright.config import Config, ConfigError

if TYPE_CHECKING:
    import torch

    from shardwright.objective.objective import Objective
    from shardwright.parallel.mesh import World
    from shardwright.train.stages import Stages
    from shardwright.train.step import Masters


class Built(NamedTuple):
    """What a `Step` is made of."""

    stages: Stages
    masters: Masters
    optimizer: torch.optim.Optimizer


def check_engine(config: Config) -> None:
    """ConfigError where the engine is not installed, or its section does not go with the rest of the config."""
    if config.engine == "deepspeed":
        from shardwright.train.engines.deepspeed import check

        check(config)
        return
    refuse_unused(config)
    if config.engine == "accelerate":
        from shardwright.train.engines.accelerate import check as check_accelerate

        check_accelerate(config)


def build_engine(config: Config, world: World, objective: Objective) -> Built:
    """Stages, masters and optimizer of a config whose engine is not the native one. Every rank has to call it."""
    if config.engine == "deepspeed":
        from shardwright.train.engines.deepspeed import build

        return build(config, world, objective)
    from shardwright.train.engines.accelerate import build as build_accelerate

    return build_accelerate(config, world, objective)


def refuse_unused(config: Config) -> None:
    """ConfigError naming the keys of `deepspeed` that were set where another engine runs: nothing would read them."""
    default = type(config.deepspeed)().model_dump()
    keys = [f"deepspeed.{key}" for key, value in config.deepspeed.model_dump().items() if value != default[key]]
    if keys:
        raise ConfigError(
            f"{', '.join(keys)}: has no effect under engine={config.engine}; use engine=deepspeed or drop it"
        )
