"""A run that begins with weights of another program: a run folder with a checkpoint before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from shardwright.checkpoint import save
from shardwright.checkpoint.ranks import open_ranks
from shardwright.config import Config, ConfigError, DeepSpeedConfig, ParallelConfig
from shardwright.interop.deepspeed import our_names
from shardwright.parallel.mesh import join_world, world_size
from shardwright.train.build import build_corpus, build_step, fit_to_corpus
from shardwright.train.course import Course
from shardwright.train.folder import CHECKPOINTS, FolderLock, open_run_folder
from shardwright.train.position import Position, checkpoint_tensors
from shardwright.train.writing import writing


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


def _alone(config: Config) -> Config:
    """The same model and optimizer in one process on a CPU: a checkpoint is the same under every layout and kernel."""
    changed = {"parallel": ParallelConfig(), "engine": "native", "deepspeed": DeepSpeedConfig()}
    train = config.train.model_copy(update={"compile": False, "device": "cpu", "fused_norms": "torch"})
    optimizer = config.optimizer.model_copy(update={"fused": "torch"})
    return config.model_copy(update={**changed, "train": train, "optimizer": optimizer})
