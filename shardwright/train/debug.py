"""A run to look into: one process whatever the layout, deterministic, a few steps, pdb where it fails.

The global batch is kept: one process takes all of its micro-batches, one after the other. Above run.py, which trains.
"""

from __future__ import annotations

import itertools
import math
import pdb
import sys
from pathlib import Path
from typing import Any

import torch

from shardwright.config import Config, ConfigError, DeepSpeedConfig, ParallelConfig, RunError
from shardwright.log import get_logger
from shardwright.parallel.mesh import world_size
from shardwright.parallel.proposals import describe
from shardwright.parallel.refusals import Facts
from shardwright.train.layout import build_facts
from shardwright.train.preview import planned_world
from shardwright.train.result import Result
from shardwright.train.run import train

STEPS = 20
SMALL = {"layers": 2, "length": 64, "sequences": 4}

log = get_logger()


def debug(config: Config, *, small: bool = False) -> Result:
    """Train STEPS steps of `config` in this process alone; `small` also shrinks layers, sequences and batch.

    An error that is not the user's ends in pdb's post mortem, at the line that raised it, and is raised again.
    ConfigError where a launcher started several processes.
    """
    if world_size() > 1:
        raise ConfigError(f"--debug: is one process, and a launcher started {world_size()}; start it without torchrun")
    single = debug_config(config, small=small)
    layout = build_facts(config, planned_world(config))
    log.info("%s", explain(layout, single, "kept" if single.global_batch() == config.global_batch() else "shrunk"))
    # A gradient that overflows is part of fp16.
    nan = single.precision.compute != "fp16"
    with torch.autograd.set_detect_anomaly(True, check_nan=nan):
        try:
            return train(single)
        except (ConfigError, RunError):
            raise
        except Exception as error:
            log.error("%s: %s; pdb stands where it was raised (q leaves)", type(error).__name__, error)
            pdb.Pdb(stdout=sys.stderr).interaction(None, error.__traceback__)
            raise


def debug_config(config: Config, *, small: bool = False) -> Config:
    """The same run natively in one process: no layout, STEPS steps, deterministic, uncompiled, in its own folder."""
    found = config.model_copy(deep=True)
    found.run = str(_fresh_folder(Path(config.run or "runs/run")))
    found.parallel = ParallelConfig(check_tied=config.parallel.check_tied, timeout=config.parallel.timeout)
    found.engine, found.deepspeed = "native", DeepSpeedConfig()
    length: dict[str, Any] = {"steps": STEPS, "tokens": None, "budget": None}
    found.train = config.train.model_copy(
        update={**length, "deterministic": True, "compile": False, "offload_activations": False}
    )
    found.data.workers = 0  # so that pdb and tracebacks are this process's
    found.log = config.log.model_copy(update={"every": 1, "tensorboard": False, "wandb": None, "profile": None})
    found.checkpoint.asynchronous = False
    found.watch = found.watch.model_copy(update={"timeout": None})  # pdb waits for a person
    if small:
        _shrink(found)
    found.check_batch()
    return found


def explain(layout: Facts, single: Config, fate: str) -> str:
    """What becomes of the run's layout and batch, in one line."""
    batch, micro = single.global_batch(), single.batch.micro
    was = f"the layout was {describe(layout)} on {layout.world} processes" if layout.world > 1 else "as configured"
    return (
        f"debug: one process ({was}); the global batch is {fate}: {batch} sequences, {batch // micro} of {micro} at a "
        f"time; {single.train.steps} steps into {single.run}"
    )


def _fresh_folder(run: Path) -> Path:
    """The first of <run>-debug/1, 2, ... that is not there: a debug run never goes on, nor touches another."""
    return next(path for n in itertools.count(1) if not (path := run.with_name(f"{run.name}-debug") / str(n)).exists())


def _shrink(config: Config) -> None:
    """Fewer layers, shorter sequences, a batch of few; widths stay, for what they hold together."""
    model: Any = config.model
    model.layers = min(model.layers, SMALL["layers"])
    if getattr(model, "decoder_layers", None) is not None:
        model.decoder_layers = min(model.decoder_layers, SMALL["layers"])
    config.data.sequence_length = min(config.data.sequence_length, SMALL["length"])
    sequences = min(config.global_batch(), SMALL["sequences"])
    config.batch = config.batch.model_copy(
        update={"sequences": sequences, "tokens": None, "micro": math.gcd(config.batch.micro, sequences), "ramp": None}
    )
