"""Engine deepspeed: ZeRO 0 to 3, with offload, by DeepSpeed itself behind our loop.

DeepSpeed owns where parameters, gradients, masters and moments lie, and their communication. It gets our optimizer
(torch's fused kernels over its flat shards), our micro-batch boundaries, and losses that are divided by the counts of
all ranks already; what it divides by the number of ranks is multiplied back. It clips as it steps, by the norm that
our guard has seen before. held.py knows where things lie in it, deepspeed_config.py makes its
configuration, rows.py its checkpoints.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwright.config import Config, ConfigError
from shardwright.model.families import build_model
from shardwright.model.init import apply_init, initial_value
from shardwright.objective.objective import Objective
from shardwright.parallel.logical import Logical
from shardwright.parallel.mesh import World, choose_device
from shardwright.train.draft import build_loss_model
from shardwright.train.engines import Built
from shardwright.train.engines.held import Held
from shardwright.train.engines.rows import Rows
from shardwright.train.layout import apply_blocks
from shardwright.train.optim import build_optimizer
from shardwright.train.stages import Batch, Loop, LossModel, Stages

OLDEST = "0.19.8"  # 0.17.6 to 0.19.3 compute wrong gradients at ZeRO 2 without a word
STATES = {"adamw": ("exp_avg", "exp_avg_sq"), "adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


def check(config: Config) -> None:
    """ConfigError where DeepSpeed is missing or too old, or its section contradicts the rest of the config."""
    device = choose_device(config.train.device)
    _load(device)
    if device.type == "cpu" and config.precision.compute == "fp16":
        raise ConfigError("precision.compute=fp16: DeepSpeed has no fp16 on a CPU; use bf16 or engine=native")
    if config.optimizer.fused == "apex":
        raise ConfigError("optimizer.fused=apex: engine=deepspeed steps its shards by torch's kernels; drop the key")
    from shardwright.train.engines.deepspeed_config import check_places, engine_config

    check_places(config)
    _check_nvme(config)
    engine_config(config, 1, gpu=device.type == "cuda")


def _check_nvme(config: Config) -> None:
    """ConfigError where something goes to nvme, and the operator that DeepSpeed writes with cannot be had."""
    if "nvme" not in (config.deepspeed.offload_optimizer, config.deepspeed.offload_parameters):
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ConfigError(
            "deepspeed: offload to nvme needs DeepSpeed's async_io, which is compiled here at the first use: install a "
            "C++ compiler and libaio (Debian: apt-get install g++ libaio-dev), or offload to cpu"
        )


def build(config: Config, world: World, objective: Objective) -> Built:
    """The engine around a model with its first weights. Every rank has to call it."""
    deepspeed = _load(world.device)
    from shardwright.train.engines.deepspeed_config import engine_config

    _enter_group(world)
    _forget_groups()
    model = build_model(config.model)  # type: ignore[arg-type]
    apply_init(model, config.model, config.train.seed)  # type: ignore[arg-type]
    apply_blocks(model.to(world.device), config, world)
    root = build_loss_model(model, objective, config.train.seed).train()
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    own = config.optimizer.model_copy(update={"fused": "torch"})
    base = build_optimizer(own, list(parameters.items()))
    names = _take_names(base)
    base.state.clear()  # of the parameters, in whose place DeepSpeed puts its shards
    settings = engine_config(config, world.size, gpu=world.device.type == "cuda")
    with _local_rank(world), _linear():
        try:
            engine, *_ = deepspeed.initialize(model=root, optimizer=base, config=settings, dist_init_required=False)
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise ConfigError(
                f"engine=deepspeed: DeepSpeed refuses these settings: {' '.join(str(error).split())}"
            ) from error
        linear = nn.functional.linear
    held = Held(engine, base, parameters, shapes, names, STATES[config.optimizer.name])
    held.build_states(config.optimizer.name, config.optimizer.momentum)
    if config.precision.compute != "fp32":
        # DeepSpeed makes masters of weights that it has rounded before.
        for name, shape in shapes.items():
            value = initial_value(config.model, name, shape, config.train.seed)  # type: ignore[arg-type]
            held.set(name, value.to(world.device))
    rows = Rows(world)
    masters = DeepSpeedMasters(held, rows, world)
    passes = DeepSpeedLoop(root, masters, world, partial(_passing, world, linear))
    optimizer = cast(torch.optim.Optimizer, DeepSpeedOptimizer(held, rows, masters))
    return Built(Stages({0: root}, passes, world), masters, optimizer)


# ------------------------------------------------------------------------------------------ the library


def _load(device: torch.device) -> Any:
    """DeepSpeed, on our device and silent; ConfigError where it cannot be had."""
    asked = os.environ.setdefault("DS_ACCELERATOR", device.type)
    if asked != device.type:
        raise ConfigError(
            f"DS_ACCELERATOR={asked}: contradicts the run's device, {device.type}; unset it, or set train.device"
        )
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "engine=deepspeed: DeepSpeed is not installed; pip install 'shardwright[deepspeed]', or use engine=native"
        ) from None
    from packaging.version import Version  # comes with it

    if Version(found) < Version(OLDEST):
        raise ConfigError(
            f"engine=deepspeed: DeepSpeed {found} computes wrong gradients in known cases; install {OLDEST} or newer"
        )
    # Of torch's newer names for its collectives, on every call of them.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed

    deepspeed.utils.logger.handlers[:] = [logging.lastResort]  # to stderr; its own writes where answers go
    if device.type == "cpu":
        # Of use to its inference alone; compiling it takes a minute, and it says so on stdout, where answers go.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _enter_group(world: World) -> None:
    """DeepSpeed wants a process group, also of one process; `join_world` gives it back."""
    if not dist.is_initialized():
        assert world.size == 1
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@contextmanager
def _local_rank(world: World) -> Iterator[None]:
    """DeepSpeed wants a launcher's LOCAL_RANK, which a process started by hand has not."""
    missing = "LOCAL_RANK" not in os.environ
    if missing:
        os.environ["LOCAL_RANK"] = str(world.device.index or 0)
    try:
        yield
    finally:
        if missing:
            del os.environ["LOCAL_RANK"]


