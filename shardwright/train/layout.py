"""The modules that one rank computes, wrapped for its layout in the one fixed order.

1. the stage's layers and adapter, on the meta device  2. tensor plan  3. context core  4. fake quantisation, then
selective recomputation  5. compile of each block  6. full recomputation  7. activation offload  8. FSDP over blocks,
then stage  9. memory  10. first weights, each a function of (seed, its name) alone. In one process, 1, 4 to 7 and 10
are what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwright.adapt import adapted_shapes, adapter_names, apply_adapter, apply_freeze, first_value, trained_names
from shardwright.adapt.quantize import apply_fake_quantization
from shardwright.config import Config
from shardwright.estimate.share import Adapter
from shardwright.model.count import block_flops, head_flops
from shardwright.model.electra import ElectraConfig
from shardwright.model.encoder_decoder import EncoderDecoderConfig
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.transformer import LanguageModel
from shardwright.model.xlnet import XLNetConfig, stream_length
from shardwright.objective.objective import Objective
from shardwright.objective.setting import Setting
from shardwright.objective.table import OBJECTIVES
from shardwright.parallel.context import ContextRows, PairRows, apply_context
from shardwright.parallel.logical import Logical
from shardwright.parallel.mesh import World
from shardwright.parallel.pipeline import Pipeline, build_tied_group
from shardwright.parallel.precision import FORMATS, cast_frozen, master_format
from shardwright.parallel.recompute import ROUNDING, apply_activation_offload, apply_recompute
from shardwright.parallel.refusals import Facts
from shardwright.parallel.ring import Ring, apply_ring, check_device
from shardwright.parallel.stages import SCHEDULES, keep_layers, layer_costs, split_layers, stage_indices
from shardwright.parallel.tensor import all_tokens, apply_tensor, localize_heads, own_tokens
from shardwright.parallel.zero import ShardedMasters, TiedWeight, apply_zero
from shardwright.train.compiler import can_compile
from shardwright.train.draft import build_loss_model
from shardwright.train.optim.apex import apply_fused_norms, wants_apex
from shardwright.train.stages import Cut, Loop, LossModel, Stages, whole

LAYOUT_KEYS = {"shard", "context", "ring", "tensor", "pipeline", "zero", "schedule", "sequence", "offload"}
SHARED = "embed.tokens"  # whose weight is the head's as well, where the model is tied


def build_stages(config: Config, world: World, objective: Objective) -> Stages:
    """This rank's stages, ready to be run."""
    if world.mesh is None:
        model = build_whole(config)
        apply_blocks(model.to(world.device), config, world)
        only = build_loss_model(model, objective, config.train.seed).train()
        return Stages({0: only}, Loop(only), world)
    ranges, own = _stage_layers(config, world)
    ring = _build_ring(config, world)
    models = {}
    for index in own:
        model = _build_part(config, ranges[index])
        last = index == len(ranges) - 1
        stage = build_loss_model(model, objective, config.train.seed, first=index == 0, last=last)
        models[index] = _spread(stage, config, world, ring)
    return Stages(models, _build_passes(config, world, models, ring), world, _build_cut(config, world))


