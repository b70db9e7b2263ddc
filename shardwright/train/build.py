"""Building a run in the one fixed order: corpus and vocabulary, the stages of layout.py, masters, optimizer, loss
scale and guard, data order and loader.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardwright.adapt.prune import ZeroKeeper
from shardwright.config import Config, ConfigError
from shardwright.data.examples import ExampleStream, ValidationExamples
from shardwright.data.loader import Loader
from shardwright.data.manifest import Manifest
from shardwright.data.order import Plan
from shardwright.data.remote import ShardCache, default_cache_folder, is_remote
from shardwright.data.stream import Source, Stream, ValidationStream, Wanted
from shardwright.data.tokenizers import Tokenizer, load_prepared
from shardwright.interop.peft import KINDS, read_adapter
from shardwright.log import get_logger, rank
from shardwright.model.families import FAMILIES
from shardwright.objective.distill import Distilled
from shardwright.objective.objective import Objective
from shardwright.objective.setting import Setting
from shardwright.objective.table import OBJECTIVES
from shardwright.parallel.mesh import World
from shardwright.parallel.precision import FORMATS, LossScaler, Masters, master_format
from shardwright.train.engines import build_engine
from shardwright.train.evaluate import Validation
from shardwright.train.guard import SpikeDetector
from shardwright.train.layout import (
    build_masters,
    build_stages,
    product_format,
    row_lengths,
    trained_of,
    wants_compile,
)
from shardwright.train.optim import build_optimizer
from shardwright.train.pruned import prunable
from shardwright.train.schedule import BatchRamp
from shardwright.train.specials import fit_special_tokens
from shardwright.train.stages import Stages
from shardwright.train.step import Masters as StepMasters
from shardwright.train.step import Step
from shardwright.train.teacher import fit_teacher, open_teacher


@dataclass
class Corpus:
    """The prepared folders of a run, checked against each other, and their tokenizer."""

    manifests: list[Manifest]
    tokenizer: Tokenizer


def build_corpus(config: Config) -> Corpus:
    """Open the manifests of every source; ConfigError where one is missing or has another tokenizer."""
    sources = config.data.mixture()
    if not sources:
        raise ConfigError("data.path: is missing; name a folder made by `shardwright prepare`")
    manifests = [Manifest.load(source.path, config.data.allow) for source in sources]
    first = manifests[0].tokenizer["sha256"]
    for source, manifest in zip(sources, manifests, strict=True):
        if manifest.tokenizer["sha256"] != first:
            raise ConfigError(
                f"{source.path}: was prepared with tokenizer {manifest.tokenizer['sha256'][:12]}, "
                f"{sources[0].path} with {first[:12]}; prepare both with one tokenizer"
            )
    return Corpus(manifests, load_prepared(manifests[0], config.data.allow))


def fit_to_corpus(config: Config, corpus: Corpus) -> None:
    """Fill in vocabulary, tokenizer and corpora, make paths absolute, and check that model and data agree."""
    check_objective(config)
    check_corpus(config, corpus.manifests)
    config.data.corpus = [manifest.sha256 for manifest in corpus.manifests]
    if config.data.path is not None:
        config.data.path = _absolute(config.data.path)
    for source in config.data.sources:
        source.path = _absolute(source.path)
    _fit_tokenizer(config, corpus.tokenizer)
    _fit_vocabulary(config, fit_special_tokens(config, corpus.tokenizer))
    check_length(config)
    fit_teacher(config, corpus.tokenizer)
    check_adapter(config)
    check_validation(config, corpus)


def check_corpus(config: Config, manifests: Sequence[Manifest]) -> None:
    """ConfigError where `data.corpus` names other corpora than these."""
    named, found = config.data.corpus, [manifest.sha256 for manifest in manifests]
    if named and len(named) != len(found):
        raise ConfigError(f"data.corpus: names {len(named)} corpora for {len(found)} sources; drop the key")
    for name, manifest, sha256 in zip(named, manifests, found, strict=False):
        if name != sha256:
            raise ConfigError(
                f"data.corpus: names {name[:12]}..., {manifest.root} is {sha256[:12]}...; "
                "restore that corpus or drop the key"
            )


def has_validation(corpus: Corpus) -> bool:
    """Whether there is anything to evaluate on: `prepare` may have kept no document back."""
    splits = [manifest.splits.get("validation") for manifest in corpus.manifests]
    return any(split is not None and split.tokens for split in splits)


def check_validation(config: Config, corpus: Corpus) -> None:
    """Warn, once, of a run without validation; ConfigError where evaluations are asked for all the same."""
    if has_validation(corpus):
        return
    where = f"the validation split of {corpus.manifests[0].root} is empty"
    remedy = "prepare it with a smaller validation_every"
    if config.evaluate.every is not None:
        raise ConfigError(f"evaluate.every={config.evaluate.every}: {where}; {remedy}, or set evaluate.every=null")
    if rank() == 0:
        get_logger().warning("%s: the run ends without validation figures; to have them, %s", where, remedy)


def _absolute(path: str) -> str:
    return path if is_remote(path) else str(Path(path).resolve())


def _fit_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    data = config.data
    for key, given, found in (
        ("tokenizer", data.tokenizer, tokenizer.sha256),
        ("end_of_document", data.end_of_document, tokenizer.end_of_document),
        ("vocab_size", data.vocab_size, tokenizer.vocab_size),
    ):
        if given not in (None, found):
            raise ConfigError(f"data.{key}={given}: the corpus was prepared with {found}; drop the key")
    data.tokenizer, data.end_of_document = tokenizer.sha256, tokenizer.end_of_document
    data.vocab_size = tokenizer.vocab_size


def _fit_vocabulary(config: Config, vocab_size: int) -> None:
    model = config.model
    if model.vocab_size == 0:
        model.vocab_size = vocab_size
    if model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size}: the tokenizer has {vocab_size} tokens, what the objective adds "
            "included; use 0 or at least that many"
        )


def check_length(config: Config) -> None:
    """ConfigError where a sequence is longer than the model allows."""
    length = config.data.sequence_length
    longest, virtual = getattr(config.model, "max_length", length), config.adapt.virtual
    if longest - virtual < length <= longest:
        raise ConfigError(
            f"data.sequence_length={length}: with the {virtual} virtual tokens of adapt.tokens exceeds what the model "
            f"allows (model.max_length={longest}); lower it to {longest - virtual}"
        )
    if length > longest:
        raise ConfigError(
            f"data.sequence_length={length}: is longer than the model allows; lower it to model.max_length={longest} "
            "or raise that"
        )
    target, virtual = row_lengths(config)[1], config.adapt.tokens if config.adapt.method == "prefix" else 0
    if getattr(config.model, "positions", "") == "learned" and target + virtual > longest:
        raise ConfigError(
            f"objective.target_length={target}: {f'with the {virtual} of the prefix ' if virtual else ''}is more than "
            f"the model has positions for; lower it to {longest - virtual} or raise model.max_length={longest}"
        )


def check_adapter(config: Config) -> None:
    """ConfigError where the adapter does not go with the model, or nothing of it is trained."""
    trained_of(config)
    if config.adapt.begin is not None:
        config.adapt.begin = _absolute(config.adapt.begin)
        if config.begin is None:
            raise ConfigError("adapt.begin: an adapter goes with the model that it was trained on; name it with begin=")
        read_adapter(Path(config.adapt.begin), list(KINDS.values()))
    if config.adapt.method != "none" and config.begin is None and rank() == 0:
        get_logger().warning(
            "adapt.method=%s: the model beneath it is a random one; name trained weights with begin=FOLDER",
            config.adapt.method,
        )


def check_objective(config: Config) -> None:
    """ConfigError where the objective cannot train such a model."""
    family, name = config.model.family, config.objective.name
    kind = getattr(FAMILIES[family], "kind", "decoder")
    if kind not in OBJECTIVES[name][1].trains:
        fitting = [name for name, (_, other) in OBJECTIVES.items() if kind in other.trains]
        raise ConfigError(
            f"objective.name={name}: trains models of kind {' or '.join(OBJECTIVES[name][1].trains)}, "
            f"model.family={family} is a {kind}; choose another family, or objective.name={' or '.join(fitting)}"
        )


def build_objective(config: Config, *, evaluation: bool = False) -> Objective:
    """The objective of a config, for training or for the validation split; a teacher is still to be handed in."""
    data = config.data
    specials = dict(config.objective.special_tokens)
    if data.end_of_document is not None:
        specials["end"] = data.end_of_document
    setting = Setting(
        length=data.sequence_length,
        seed=config.train.seed,
        vocab_size=data.vocab_size or config.model.vocab_size,
        specials=specials,
        mask_documents=data.mask_documents,
        reset_positions=data.reset_positions,
        cross_document_targets=data.cross_document_targets,
        evaluation=evaluation,
    )
    objective = OBJECTIVES[config.objective.name][1](config.objective, setting)
    if objective.stride(setting.length) < 1:
        raise ConfigError(
            f"data.sequence_length={setting.length}: the special tokens of objective {config.objective.name} leave no "
            "room for text; raise it"
        )
    return objective if config.distill is None else Distilled(objective, config.distill)


def build_step(config: Config, world: World) -> Step:
    """Stages, passes, masters, optimizer, scale and guard, put together."""
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first use
    torch.use_deterministic_algorithms(config.train.deterministic)
    objective = build_objective(config)
    if isinstance(objective, Distilled):
        objective.teacher = open_teacher(objective.config, config, world, objective)
    if wants_compile(config):
        objective.compile()
    if config.engine == "native":
        stages = build_stages(config, world, objective)
        masters, optimizer = _build_optimizer(config, stages)
    else:
        stages, masters, optimizer = build_engine(config, world, objective)
    compute = FORMATS[config.precision.compute]
    scaler = LossScaler(
        config.precision.loss_scale, world.device, enabled=compute == torch.float16, dtype=master_format(compute)
    )
    spikes = SpikeDetector(config.guard, world.device)
    return Step(stages, masters, optimizer, scaler, spikes, config.train.clip, _build_zeros(config, masters))


def _build_zeros(config: Config, masters: StepMasters) -> ZeroKeeper | None:
    """What keeps zeros of linear layers, of which a rank may hold some alone; refused where an engine owns them."""
    if not config.train.keep_zeros:
        return None
    parts: Mapping[str, torch.Tensor] = getattr(masters, "parts", masters.weights)
    return ZeroKeeper(parts[name] for name in prunable(config.model) if name in parts)  # type: ignore[arg-type]


def _build_optimizer(config: Config, stages: Stages) -> tuple[StepMasters, torch.optim.Optimizer]:
    compute = FORMATS[config.precision.compute]
    products = product_format(config)
    if stages.world.mesh is None:
        masters = Masters(stages.models[0].model, compute)
        return masters, build_optimizer(config.optimizer, list(masters.parts.items()), matmul_dtype=products)
    sharded = build_masters(config, stages)
    named = list(sharded.parts.items())
    return sharded, build_optimizer(config.optimizer, named, logical=sharded.logical, matmul_dtype=products)


def build_plan(config: Config, world: World, ramp: BatchRamp, excluded: Sequence[tuple[int, int]] = ()) -> Plan:
    """Which sequence numbers each step takes, and which of them this data rank."""
    return Plan(
        global_batch=lambda _step, drawn: ramp.batch_at(drawn),
        micro_batch=config.batch.micro,
        lanes=config.data.lanes,
        data_rank=world.index("data"),
        data_size=world.degree("data"),
        excluded=tuple(excluded),
    )


def build_loader(config: Config, world: World, ramp: BatchRamp) -> Loader:
    """Training batches of this rank, on its device."""
    data, objective = config.data, build_objective(config)
    order = {"seed": config.train.seed, "lanes": data.lanes, "shuffle_block": data.shuffle_block}
    reader: Any = ExampleStream if objective.supervised else Stream
    return Loader(
        reader(**_reading(config, objective), **order),
        build_plan(config, world, ramp),
        objective,
        workers=data.workers,
        prefetch=data.prefetch,
        device=world.device,
    )


def build_validation(config: Config, world: World) -> Validation:
    """The validation split in its fixed order, on this device."""
    data, objective = config.data, build_objective(config, evaluation=True)
    reader: Any = ValidationExamples if objective.supervised else ValidationStream
    stream = reader(**_reading(config, objective))
    return Validation(stream, objective, length=data.sequence_length, batch=config.evaluate.batch, world=world)


def _reading(config: Config, objective: Objective) -> dict[str, Any]:
    """What every reader of sequences or examples is told."""
    data, allow = config.data, tuple(config.data.allow)
    folder = Path(data.cache) if data.cache else default_cache_folder()
    told = {
        "sources": [Source(s.path, s.weight) for s in data.mixture()],
        "raw_length": objective.raw_length(data.sequence_length),
        "cache": ShardCache(folder, int(data.cache_gib * 2**30), allow=allow),
        "allow": allow,
    }
    if objective.supervised:
        return told
    stride = objective.stride(data.sequence_length)
    return {**told, "stride": stride, "wanted": Wanted(objective.marks, objective.neighbours)}