@contextmanager
def _linear(function: Callable[..., Tensor] | None = None) -> Iterator[None]:
    """Within, torch's `linear` is `function`; what DeepSpeed puts in its place at ZeRO 3 is not left there.

    It would stay for the rest of the process, where other engines and stages run as well.
    """
    before = nn.functional.linear
    nn.functional.linear = function or before
    try:
        yield
    finally:
        nn.functional.linear = before


@contextmanager
def _passing(world: World, linear: Callable[..., Tensor]) -> Iterator[None]:
    """What has to stand around passes."""
    with _local_rank(world), _linear(linear):
        yield


def _forget_groups() -> None:
    """Drop what DeepSpeed remembers of the process groups of a run before, in this process."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    groups._release_process_group_references(None)
    comm.cdb = None
    comm.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def _take_names(base: torch.optim.Optimizer) -> list[list[str]]:
    """Logical names of every group; taken from torch's bookkeeping, for shards have none."""
    return [list(group.pop("param_names")) for group in base.param_groups]


# ------------------------------------------------------------------------------------------ what the step sees


class DeepSpeedMasters:
    """`step.Masters` of an engine. `weights` are copies, this rank's rows of each, made as they are asked for."""

    def __init__(self, held: Held, rows: Rows, world: World) -> None:
        self.held, self.rows, self.world = held, rows, world
        self.pending = False  # gradients that no step has taken
        self.aside = False
        self.scale: Tensor | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """For a checkpoint; every rank has to ask."""
        return {name: self.rows.spread(self.held.get(name)) for name in self.held.parameters}

    def copies(self, kind: str) -> dict[str, tuple[Logical, Tensor]]:
        """This rank's rows of every gradient (of the next step) or weight, for a comparison; every rank has to ask."""
        found = {}
        for name in self.held.parameters:
            whole = self.held.gradient(name) if kind == "gradient" else self.held.get(name)
            logical = self.rows.logical(whole.reshape(self.held.shapes[name]))
            found[name] = (logical, logical.local)
        return found

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Take in what a checkpoint was read into, and bring the compute copies up to date."""
        for name, spread in weights.items():
            self.held.set(name, self.rows.whole(spread))
        self.held.publish()

    def publish(self) -> None:
        """DeepSpeed has done so at the end of its step."""

    def clear(self) -> None:
        """Forget gradients that no step has taken: by a step that changes nothing."""
        if self.pending:
            self.held.base.found_inf = torch.ones((), device=self.world.device)  # type: ignore[attr-defined]
            self.step()

    def step(self) -> None:
        """DeepSpeed's step, over the gradients that are there."""
        with _local_rank(self.world):
            self.held.engine.step()
        self.pending = False

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within the block passes go forward alone: gradients would mix with those that are there."""
        self.aside = True
        try:
            yield
        finally:
            self.aside = False

    def collect(self) -> None:
        """The last backward pass has done so."""

    def grad_square(self, scale: Tensor) -> Tensor:
        """This rank's share of the squared norm over `scale`: every rank knows all of it."""
        norm = self.held.norm().to(device=self.world.device, dtype=scale.dtype)
        return torch.where(norm < 0, torch.inf, norm / scale).square() / self.world.size

    def scale_grads(self, factor: Tensor) -> None:
        """DeepSpeed does so as it steps, by the same norm."""