def build_whole(config: Config) -> LanguageModel:
    """The whole model in this process with its adapter and its first weights; what is not trained is frozen."""
    model = build_model(config.model)  # type: ignore[arg-type]
    apply_adapter(model, config.adapt, trained_of(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(first_value(config.model, name, parameter.shape, config.train.seed))  # type: ignore[arg-type]
    return model


def trained_of(config: Config) -> set[str] | None:
    """Names of the parameters that are trained; None where all are."""
    return trained_names(config.model, config.adapt) if config.adapt.freezes else None  # type: ignore[arg-type]


def described_adapter(config: Config) -> Adapter | None:
    """The adapter as estimates know it; None where all of a plain model is trained."""
    if not config.adapt.freezes:
        return None
    shapes = adapted_shapes(config.model, config.adapt)  # type: ignore[arg-type]
    trained = trained_names(config.model, config.adapt)  # type: ignore[arg-type]
    added = adapter_names(config.model, config.adapt)  # type: ignore[arg-type]
    return Adapter({name: shapes[name] for name in added}, frozenset(shapes.keys() - trained))


def build_facts(config: Config, size: int) -> Facts:
    """What decides whether a config can run in a world of `size` processes."""
    parallel, model = config.parallel, config.model
    fixed = parallel.tensor * parallel.context * parallel.pipeline
    full, ramp = config.global_batch(), config.batch.ramp
    with torch.device("meta"):
        shape = model.model_copy(update={"vocab_size": model.vocab_size or 2})
        layers = len(build_model(shape).layers())  # type: ignore[arg-type]
    return Facts(
        world=size,
        data=parallel.data or max(size // fixed, 1),
        **parallel.model_dump(include=LAYOUT_KEYS),
        stages=num_virtual(config),
        layers=layers,
        heads=model.heads,  # type: ignore[attr-defined]
        kv_heads=model.num_kv_heads,  # type: ignore[attr-defined]
        mlp_width=model.hidden_width,  # type: ignore[attr-defined]
        vocab_size=model.vocab_size,
        attention_dropout=model.attention_dropout,  # type: ignore[attr-defined]
        **_second_stack(config),
        causal=model.causal,  # type: ignore[attr-defined]
        shared_blocks=model.repeats > 1,  # type: ignore[attr-defined]
        projects_tables=model.projects_tables,  # type: ignore[attr-defined]
        adapter=config.adapt.method,
        frozen=config.adapt.freezes,
        length=config.data.sequence_length,
        target=row_lengths(config)[1],
        batches=(full,) if ramp is None else (*range(ramp.start, full, ramp.increment), full),
        micro=config.batch.micro,
        precision=config.precision.compute,
        compile=wants_compile(config),
        recompute=config.train.recompute,
        masked=config.data.mask_documents,
        distilled=config.distill is not None,
        quantized=config.quantize is not None,
        keeps_zeros=config.train.keep_zeros,
        offload_activations=config.train.offload_activations,
        device=config.train.device,
        optimizer=config.optimizer.name,
        engine=config.engine,
        optimizer_place=optimizer_place(config),
        parameter_place=config.deepspeed.offload_parameters,
    )


def _second_stack(config: Config) -> dict[str, Any]:
    """What tensor ranks have to share beside the stack: ELECTRA's generator, XLNet's query stream."""
    model: Any = config.model
    if isinstance(model, ElectraConfig) and model.generator.layers:
        own = model.generator
        return {"generator_heads": own.heads, "generator_mlp_width": own.hidden_width}
    return {"query_stream": stream_length(num_predictions(config) or 0)} if isinstance(model, XLNetConfig) else {}


def optimizer_place(config: Config) -> str:
    """Where DeepSpeed keeps masters and optimizer: none, cpu or nvme."""
    return config.deepspeed.offload_optimizer or ("cpu" if config.parallel.offload else "none")


def product_format(config: Config) -> torch.dtype | None:
    """Number format of Muon's products; None takes the device's fast one."""
    return None if config.optimizer.matmul == "auto" else master_format(FORMATS[config.precision.compute])


def num_virtual(config: Config) -> int:
    """Pipeline stages of a rank."""
    if config.parallel.pipeline == 1:
        return 1
    default = 1 if SCHEDULES[config.parallel.schedule].placement == "single" else 2
    return config.parallel.stages or default


def _stage_layers(config: Config, world: World) -> tuple[list[range], list[int]]:
    """(layers of every stage, stages of this rank)."""
    parallel, count = config.parallel, num_virtual(config)
    _, ranges = cut_layers(config, world.degree("data") * world.degree("context"))
    if parallel.pipeline == 1:
        return ranges, [0]
    return ranges, stage_indices(parallel.schedule, world.index("pipeline"), parallel.pipeline, count)


def cut_layers(config: Config, replicas: int) -> tuple[list[str], list[range]]:
    """Names of the layers, and which of them each pipeline stage has; `replicas`: data x context ranks."""
    with torch.device("meta"):
        layers = build_model(config.model).layers()  # type: ignore[arg-type]
    ranges = split_layers(_costs(config, replicas, layers), config.parallel.pipeline * num_virtual(config))
    return [name for name, _ in layers], ranges


def _costs(config: Config, replicas: int, layers: list[tuple[str, nn.Module]]) -> list[float]:
    """What each layer costs a rank in a step."""
    model: Any = config.model
    (length, target), rows, share = row_lengths(config), config.batch.micro, predicted_share(config)
    step = 3 * config.global_batch() / replicas  # passes through a sequence, backward ones counted twice
    kinds = zip(model.runs, block_flops(model, length, target, True, rows, share), strict=True)
    flops = {f"blocks.{n}": model.repeats * each * step for run, each in kinds for n in run}
    flops["embed"] = FAMILIES[model.family].extra(model, length, rows, share).embed * step
    head = head_flops(model, target, share) * target * step
    each = [flops.get(name, 0.0) for name, _ in layers]
    return layer_costs(each, [sum(p.numel() for p in m.parameters()) for _, m in layers], head_flops=head)


def num_predictions(config: Config) -> int | None:
    """Tokens of a sequence that are predicted, where the objective fixes their number; None where all are."""
    return _number_of(config, "num_predictions")


def _number_of(config: Config, what: str) -> int | None:
    """A number that the objective gives for its rows; None where it has none."""
    length, (_, build) = config.data.sequence_length, OBJECTIVES[config.objective.name]
    count = getattr(build(config.objective, Setting(length)), what, None)
    return None if count is None else int(count(length))


def predicted_share(config: Config) -> float:
    """Share of the tokens that are predicted."""
    count = num_predictions(config)
    return 1.0 if count is None else count / config.data.sequence_length


def row_lengths(config: Config) -> tuple[int, int]:
    """Tokens of a row, and of the row that is predicted: the decoder's where there is an encoder, else the same."""
    length, target = config.data.sequence_length, _number_of(config, "target_length")
    return length, length if target is None else target


def _build_part(config: Config, layers: range) -> LanguageModel:
    """The model with these of its layers alone, on the meta device."""
    with torch.device("meta"):
        model = build_model(config.model)  # type: ignore[arg-type]
    names = [name for name, _ in model.layers()]
    shared = SHARED if config.model.ties_stages else None  # type: ignore[attr-defined]
    keep_layers(model, names[layers.start : layers.stop], shared=shared)
    with torch.device("meta"):
        apply_adapter(model, config.adapt)
    return model.to(master_format(FORMATS[config.precision.compute]))


def _spread(stage: LossModel, config: Config, world: World, ring: Ring | None) -> LossModel:
    """Steps 2 to 10 for one stage."""
    assert world.mesh is not None
    model, parallel = stage.model, config.parallel
    if parallel.tensor > 1:
        apply_tensor(model, world.mesh["tensor"], sequence=parallel.sequence)
        stage.localize = partial(localize_heads, mesh=world.mesh["tensor"], sequence=parallel.sequence)
        if parallel.sequence:
            stage.own_tokens = partial(own_tokens, mesh=world.mesh["tensor"])
            stage.all_tokens = partial(all_tokens, mesh=world.mesh["tensor"])
    if ring is None:
        apply_context(model, world.mesh["context"])
    else:
        apply_ring(model, ring)
    apply_blocks(model, config, world)
    trained = trained_of(config)
    if trained is not None:
        apply_freeze(model, trained)
        cast_frozen(model, FORMATS[config.precision.compute])
    apply_zero(
        stage,
        blocks_of(model),
        world.sharding_mesh(),
        stage=parallel.zero,
        compute=FORMATS[config.precision.compute],
        offload=parallel.offload,
    )
    stage.to_empty(device="cpu" if parallel.offload else world.device)
    fill_weights(model, config)
    return stage.train()


def _build_passes(config: Config, world: World, models: dict[int, LossModel], ring: Ring | None) -> Loop | Pipeline:
    parallel, mesh = config.parallel, world.mesh
    assert mesh is not None
    if parallel.pipeline == 1:
        return Loop(models[0], parallel.zero) if ring is None else Loop(models[0], parallel.zero, ring.open)
    assert ring is None, "refused in a pipeline"
    slices, any_stage = parallel.tensor if parallel.sequence else 1, next(iter(models.values()))

    def between(shapes: Mapping[str, torch.Size]) -> tuple[int, int, int]:
        rows, tokens, width = any_stage.border(shapes)
        return rows, tokens // slices, width

    return Pipeline(
        models,
        schedule=parallel.schedule,
        group=mesh["pipeline"].get_group(),
        device=world.device,
        dtype=FORMATS[config.precision.compute],
        activation=between,
        terms=len(any_stage.objective.terms),
    )


def _build_cut(config: Config, world: World) -> Cut:
    if world.degree("context") == 1:
        return whole
    if isinstance(config.model, EncoderDecoderConfig):
        return PairRows(world.degree("context"), world.index("context")).slice
    return _build_rows(config, world).slice


def _build_rows(config: Config, world: World) -> ContextRows:
    length, keys = config.data.sequence_length, not config.parallel.ring
    return ContextRows(world.degree("context"), world.index("context"), length, keys=keys)


def _build_ring(config: Config, world: World) -> Ring | None:
    if not config.parallel.ring or world.degree("context") == 1:
        return None
    assert world.mesh is not None
    check_device(world.device)
    return Ring(world.mesh["context"], _build_rows(config, world), world.device)


def build_masters(config: Config, stages: Stages) -> ShardedMasters:
    """The masters of stages that FSDP wraps, with the copies of weights that several stages use."""
    copies: dict[str, list[nn.Parameter]] = {}
    for model in stages.models.values():
        for name, parameter in model.model.named_parameters():
            copies.setdefault(name, []).append(parameter)
    parameters = {name: first for name, (first, *_) in copies.items()}
    tied = _build_tied(config, stages, copies) if config.parallel.pipeline > 1 else []
    return ShardedMasters(list(stages.models.values()), parameters, tied)


def _build_tied(config: Config, stages: Stages, copies: Mapping[str, list[nn.Parameter]]) -> list[TiedWeight]:
    """The token embedding where it is the head as well, and tables that all blocks share; the same on all ranks."""
    mesh, found, counts = stages.world.mesh, [], 0 in stages.models
    assert mesh is not None
    if config.model.ties_stages:  # type: ignore[attr-defined]
        group, name = build_tied_group(mesh, config.parallel.schedule), f"{SHARED}.weight"
        found.append(TiedWeight(name, copies.get(name, []), group, counts=counts))
    tables = next(iter(stages.models.values())).model.shared_tables
    names = [name for name in copies if name.split(".")[0] in tables]
    return found + [TiedWeight(name, copies[name], mesh["pipeline"].get_group(), counts=counts) for name in names]


def blocks_of(model: LanguageModel) -> list[nn.Module]:
    """The blocks of a model or stage, in order; those of an embedding that has some (ELECTRA's generator) first."""
    inner = getattr(getattr(model.embed, "generator", None), "blocks", {}).values()
    return [*inner, *(module for name, module in model.layers() if name.startswith("blocks."))]


def apply_blocks(model: LanguageModel, config: Config, world: World) -> None:
    """Fake quantisation, recomputation, compilation and offload of every block, in their order."""
    blocks = blocks_of(model)
    if config.quantize is not None:
        apply_fake_quantization(blocks, config.quantize.format, config.quantize.group)
    norms, compiled = config.train.fused_norms, wants_compile(config)
    if (norms == "apex" or not compiled) and wants_apex("train.fused_norms", norms, world.device):
        apply_fused_norms(model.modules())
    apply_recompute(blocks, config.train.recompute, compiled=False)
    if compiled:
        for block in blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, options=ROUNDING)
    apply_recompute(blocks, config.train.recompute, compiled=True)
    if config.train.offload_activations:
        apply_activation_offload(blocks, world.device)


def wants_compile(config: Config) -> bool:
    """Whether blocks are compiled: as said, or where what compiles them is found."""
    wanted = config.train.compile
    if wanted != "auto":
        return bool(wanted)
    if config.parallel.pipeline > 1 and SCHEDULES[config.parallel.schedule].splits_backward:
        return False
    if config.parallel.ring and config.parallel.context > 1:
        return False
    if config.engine == "deepspeed" and config.parallel.zero == 3:
        return False
    return can_compile()


@torch.no_grad()
def fill_weights(model: LanguageModel, config: Config) -> None:
    """Set this rank's part of every parameter; one whole tensor exists at a time."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        whole = first_value(config.model, name, parameter.shape, config.train.seed)  # type: ignore[arg-type]
        logical = Logical.of(parameter.detach())
        logical.local.copy_(logical.part(whole))
