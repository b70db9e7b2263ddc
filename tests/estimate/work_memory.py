"""What ranks run for test_memory.py: a real step with its tensors tracked, beside the formula."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.counting import Memory
from shardwright.estimate.memory import step_memory
from shardwright.estimate.share import Layout, Place, Work
from shardwright.parallel.mesh import build_world
from shardwright.train.build import build_step
from shardwright.train.layout import build_facts, num_virtual
from shardwright.train.preview import stage_layers
from tests.parallel.work_communication import MICRO_BATCHES, make_batches, make_config, take


def measure(overrides: list[str], model: dict[str, Any]) -> tuple[int, dict[str, int], dict[str, int]]:
    """(peak bytes of tensors in the second step, those of masters and moments, the formula's) of this rank."""
    config = make_config(overrides, **model)
    world = build_world("cpu", 1, config.parallel)
    tracker = Memory()
    with tracker:
        step = build_step(config, world)
        batches = make_batches(config)
        take(step, batches, 1)
        tracker.peak = tracker.live
        take(step, batches, 2)
    masters: Any = step.masters
    tracker.name("masters", getattr(masters, "parts", masters.weights).values())
    tracker.name("optimizer", [tensor for state in step.optimizer.state.values() for tensor in state.values()])
    work = Work.of(config, MICRO_BATCHES)
    several = config.parallel.pipeline > 1
    expected = step_memory(
        config.model,  # type: ignore[arg-type]
        work,
        optimizer=config.optimizer.name,
        layout=Layout.of(config.parallel, world.size, num_virtual(config)) if world.size > 1 else None,
        place=Place(pipeline=world.index("pipeline"), tensor=world.index("tensor")),
        stages=stage_layers(config, build_facts(config, world.size)) if several else None,
    )
    return tracker.peak, tracker.at_peak(), expected


def track(size: int) -> list[int]:
    """Live and peak bytes of a tracker while tensors of `size` floats come and go."""
    tracker, seen = Memory(), []
    with tracker:
        a = torch.zeros(size)
        b = a.view(-1)[1:]  # shares its memory
        seen.append(tracker.live)
        c = a + 1
        seen.append(tracker.live)
        del a, c
        seen.append(tracker.live)
        b.untyped_storage().resize_(0)
        seen.append(tracker.live)
    return [*seen, tracker.peak]
