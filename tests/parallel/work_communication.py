"""What ranks run for test_communication.py: a real step with every collective counted, beside the formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.counting import Traffic
from shardwright.config import Config
from shardwright.estimate.communication import Amounts, plus, step_communication
from shardwright.estimate.share import Layout, Place, Work
from shardwright.model.encoder_decoder import EncoderDecoderConfig
from shardwright.model.families import build_model
from shardwright.parallel.mesh import AXES, World, build_world
from shardwright.train.build import build_step
from shardwright.train.layout import _stage_layers, num_virtual
from shardwright.train.settings import read_config
from shardwright.train.step import Step

MICRO_BATCHES = 4
TARGET = 8  # tokens of an encoder-decoder's target
SPANS = {"world": AXES, "shard": ("shard", "context")}  # of the formulas' axes, where it is not the mesh's own
MODEL = {"family": "gpt2", "layers": 3, "width": 32, "heads": 4, "max_length": 64, "vocab_size": 61}
CONFIG: dict[str, Any] = {
    "run": "none",
    "model": MODEL,
    "objective": {"name": "causal"},
    "data": {"sequence_length": 16},
    "batch": {"sequences": 8, "micro": 2},
    "train": {"steps": 3, "compile": False, "device": "cpu", "threads": 1},
    "optimizer": {"lr": 1e-3},
}


def make_config(overrides: list[str], **model: Any) -> Config:
    """The config of a case."""
    return read_config({**CONFIG, "model": {**MODEL, **model}}, overrides)


def make_batches(config: Config, count: int = MICRO_BATCHES) -> list[dict[str, Tensor]]:
    """Micro-batches of random tokens; of an encoder-decoder those are sources, and their beginnings targets."""
    shape = (config.batch.micro, config.data.sequence_length)
    made = []
    for number in range(count):
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(number))
        source = {"encoder_ids": tokens} if isinstance(config.model, EncoderDecoderConfig) else {}
        own = tokens[:, :TARGET].contiguous() if source else tokens
        rows = torch.arange(shape[0]) + number * shape[0]
        made.append({"input_ids": own, "labels": own, "weights": torch.ones(own.shape), "sequence": rows, **source})
    return made


def measure(overrides: list[str], model: dict[str, Any], spoil: str = "") -> tuple[Amounts, Amounts]:
    """(counted, expected) of this rank in the second step, by the ranks of groups; `spoil` as of `_spoil`."""
    config = make_config(overrides, **model)
    world = build_world("cpu", 1, config.parallel)
    step, batches = build_step(config, world), make_batches(config)
    take(step, batches, 1)  # a pipeline says hello to its neighbours in the first one
    if spoil:
        _spoil(step, spoil)
    with Traffic() as traffic:
        take(step, batches, 2)
    return traffic.amounts, _named(_expect(config, world), world)


def take(step: Step, batches: list[dict[str, Tensor]], number: int) -> None:
    """One step."""
    step.accumulate(batches, torch.tensor(number))
    step.update(1.0)


def _spoil(step: Step, what: str) -> None:
    """Make the engine wasteful, as a slip would: the count has to notice."""
    model = step.stages.models[0]
    block: Any = next(iter(model.model.blocks.values()))
    if what == "gather":  # parameters are let go and fetched again
        block.register_forward_hook(lambda *_: block.reshard())
    elif what == "reduce":  # gradients travel with every micro-batch
        model.register_forward_pre_hook(lambda *_: model.set_requires_gradient_sync(True))  # type: ignore[operator]
    elif what == "norm":  # the sum over ranks is taken twice
        square = step.masters.grad_square
        step.masters.grad_square = lambda scale: step.stages.world.sum(square(scale))  # type: ignore[method-assign]


def _expect(config: Config, world: World) -> Amounts:
    parallel = config.parallel
    layout = Layout.of(parallel, world.size, num_virtual(config))
    target = TARGET if isinstance(config.model, EncoderDecoderConfig) else None
    work = Work.of(config, MICRO_BATCHES, target=target)
    spread = world.index("shard") * world.degree("context") + world.index("context")
    place = Place(pipeline=world.index("pipeline"), spread=spread, tensor=world.index("tensor"))
    return step_communication(config.model, layout, work, place=place, stages=_stages(config, world))  # type: ignore


def _stages(config: Config, world: World) -> list[list[str]] | None:
    """Names of the layers of every stage, as the real one cuts them."""
    if config.parallel.pipeline == 1:
        return None
    names = [name for name, _ in build_model(config.model).layers()]  # type: ignore[arg-type]
    return [names[part.start : part.stop] for part in _stage_layers(config, world)[0]]


def _named(amounts: Amounts, world: World) -> Amounts:
    """By ranks instead of axes: two axes of the same ranks are one to a counter."""
    named: Amounts = {}
    for (axis, collective), amount in amounts.items():
        plus(named, _ranks(world, SPANS.get(axis, (axis,))), collective, *amount)
    return named


def _ranks(world: World, axes: tuple[str, ...]) -> str:
    """Those that differ from this one along `axes` alone."""
    assert world.mesh is not None
    place = tuple(slice(None) if axis in axes else world.index(axis) for axis in AXES)
    return ",".join(map(str, world.mesh.mesh[place].flatten().tolist()))
