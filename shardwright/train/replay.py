"""A failing step once more, in one process on one device, whatever the layout it failed under.

Above run.py, which it drives: the capsule says which weights to begin with and which step to go to; the data are read
again, by their sequence numbers, and held against those that the ranks had. Tensors and JSON are all that is opened.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from shardwright.checkpoint.ranks import open_ranks
from shardwright.config import Config, ConfigError, DeepSpeedConfig, ParallelConfig
from shardwright.log import get_logger
from shardwright.parallel.mesh import join_world, world_size
from shardwright.train.build import build_corpus, fit_to_corpus
from shardwright.train.capsule import FILE, Capsule, manifest_hash, module_of, read_batches, rows_of, same_bits
from shardwright.train.clock import CLOCK
from shardwright.train.run import Run
from shardwright.train.settings import read_config
from shardwright.train.signals import Signals
from shardwright.train.watch import Watch

log = get_logger()


@dataclass(frozen=True)
class Replay:
    """How it went. `text` is the answer in one line."""

    reproduced: bool
    text: str
    step: int
    module: str | None = None
    batch: str = ""  # how its data compare with the capsule's
    error: Exception | None = None  # what the step raised

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        error = None if self.error is None else f"{type(self.error).__name__}: {self.error}"
        return {
            "reproduced": self.reproduced, "text": self.text, "step": self.step, "module": self.module,
            "batch": self.batch, "error": error,
        }  # fmt: skip


def replay(path: str | Path, overrides: Sequence[str] = ()) -> Replay:
    """Run the step of the capsule at `path` again; `overrides` of its config, for example where the data are now.

    ConfigError where there is no such capsule, or where its weights are gone or others.
    """
    if world_size() > 1:
        raise ConfigError(f"replay: is one process, and a launcher started {world_size()}; start it without torchrun")
    folder = Path(path).parent if Path(path).name == FILE else Path(path)
    capsule = Capsule.read(folder)
    start = find_weights(folder, capsule)
    log.info("step %d of %s, which ran as %s: %s", capsule.step, capsule.config["run"], capsule.layout, capsule.what)
    with tempfile.TemporaryDirectory(prefix="shardwright-replay-") as scratch:
        config = replay_config(capsule, Path(scratch), overrides)
        with suppress(OSError):  # of a run under a budget: it is replayed from what its clock gave
            shutil.copy(folder.parent.parent / CLOCK, Path(scratch) / CLOCK)
        return _rerun(config, capsule, folder, start)


def find_weights(folder: Path, capsule: Capsule) -> Path | None:
    """The checkpoint that a capsule begins with; None for a run that failed before it had one."""
    if capsule.weights is None:
        return None
    checkpoint = Path(folder, capsule.weights["path"]).resolve()
    try:
        found = manifest_hash(checkpoint)
    except OSError:
        raise ConfigError(
            f"{checkpoint}: the weights that {folder} begins with are gone; restore that folder"
        ) from None
    if found != capsule.weights["sha256"]:
        raise ConfigError(
            f"{checkpoint}: is not the checkpoint that {folder} was made with, but a later one; restore it"
        )
    return checkpoint


def replay_config(capsule: Capsule, scratch: Path, overrides: Sequence[str] = ()) -> Config:
    """The same run in one process that writes nothing but into `scratch`: no layout, no engine, nothing compiled."""
    config = read_config(dict(capsule.config), overrides)
    config.run = str(scratch)
    config.parallel, config.engine, config.deepspeed = ParallelConfig(), "native", DeepSpeedConfig()
    config.train = config.train.model_copy(update={"compile": False, "offload_activations": False})
    config.data.workers = 0
    config.log = config.log.model_copy(update={"tensorboard": False, "wandb": None, "profile": None})
    config.checkpoint = config.checkpoint.model_copy(update={"every": None, "asynchronous": False})
    config.evaluate = config.evaluate.model_copy(update={"every": None})
    config.watch = config.watch.model_copy(update={"timeout": None, "capsules": False})
    config.check_batch()
    return config


def _rerun(config: Config, capsule: Capsule, folder: Path, start: Path | None) -> Replay:
    corpus = build_corpus(config)
    fit_to_corpus(config, corpus)
    with (
        join_world(config.train.device, config.train.threads, config.parallel) as world,
        Signals() as signals,
        open_ranks() as ranks,
        Watch(config, world, ranks) as watch,
        Run(config, world, ranks, corpus, signals, watch) as run,
    ):
        run.begin(start)
        while run.position.step < capsule.step - 1:
            number = run.position.step + 1
            try:
                note = run.rerun()
            except Exception as error:
                return _another(capsule, number, error, run)
            log.info("step %d of %d%s", number, capsule.step, f": {note}" if note else "")
        return _last_step(run, capsule, folder)


def _another(capsule: Capsule, number: int, error: Exception, run: Run) -> Replay:
    where = _where(error, run)
    text = f"not reproduced: step {number} raised before step {capsule.step}: {type(error).__name__}: {error}{where}"
    return Replay(False, text, number, error=error)


def _last_step(run: Run, capsule: Capsule, folder: Path) -> Replay:
    """The step itself."""
    raised: Exception | None = None
    found: str | None = None
    try:
        found = run.rerun()
    except Exception as error:
        raised = error
    batch = compare(read_batches(folder), [] if run.batch is None else run.batch.micro_batches)
    answer = _judge(capsule, found, raised, run)
    same = batch.startswith("bit-equal")
    if not same:
        text = f"not reproduced: the data are not those of the run: {batch}; {answer.text}"
        return Replay(False, text, capsule.step, answer.module, batch, raised)
    return Replay(answer.reproduced, f"{answer.text}; batch {batch}", capsule.step, answer.module, batch, raised)


def _judge(capsule: Capsule, found: str | None, raised: Exception | None, run: Run) -> Replay:
    """Whether what happened is what the capsule says."""
    step = capsule.step
    if raised is not None:
        module = module_of(raised, [model.model for model in run.step.stages.models.values()])
        text = f"step {step}: {type(raised).__name__}: {raised}{_where(raised, run)}"
        if capsule.kind == "exception" and type(raised).__name__ == capsule.error:
            return Replay(True, f"reproduced: {text}", step, module)
        return Replay(False, f"not reproduced, but {text}; the run had: {capsule.what}", step, module)
    if found is not None:
        module = found.rpartition("first in ")[2] if "first in " in found else None
        alike = capsule.kind == ("nonfinite" if module else "spike")
        return Replay(alike, f"{'reproduced: ' if alike else 'not reproduced, but '}{found}", step, module)
    loss, norm = run.outcome.loss, run.outcome.grad_norm
    return Replay(
        False,
        f"not reproduced: step {step} went well on one device (loss {loss:.6g}, gradient norm {norm:.4g}); the run "
        f"had: {capsule.what}. What differs is where it ran: memory, kernels, network of rank {capsule.rank}'s host",
        step,
    )


def _where(error: Exception, run: Run) -> str:
    module = module_of(error, [model.model for model in run.step.stages.models.values()])
    return f", in {module}" if module else ""


def compare(kept: Mapping[int, Mapping[str, Tensor]], batches: Sequence[Mapping[str, Tensor]]) -> str:
    """How the sequences of a capsule compare with those of a step: "bit-equal ...", or the first difference."""
    here: dict[int, dict[str, Tensor]] = {}
    for batch in batches:
        here |= rows_of(batch)
    for number, tensors in sorted(kept.items()):
        if number not in here:
            return f"sequence {number} is not in this step"
        for name, tensor in tensors.items():
            if name not in here[number] or not same_bits(tensor, here[number][name]):
                return f"sequence {number} differs in {name}"
    return f"bit-equal, {len(kept)} of {len(here)} sequences compared"