class DeepSpeedLoop(Loop):
    """Micro-batches through the engine, which reduces gradients at the last of them."""

    def __init__(
        self,
        model: LossModel,
        masters: DeepSpeedMasters,
        world: World,
        around: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__(model, around=around)
        self.engine, self.masters, self.world = masters.held.engine, masters, world
        model.factor = world.size

    def run(self, batches: Sequence[Batch]) -> Tensor:
        """See `Passes`."""
        with self.around():
            return self._run(batches)

    def _run(self, batches: Sequence[Batch]) -> Tensor:
        if self.masters.aside:
            with torch.no_grad():
                return torch.stack([self.model(batch["input_ids"], **batch) for batch in batches]).sum()
        total = torch.zeros((), device=self.world.device)
        for number, batch in enumerate(batches, 1):
            self.engine.set_gradient_accumulation_boundary(number == len(batches))
            loss = self.engine(batch["input_ids"], **batch).sum()
            total = total + loss.detach()
            # Counts of all ranks and micro-batches have divided it before: DeepSpeed's mean over ranks is taken back.
            self.engine.backward(loss * self.world.size, scale_wrt_gas=False)
            self.masters.pending = True
        return total


class DeepSpeedOptimizer:
    """Our optimizer inside of the engine, as `Step` and checkpoints know one."""

    def __init__(self, held: Held, rows: Rows, masters: DeepSpeedMasters) -> None:
        self.held, self.rows, self.masters = held, rows, masters

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Where the learning rates are set."""
        return self.held.base.param_groups

    @property
    def found_inf(self) -> Tensor | None:
        """1 where the next step is to change nothing; the kernels read it on the device."""
        return getattr(self.held.base, "found_inf", None)

    @found_inf.setter
    def found_inf(self, value: Tensor) -> None:
        self.held.base.found_inf = value  # type: ignore[attr-defined]

    def step(self) -> None:
        """Clip and apply, and share the new weights."""
        self.masters.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """As `optim.state_tensors`: copies, this rank's rows of each; every rank has to ask."""
        held, found = self.held, {}
        for name in held.parameters:
            if (count := held.steps(name)) is not None:
                found[f"step.{name}"] = count.detach().to("cpu", copy=True)
            for state in held.states:
                found[f"{state}.{name}"] = self.rows.spread(held.get(name, state).reshape(held.shapes[name]))
        return found

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in what `state_tensors` gave, or another layout's."""
        held = self.held
        for index, group in enumerate(held.names):
            counts = {float(tensors[f"step.{name}"]) for name in group if f"step.{name}" in tensors}
            if len(counts) > 1:
                raise ValueError(
                    f"optimizer state: weights have taken {', '.join(f'{c:g}' for c in sorted(counts))} steps, and "
                    "DeepSpeed counts them together; go on with engine=native"
                )
            for count in counts:
                for shard in held.shards(index):
                    held.base.state[shard]["step"].fill_(count)
        for name in held.parameters:
            for state in held.states:
                held.set(name, self.rows.whole(tensors[f"{state}.{name}"]), state)
