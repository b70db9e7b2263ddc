"""Building a run in the one fixed order, every wrapper at its place.

1. world and device  2. tokenizer, vocabulary  3. model with its weights  4. selective recomputation
5. compile of each block  6. full recomputation  7. masters and compute copies  8. optimizer
9. loss scale, spike window, step  10. data order and loader.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shardwright.config import Config, ConfigError
from shardwright.data.loader import Loader
from shardwright.data.manifest import Manifest
from shardwright.data.order import Plan
from shardwright.data.pack import Packing
from shardwright.data.remote import ShardCache, default_cache_folder, is_remote
from shardwright.data.stream import Source, Stream, ValidationStream
from shardwright.data.tokenizers import Tokenizer, load_prepared
from shardwright.log import get_logger
from shardwright.model.families import build_model
from shardwright.model.init import apply_init
from shardwright.model.transformer import LanguageModel
from shardwright.objective.causal import Causal
from shardwright.objective.table import OBJECTIVES
from shardwright.parallel.mesh import World
from shardwright.parallel.precision import FORMATS, LossScaler, Masters
from shardwright.parallel.recompute import apply_recompute
from shardwright.train.evaluate import Validation
from shardwright.train.guard import SpikeDetector
from shardwright.train.optim import build_optimizer
from shardwright.train.schedule import BatchRamp
from shardwright.train.step import LossModel, Step


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
    manifests = [Manifest.load(source.path) for source in sources]
    first = manifests[0].tokenizer["sha256"]
    for source, manifest in zip(sources, manifests, strict=True):
        if manifest.tokenizer["sha256"] != first:
            raise ConfigError(
                f"{source.path}: was prepared with tokenizer {manifest.tokenizer['sha256'][:12]}, "
                f"{sources[0].path} with {first[:12]}; prepare both with one tokenizer"
            )
    return Corpus(manifests, load_prepared(manifests[0]))


def fit_to_corpus(config: Config, corpus: Corpus) -> None:
    """Fill in the vocabulary and the corpus' hashes, make its paths absolute, and check that model and data agree."""
    found = [manifest.sha256 for manifest in corpus.manifests]
    if config.data.corpus not in ([], found):
        raise ConfigError(
            f"data.corpus: names {config.data.corpus[0][:12]}..., {corpus.manifests[0].root} is {found[0][:12]}...; "
            "restore that corpus or drop the key"
        )
    config.data.corpus = found
    if config.data.path is not None:
        config.data.path = _absolute(config.data.path)
    for source in config.data.sources:
        source.path = _absolute(source.path)
    _fit_vocabulary(config, corpus.tokenizer.vocab_size)
    check_length(config)


def _absolute(path: str) -> str:
    return path if is_remote(path) else str(Path(path).resolve())


def _fit_vocabulary(config: Config, vocab_size: int) -> None:
    model = config.model
    if model.vocab_size == 0:
        model.vocab_size = vocab_size
    if model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size}: the tokenizer has {vocab_size} tokens; use 0 or at least that many"
        )


def check_length(config: Config) -> None:
    """ConfigError where a sequence is longer than the model allows."""
    length = config.data.sequence_length
    longest = getattr(config.model, "max_length", length)
    if length > longest:
        raise ConfigError(
            f"data.sequence_length={length}: is longer than the model allows; lower it to model.max_length={longest} "
            "or raise that"
        )


def build_objective(config: Config) -> Causal:
    """The objective of a config."""
    return OBJECTIVES[config.objective.name][1](config.objective)  # type: ignore[arg-type]


def build_weights(config: Config, world: World) -> LanguageModel:
    """The model on its device with its first weights, each a function of (seed, its name) alone."""
    model = build_model(config.model)  # type: ignore[arg-type]
    apply_init(model, config.model, config.train.seed)  # type: ignore[arg-type]
    return model.to(world.device)


def apply_blocks(model: LanguageModel, config: Config) -> None:
    """Recomputation and compilation of every block, in their order."""
    blocks = [module for name, module in model.layers() if name.startswith("blocks.")]
    apply_recompute(blocks, config.train.recompute, compiled=False)
    if wants_compile(config):
        for block in blocks:
            block.forward = torch.compile(block.forward, fullgraph=True)
    apply_recompute(blocks, config.train.recompute, compiled=True)


def wants_compile(config: Config) -> bool:
    """Whether blocks are compiled: as said, or where a C++ compiler or a GPU's Triton is found."""
    wanted = config.train.compile
    if wanted != "auto":
        return bool(wanted)
    found = shutil.which("g++") or shutil.which("clang++")
    if not found:
        get_logger().info("no C++ compiler found: blocks run uncompiled (Debian: apt-get install g++)")
    return bool(found)


def build_step(config: Config, world: World) -> Step:
    """Model, masters, optimizer, scale and guard, put together."""
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first use
    torch.use_deterministic_algorithms(config.train.deterministic)
    model = build_weights(config, world)
    apply_blocks(model, config)
    objective = build_objective(config)
    if wants_compile(config):
        objective.compile()
    loss_model = LossModel(model, objective, config.train.seed)
    compute = FORMATS[config.precision.compute]
    masters = Masters(model, compute)
    optimizer = build_optimizer(config.optimizer, list(masters.weights.items()))
    scaler = LossScaler(config.precision.loss_scale, world.device, enabled=config.precision.compute == "fp16")
    spikes = SpikeDetector(config.guard, world.device)
    return Step(loss_model.train(), masters, optimizer, scaler, spikes, config.train.clip)


def build_plan(config: Config, ramp: BatchRamp, excluded: Sequence[tuple[int, int]] = ()) -> Plan:
    """Which sequence numbers each step takes."""
    return Plan(
        global_batch=lambda _step, drawn: ramp.batch_at(drawn),
        micro_batch=config.batch.micro,
        lanes=config.data.lanes,
        excluded=tuple(excluded),
    )


def build_packing(config: Config) -> Packing:
    """How document boundaries are treated."""
    data = config.data
    return Packing(data.mask_documents, data.reset_positions, data.cross_document_targets)


def build_loader(config: Config, world: World, ramp: BatchRamp) -> Loader:
    """Training batches of this rank, on its device."""
    data, objective = config.data, build_objective(config)
    stream = Stream(
        [Source(s.path, s.weight) for s in data.mixture()],
        raw_length=objective.raw_length(data.sequence_length),
        stride=objective.stride(data.sequence_length),
        seed=config.train.seed,
        lanes=data.lanes,
        shuffle_block=data.shuffle_block,
        **_access(config),
    )
    return Loader(
        stream,
        build_plan(config, ramp),
        build_packing(config),
        workers=data.workers,
        prefetch=data.prefetch,
        device=world.device,
    )


def build_validation(config: Config, world: World) -> Validation:
    """The validation split in its fixed order, on this device."""
    data, objective = config.data, build_objective(config)
    stream = ValidationStream(
        [Source(s.path, s.weight) for s in data.mixture()],
        raw_length=objective.raw_length(data.sequence_length),
        stride=objective.stride(data.sequence_length),
        **_access(config),
    )
    # Every token is predicted, whatever training leaves out: bits per byte are of the whole text.
    packing = replace(build_packing(config), cross_document_targets=True)
    return Validation(
        stream, packing, length=data.sequence_length, batch=config.evaluate.batch, device=world.device
    )


def _access(config: Config) -> dict[str, Any]:
    data, allow = config.data, tuple(config.data.allow)
    folder = Path(data.cache) if data.cache else default_cache_folder()
    return {"cache": ShardCache(folder, int(data.cache_gib * 2**30), allow=allow), "allow": allow}
