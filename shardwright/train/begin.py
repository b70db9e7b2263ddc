"""A run that begins with weights that are there: of another program, an imported model or another run.

Either way the moments are zero and the position is the first; run.py saves a checkpoint before the first step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwright.checkpoint import find_newest, load, read_manifest, save
from shardwright.checkpoint.ranks import open_ranks
from shardwright.config import Config, ConfigError, DeepSpeedConfig, ParallelConfig
from shardwright.data.tokenizers import Tokenizer
from shardwright.interop.deepspeed import our_names
from shardwright.interop.folder import copy_companions, is_huggingface
from shardwright.parallel.mesh import join_world, world_size
from shardwright.train.build import build_corpus, build_step, fit_to_corpus
from shardwright.train.course import Course
from shardwright.train.folder import CHECKPOINTS, CONFIG, FolderLock, open_run_folder
from shardwright.train.load import locate
from shardwright.train.position import Position, checkpoint_tensors
from shardwright.train.settings import read_config
from shardwright.train.step import Step
from shardwright.train.writing import writing

CLASSIFIER = "head.label."  # what names of a classifier's parameters begin with


def begin(config: Config, theirs: Mapping[str, Tensor]) -> Path:
    """Make the run folder of `config` with the weights of another program and zero moments; its checkpoint of step 0.

    ConfigError where they do not fit the config's model, where the folder holds a run already, or where a launcher
    started several processes.
    """
    if world_size() > 1:
        raise ConfigError(f"import: is one process, and a launcher started {world_size()}; start it without torchrun")
    corpus = build_corpus(config)
    fit_to_corpus(config, corpus)
    weights = our_names(config.model, theirs)  # type: ignore[arg-type]
    alone = _alone(config)
    with join_world("cpu", alone.train.threads, alone.parallel) as world, open_ranks(), FolderLock() as lock:
        lock.take(Path(config.run or ""))
        folder, before = open_run_folder(config)
        if before is not None:
            raise ConfigError(f"{folder}: holds a run already, at {before.name}; name another folder with run=PATH")
        with writing(folder):
            corpus.tokenizer.save(folder)
        step = build_step(alone, world)
        with torch.no_grad():
            for name, weight in step.masters.weights.items():
                weight.copy_(weights[name])
        step.masters.publish()
        state = {"position": Position(progress=Course(config).progress.state()).state()}
        return save(folder / CHECKPOINTS, checkpoint_tensors(step), state, step=0)


def take_special_tokens(config: Config) -> None:
    """Special tokens that `begin`'s model has got beyond its tokenizer's, and its vocabulary, where none are given."""
    if config.begin is None or not (Path(config.begin) / CONFIG).is_file():
        return
    known, wanted = read_config(Path(config.begin) / CONFIG), config.objective.specials(config.data.sequence_length)
    found = {use: number for use, number in known.objective.special_tokens.items() if use in wanted}
    config.objective.special_tokens = {**found, **config.objective.special_tokens}
    config.model.vocab_size = config.model.vocab_size or known.model.vocab_size


def check_begin(config: Config, tokenizer: Tokenizer) -> None:
    """Make `begin` absolute; ConfigError where it names nothing that holds a model, or one of another tokenizer.

    A run that has a checkpoint needs it no more.
    """
    if config.begin is None:
        if config.train.keep_zeros:
            raise ConfigError(
                "train.keep_zeros: there are none to keep in first weights; begin=FOLDER names pruned ones"
            )
        return
    given, config.begin = Path(config.begin), str(Path(config.begin).resolve())
    if find_newest(Path(config.run or "") / CHECKPOINTS)[0] is not None:
        return
    if is_huggingface(given) and not (given / CONFIG).is_file():
        raise ConfigError(f"begin={given}: is a Hugging Face folder; first: shardwright import {given} --output FOLDER")
    folder, _ = locate(given)
    there = read_config(folder / CONFIG)
    if there.adapt.method not in ("none", config.adapt.method):
        raise ConfigError(
            f"begin={given}: has an adapter of its own (adapt.method={there.adapt.method}); go on with that method, or "
            f"take it in first: shardwright export {given} --merge, then shardwright import"
        )
    if config.adapt.method == there.adapt.method == "lora" and config.adapt.scale != there.adapt.scale:
        raise ConfigError(
            f"begin={given}: its LoRA is multiplied by {there.adapt.scale:g} (adapt.alpha, rank, rslora), and this one "
            f"by {config.adapt.scale:g}, which makes another model of its weights; use its settings"
        )
    known = there.data.tokenizer
    if known not in (None, tokenizer.sha256):
        raise ConfigError(
            f"begin={given}: its model reads tokenizer {known[:12]}..., the corpus was prepared with "
            f"{tokenizer.sha256[:12]}...; prepare the text with tokenizer.path={folder / tokenizer.file}"
        )


def take_weights(step: Step, begin: str, added: Collection[str] = ()) -> None:
    """Set the masters of a step, under any layout, to the weights that `begin` names. Every rank has to call it.

    What is `added` to the model keeps its first values unless `begin` has it too, and so does a classifier that begins
    from a model without one where that model has nothing like it.
    """
    weights, (folder, checkpoint) = step.masters.weights, locate(begin)
    model = next(iter(step.stages.models.values())).model
    before: Any = read_config(folder / CONFIG).model
    new = before.classify == "none" and model.config.classify != "none"
    names = {name: f"model.{_known_as(name, model.pretrained) if new else name}" for name in weights}
    stored = read_manifest(checkpoint).tensors
    free = {name for name in weights if name in added or (new and name.startswith(CLASSIFIER))}
    known = {names[name]: weight for name, weight in weights.items() if name not in free or names[name] in stored}
    load(checkpoint, known, within="model.", cast=True, partial_load=new)
    step.masters.restore(weights)


def _known_as(name: str, pretrained: Mapping[str, str]) -> str:
    """What a model without a classifier calls a parameter of one with it."""
    for own, theirs in pretrained.items():
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    return name


def keep_companions(folder: Path, config: Config, tokenizer: Tokenizer) -> None:
    """What came with the model that the run begins from goes on into its folder, for an export of the run."""
    if config.begin is None:
        return
    source, _ = locate(config.begin)
    if (source / tokenizer.file).is_file():
        copy_companions(source, folder)


def _alone(config: Config) -> Config:
    """The same model and optimizer in one process on a CPU: a checkpoint is the same under every layout and kernel."""
    changed = {"parallel": ParallelConfig(), "engine": "native", "deepspeed": DeepSpeedConfig()}
    train = config.train.model_copy(update={"compile": False, "device": "cpu", "fused_norms": "torch"})
    optimizer = config.optimizer.model_copy(update={"fused": "torch"})
    return config.model_copy(update={**changed, "train": train, "optimizer": optimizer})
