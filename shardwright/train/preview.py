"""`train --dry-run`: what a run would be, without building it."""

from __future__ import annotations

import json

from shardwright.config import Config, to_yaml
from shardwright.estimate.memory import step_memory
from shardwright.log import quantity
from shardwright.model.count import num_flops, num_parameters
from shardwright.parallel.mesh import build_world
from shardwright.parallel.precision import FORMATS
from shardwright.train.build import build_corpus, check_length, fit_to_corpus
from shardwright.train.course import Course


def batch_equation(config: Config, data_size: int = 1) -> str:
    """The global batch as the product of what it is made of."""
    sequences, micro, length = config.global_batch(), config.batch.micro, config.data.sequence_length
    each = -(-sequences // data_size)
    steps = -(-each // micro)
    padded = steps * micro * data_size - sequences
    tail = f" - {padded} of padding" if padded else ""
    return (
        f"global batch {sequences} sequences = {micro} a micro-batch x {steps} micro-batches x {data_size} data ranks"
        f"{tail}; x {length} tokens = {sequences * length:,} tokens a step"
    )


def preview(config: Config, *, as_json: bool = False) -> str:
    """The resolved config, batch, size, FLOPs and memory of a run, as text or JSON."""
    world = build_world(config.train.device, config.train.threads)
    check_length(config)
    course = Course(config)
    if config.model.vocab_size == 0 or config.data.mixture():
        fit_to_corpus(config, build_corpus(config))
    model, length = config.model, config.data.sequence_length
    parameters = num_parameters(model)  # type: ignore[arg-type]
    flops = num_flops(model, length)  # type: ignore[arg-type]
    memory = step_memory(
        model,  # type: ignore[arg-type]
        length=length,
        micro_batch=config.batch.micro,
        value_bytes=FORMATS[config.precision.compute].itemsize,
        optimizer=config.optimizer.name,
        recompute=config.train.recompute,
    )
    if as_json:
        facts = {"parameters": parameters, "flops_per_token": flops.model, "memory_bytes": memory}
        return json.dumps({"config": config.model_dump(mode="json"), "batch": batch_equation(config), **facts})
    sizes = _sizes(parameters, flops.model, memory)
    lines = [to_yaml(config), batch_equation(config), _length(config, course), *sizes, f"device: {world.device}"]
    return "\n".join(lines)


def _length(config: Config, course: Course) -> str:
    if course.steps is None:
        batch = config.global_batch() * course.length
        return f"length: {config.train.budget} of wall-clock time, {batch:,} tokens a step"
    return f"length: {course.steps:,} steps, {course.ramp.drawn_after(course.steps) * course.length:,} tokens"


def _sizes(parameters: dict[str, int], flops: float, memory: dict[str, int]) -> list[str]:
    parts = ", ".join(f"{name} {count:,}" for name, count in parameters.items() if name != "total" and count)
    rooms = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in memory.items() if name != "total" and size)
    return [
        f"parameters: {parameters['total']:,} ({parts})",
        f"FLOPs a token: {quantity(flops)} forward and backward, causal attention counted, recomputation not",
        f"estimated memory: {memory['total'] / 2**20:,.0f} MiB ({rooms})",
    ]
