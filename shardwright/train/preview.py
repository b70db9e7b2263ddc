"""`train --dry-run`: what a run would be, without building it."""

from __future__ import annotations

import json
import math

from shardwright.adapt import num_adapter
from shardwright.config import Config, to_yaml
from shardwright.estimate.memory import step_memory
from shardwright.estimate.share import Layout, Place, Work
from shardwright.log import quantity
from shardwright.model.count import num_flops, num_parameters
from shardwright.parallel.mesh import choose_device, fixed_degrees, world_size
from shardwright.parallel.proposals import check_layout, describe
from shardwright.parallel.refusals import Facts, layout_warnings
from shardwright.parallel.stages import stage_indices
from shardwright.train.build import build_corpus, check_length, fit_to_corpus
from shardwright.train.course import Course
from shardwright.train.layout import (
    build_facts,
    cut_layers,
    described_adapter,
    num_virtual,
    predicted_share,
    row_lengths,
    wants_compile,
)


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
    """The resolved config, batch, layout, size, FLOPs and memory of a run, as text or JSON."""
    device = choose_device(config.train.device)
    check_length(config)
    course = Course(config)
    if config.model.vocab_size == 0 or config.data.mixture():
        fit_to_corpus(config, build_corpus(config))
    facts = build_facts(config, planned_world(config))
    check_layout(facts)
    model, (length, target) = config.model, row_lengths(config)
    parameters = num_parameters(model)  # type: ignore[arg-type]
    flops = num_flops(model, length, target=target, rows=config.batch.micro, predicted=predicted_share(config))  # type: ignore[arg-type]
    memory = rank_memory(config, facts)
    if as_json:
        figures = {"parameters": parameters, "flops_per_token": flops.model, "memory_bytes": memory}
        layout = {"world": facts.world, "stages": stage_layers(config, facts), "warnings": layout_warnings(facts)}
        batch = batch_equation(config, facts.data)
        return json.dumps({"config": config.model_dump(mode="json"), "batch": batch, "layout": layout, **figures})
    sizes = _sizes(parameters, flops.model, memory, facts)
    if config.adapt.freezes:
        count = num_adapter(model, config.adapt)  # type: ignore[arg-type]
        sizes[1:1] = [f"trained: {count['trained']:,}, of which the adapter adds {count['added']:,}"]
    lines = [to_yaml(config), batch_equation(config, facts.data), *_layout(config, facts), _length(config, course)]
    return "\n".join([*lines, *sizes, f"device: {device}"])


def rank_memory(config: Config, facts: Facts) -> dict[str, int]:
    """Estimated bytes by category of the rank that needs most."""
    model, parallel = config.model, config.parallel
    micro_batches = math.ceil(config.global_batch() / (facts.data * config.batch.micro))
    work = Work.of(config, micro_batches, compiled=wants_compile(config), target=row_lengths(config)[1])
    layout = Layout.of(parallel, facts.world, facts.stages) if facts.world > 1 else None
    stages, adapter = stage_layers(config, facts), described_adapter(config)
    ranks = [
        step_memory(
            model,  # type: ignore[arg-type]
            work,
            optimizer=config.optimizer.name,
            layout=layout,
            place=Place(pipeline=index),
            stages=stages if facts.pipeline > 1 else None,
            offload=parallel.offload,
            adapter=adapter,
        )
        for index in range(facts.pipeline)
    ]
    return max(ranks, key=lambda memory: memory["total"])


def planned_world(config: Config) -> int:
    """Processes that the launcher started; without one as many as the config's degrees ask for."""
    started = world_size()
    return started if started > 1 else (config.parallel.data or 1) * fixed_degrees(config.parallel)


def stage_layers(config: Config, facts: Facts) -> list[list[str]]:
    """The layers of each pipeline stage; one stage has them all."""
    names, ranges = cut_layers(config, facts.data * facts.context)
    return [names[part.start : part.stop] for part in ranges]


def _layout(config: Config, facts: Facts) -> list[str]:
    if facts.world == 1:
        return []
    lines = [f"layout: {describe(facts)} on {facts.world} processes; zero={facts.zero}"]
    if facts.pipeline > 1:
        ranks = range(facts.pipeline)
        places = {i: r for r in ranks for i in stage_indices(facts.schedule, r, facts.pipeline, num_virtual(config))}
        for index, names in enumerate(stage_layers(config, facts)):
            span = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            lines.append(f"  stage {index}, on pipeline rank {places[index]}: {span}")
    return [*lines, *(f"warning: {warning}" for warning in layout_warnings(facts))]


def _length(config: Config, course: Course) -> str:
    if course.steps is None:
        batch = config.global_batch() * course.length
        return f"length: {config.train.budget} of wall-clock time, {batch:,} tokens a step"
    return f"length: {course.steps:,} steps, {course.ramp.drawn_after(course.steps) * course.length:,} tokens"


def _sizes(parameters: dict[str, int], flops: float, memory: dict[str, int], facts: Facts) -> list[str]:
    parts = ", ".join(f"{name} {count:,}" for name, count in parameters.items() if name != "total" and count)
    rooms = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in memory.items() if name != "total" and size)
    whose = " of the fullest rank" if facts.world > 1 else ""
    counted = "causal attention" if facts.causal else "attention"
    return [
        f"parameters: {parameters['total']:,} ({parts})",
        f"FLOPs a token: {quantity(flops)} forward and backward, {counted} counted, recomputation not",
        f"estimated memory{whose}: {memory['total'] / 2**20:,.0f} MiB ({rooms})",
    ]
