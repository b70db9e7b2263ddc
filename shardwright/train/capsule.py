"""What is kept of a step that fails, so that `shardwright replay` can run it again on one device: a capsule.

Beside run.py; replay.py reads what this writes. A capsule is a folder, <run>/capsules/step_00000123: a JSON that says
what happened, where in the run and from which weights, and each rank's micro-batches as safetensors. There are no
random states to keep: what is random in a step is a function of the seed and the step's number. After a verdict of the
guard all ranks are there and write together, the weights before the step too, unless a checkpoint has them. After an
exception a rank writes what it can alone, and the weights are those of the newest whole checkpoint.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shardwright.checkpoint import CheckpointError, find_newest, save, step_name
from shardwright.checkpoint.integrity import MANIFEST, sha256
from shardwright.config import Config, ConfigError, RunError
from shardwright.data.loader import MicroBatch, StepBatch
from shardwright.hardware import versions
from shardwright.log import get_logger
from shardwright.parallel.mesh import World
from shardwright.parallel.peers import is_loss
from shardwright.train.folder import CHECKPOINTS
from shardwright.train.position import Position, checkpoint_tensors
from shardwright.train.step import Step

CAPSULES, FILE, FORMAT = "capsules", "capsule.json", 1
WEIGHTS = "weights"
RANKS_PER_FOLDER = 900

Kind = Literal["nonfinite", "spike", "exception"]


@dataclass(frozen=True)
class Scene:
    """A step of a run as one rank sees it; `position` is that before the step."""

    config: Config
    world: World
    step: Step
    position: Position
    batch: StepBatch

    @property
    def number(self) -> int:
        """Of the step; 1 is the first."""
        return self.position.step + 1

    @property
    def run(self) -> Path:
        """The run folder."""
        return Path(self.config.run or "")

    @property
    def folder(self) -> Path:
        """Where its capsule lies."""
        return self.run / CAPSULES / step_name(self.number)


@dataclass(frozen=True)
class Capsule:
    """The JSON of a capsule."""

    step: int  # that failed; 1 is the first
    kind: Kind
    what: str  # happened, in one line
    module: str | None  # where, by the run's own search
    rank: int  # that says so
    sequences: tuple[int, int]  # first and last of the step
    config: Mapping[str, Any]
    position: Mapping[str, Any]  # before the step
    weights: Mapping[str, Any] | None  # path (from the capsule's folder), step, sha256 of its manifest; None: the first
    layout: str = ""
    error: str = ""  # class of the exception
    traceback: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    at: float = field(default_factory=time.time)
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> Capsule:
        """From its folder; ConfigError where there is none, or one of another format."""
        path = folder / FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(raw, dict):
                raise ValueError("it is no JSON object")
            if raw.get("format") != FORMAT:
                raise ValueError(f"its format is {raw.get('format')}, this version reads {FORMAT}")
            return cls(**{**raw, "sequences": (int(raw["sequences"][0]), int(raw["sequences"][1]))})
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; name a folder below {CAPSULES}/ of a run") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: is no capsule: {error}") from None

    def write(self, folder: Path) -> None:
        """Into its folder, whole or not at all."""
        fresh = folder / f".{FILE}.{os.getpid()}"
        fresh.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        fresh.replace(folder / FILE)


@contextmanager
def keeping(scene: Callable[[], Scene | None]) -> Iterator[None]:
    """Around a step: where it raises something of its own, this rank's part of a capsule is written first.

    Nothing is kept of a lost rank, nor of what a user has to mend.
    """
    try:
        yield
    except (RunError, ConfigError):
        raise
    except Exception as error:
        found = None if is_loss(error) else scene()
        if found is not None:
            with _complaining():
                keep_exception(found, error)
        raise


def keep_exception(scene: Scene, error: Exception) -> None:
    """What one rank knows of a step that raised `error`, written alone."""
    models = [model.model for model in scene.step.stages.models.values()]
    write_batch(scene)
    newest = find_newest(scene.run / CHECKPOINTS)[0]
    _write(
        scene,
        kind="exception",
        what=f"{type(error).__name__}: {_first_line(error)}",
        error=type(error).__name__,
        module=module_of(error, models),
        weights=None if newest is None else describe_weights(scene.folder, newest),
        traceback="".join(traceback.format_exception(error)),
    )


def keep_verdict(scene: Scene, kind: Kind, what: str, newest: Path | None) -> None:
    """A step that the guard stops the run for; every rank has to call it. `newest`: the newest whole checkpoint.

    The weights are those before the step, for its update changed none; they are saved into the capsule, where they push
    no checkpoint of the run out.
    """
    with _complaining():
        if not any(scene.world.index(axis) for axis in ("tensor", "pipeline", "context")):  # those read the same
            write_batch(scene)
        if newest is None or newest.name != step_name(scene.position.step):
            state = {"position": scene.position.state()}
            newest = save(scene.folder / WEIGHTS, checkpoint_tensors(scene.step), state, step=scene.position.step)
        if scene.world.leads:
            module = what.rpartition("first in ")[2] if kind == "nonfinite" else None
            _write(scene, kind=kind, what=what, module=module, weights=describe_weights(scene.folder, newest))


def _write(scene: Scene, **facts: Any) -> None:
    capsule = Capsule(
        step=scene.number,
        rank=scene.world.rank,
        sequences=(scene.batch.first, scene.batch.last),
        config=scene.config.model_dump(mode="json"),
        position=scene.position.state(),
        layout=f"{scene.world.size} processes, {scene.world.describe(scene.config.parallel)}",
        versions=versions(("torch", "numpy", "shardwright")),
        **facts,
    )
    scene.folder.mkdir(parents=True, exist_ok=True)
    capsule.write(scene.folder)
    get_logger().error(
        "step %d is kept in %s; to run it again on one device: shardwright replay %s",
        scene.number, scene.folder, scene.folder,
    )  # fmt: skip


@contextmanager
def _complaining() -> Iterator[None]:
    """Within, what fails is said and no more: what ended the run matters, not its capsule."""
    try:
        yield
    except (OSError, CheckpointError, ValueError, RuntimeError) as error:
        get_logger().warning("no capsule of the step could be written: %s", _first_line(error))


def write_batch(scene: Scene) -> None:
    """This rank's micro-batches, as the loader gave them."""
    path = batch_path(scene.folder, scene.world.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(pack(scene.batch.micro_batches), path)


def batch_path(folder: Path, rank: int) -> Path:
    """File of a rank's micro-batches: beside the JSON, or in folders of RANKS_PER_FOLDER where there are more."""
    place = folder if rank < RANKS_PER_FOLDER else folder / f"{rank // RANKS_PER_FOLDER:03}"
    return place / f"rank_{rank:05}.safetensors"


def pack(batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
    """Micro-batches as the tensors of one file: `0003.input_ids`."""
    named = {f"{number:04}.{name}": tensor for number, batch in enumerate(batches) for name, tensor in batch.items()}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}


def read_batches(folder: Path) -> dict[int, dict[str, Tensor]]:
    """Every sequence of a capsule by its number, each as tensors without the batch's axis; ConfigError if damaged."""
    rows: dict[int, dict[str, Tensor]] = {}
    for path in sorted(folder.rglob("rank_*.safetensors")):
        if WEIGHTS in path.relative_to(folder).parts:
            continue
        try:
            found = load_file(path)
        except Exception as error:
            raise ConfigError(f"{path}: cannot be read: {_first_line(error)}") from None
        batches: dict[str, dict[str, Tensor]] = {}
        for name, tensor in found.items():
            number, _, part = name.partition(".")
            batches.setdefault(number, {})[part] = tensor
        for batch in batches.values():
            rows |= rows_of(batch)
    return rows


def rows_of(batch: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """A micro-batch by sequence number; padding is left out."""
    numbers = batch["sequence"].tolist()
    return {n: {name: t[row].cpu() for name, t in batch.items()} for row, n in enumerate(numbers) if n >= 0}


def describe_weights(capsule: Path, checkpoint: Path) -> dict[str, Any]:
    """Where a checkpoint is, from the capsule's folder, and what it holds by the hash of its manifest."""
    return {
        "path": os.path.relpath(checkpoint, capsule),
        "step": int(checkpoint.name.removeprefix("step_")),
        "sha256": manifest_hash(checkpoint),
    }


def manifest_hash(checkpoint: Path) -> str:
    """sha256 of the manifest, which has the checksums of all the rest."""
    return sha256((checkpoint / MANIFEST).read_bytes())


def module_of(error: BaseException, models: Sequence[nn.Module]) -> str | None:
    """Name of the innermost module that a traceback goes through; None where it goes through none of theirs."""
    names = {id(module): name for model in models for name, module in model.named_modules() if name}
    found, trace = None, error.__traceback__
    while trace is not None:
        with suppress(Exception):
            found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, format and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(_bits(a), _bits(b)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
