"""Engine accelerate: an `Accelerator` places and wraps the model, for users whose environment is built around it.

It wraps by its FSDP2 plugin from ZeRO 1 on, as its environment says or else as our config does, and by DDP at ZeRO 0;
every backward pass goes through it. Not handed to it: the data loader (it repeats samples to fill batches, and has rank
0 read for all), the schedule (it would step once a process) and the optimizer, which are ours and run over the shards
that it made. Precision is its plugin's policy with our cast points, never autocast, which casts elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.nn.parallel import DistributedDataParallel

from shardwright.config import Config, ConfigError
from shardwright.log import get_logger
from shardwright.model.families import build_model
from shardwright.model.init import apply_init
from shardwright.objective.objective import Objective
from shardwright.parallel.logical import Logical
from shardwright.parallel.mesh import World
from shardwright.parallel.precision import FORMATS, Masters, master_format
from shardwright.parallel.zero import STAGES, ShardedMasters, begin_micro_batch, sharded_modules
from shardwright.train.draft import build_loss_model
from shardwright.train.engines import Built
from shardwright.train.layout import apply_blocks, blocks_of, product_format
from shardwright.train.optim import build_optimizer
from shardwright.train.stages import Batch, Loop, LossModel, Stages

OLDEST = "1.10"
FORMAT_NAMES = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": "engine=deepspeed takes DeepSpeed without Accelerate between",
    "ACCELERATE_USE_MEGATRON_LM": "engine=native has tensor and pipeline parallelism",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "engine=native has all kinds of parallelism",
}


def check(config: Config) -> None:
    """ConfigError where Accelerate is missing, or its environment contradicts the config."""
    try:
        found = importlib.metadata.version("accelerate")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "engine=accelerate: Accelerate is not installed; pip install 'shardwright[accelerate]', or use "
            "engine=native"
        ) from None
    from packaging.version import Version  # comes with it

    if Version(found) < Version(OLDEST):
        raise ConfigError(f"engine=accelerate: Accelerate {found} is too old; install {OLDEST} or newer")
    for variable, remedy in OTHERS.items():
        if _is_on(variable):
            raise ConfigError(f"{variable}: engine=accelerate carries DDP and FSDP2 alone; {remedy}")
    _check_environment(config)


def _check_environment(config: Config) -> None:
    """What `accelerate launch` left, against our keys."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked != "no" and FORMAT_NAMES.get(asked) != config.precision.compute:
        raise ConfigError(
            f"ACCELERATE_MIXED_PRECISION={asked}: contradicts precision.compute={config.precision.compute}; start it "
            "with --mixed_precision no, or set both alike"
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise ConfigError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps}: is decided by batch.sequences and batch.micro; leave "
            "--gradient_accumulation_steps out"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ConfigError("ACCELERATE_DYNAMO_BACKEND: blocks are compiled by train.compile; use --dynamo_backend no")
    if not _is_on("ACCELERATE_USE_FSDP"):
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(f"FSDP_VERSION={version}: engine=accelerate carries FSDP2; start it with --fsdp_version 2")
    if config.parallel.zero == 0:
        raise ConfigError("parallel.zero=0: contradicts --use_fsdp of the launcher; drop it, or set parallel.zero=3")
    if _is_on("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ConfigError(
            "FSDP_ACTIVATION_CHECKPOINTING: is decided by train.recompute; set that and leave the launcher's out"
        )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


def build(config: Config, world: World, objective: Objective) -> Built:
    """The wrapped model with its first weights. Every rank has to call it."""
    accelerator = _accelerator(world)
    model = build_model(config.model)  # type: ignore[arg-type]
    apply_init(model, config.model, config.train.seed)  # type: ignore[arg-type]
    apply_blocks(model.to(world.device), config, world)
    root = build_loss_model(model, objective, config.train.seed).train()
    if world.size == 1:
        accelerator.prepare_model(root)
        own = Masters(model, FORMATS[config.precision.compute])
        loop: Loop = AccelerateLoop(root, accelerator)
        return Built(Stages({0: root}, loop, world), own, _optimizer(config, own.parts))
    if config.parallel.zero == 0:
        wrapped = accelerator.prepare_model(root)
        assert isinstance(wrapped, DistributedDataParallel)
        replicas = ReplicatedMasters([root], dict(model.named_parameters()), world.size)
        loop = ReplicatedLoop(root, accelerator, wrapped, world.size)
        return Built(Stages({0: root}, loop, world), replicas, _optimizer(config, replicas.parts))
    zero = _shard(accelerator, root, config, world)
    masters = ShardedMasters([root], dict(model.named_parameters()))
    loop = AccelerateLoop(root, accelerator, zero)
    optimizer = _optimizer(config, masters.parts, masters.logical)
    return Built(Stages({0: root}, loop, world), masters, optimizer)


def _optimizer(
    config: Config, weights: Mapping[str, Tensor], logical: Mapping[str, Logical] | None = None
) -> torch.optim.Optimizer:
    named = list(weights.items())
    return build_optimizer(config.optimizer, named, logical=logical, matmul_dtype=product_format(config))


def _accelerator(world: World) -> Any:
    """A new Accelerator over the process group that is there; what an earlier run of this process left is dropped."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import GradientAccumulationPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(
        mixed_precision="no",  # autocast has other cast points
        cpu=world.device.type == "cpu",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if (accelerator.num_processes, accelerator.process_index) != (world.size, world.rank):
        raise ConfigError(
            f"engine=accelerate: Accelerate sees rank {accelerator.process_index} of {accelerator.num_processes}, the "
            f"launcher said rank {world.rank} of {world.size}; unset what another launcher left"
        )
    return accelerator


def _shard(accelerator: Any, root: LossModel, config: Config, world: World) -> int:
    """Wrap by Accelerate's FSDP2 plugin; gives the ZeRO stage that this is."""
    from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model

    zero, compute = config.parallel.zero, FORMATS[config.precision.compute]
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    given = plugin is not None or _is_on("ACCELERATE_USE_FSDP")
    if plugin is None:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, reshard_after_forward=None if given else STAGES[zero].reshards
        )
    if given:
        zero = 3 if plugin.reshard_after_forward else min(zero, 2)
    if plugin.auto_wrap_policy is None:
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks_of(root.model)})
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=master_format(compute), cast_forward_inputs=False
    )
    if config.parallel.offload:
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    elif not plugin.cpu_offload:
        plugin.cpu_offload = OffloadPolicy()
    accelerator.state.fsdp_plugin = plugin  # where Accelerate looks for it; on a CPU it fills that in for no one
    fsdp2_prepare_model(accelerator, root)
    for module in sharded_modules(root):  # losses are divided by counts of all ranks before
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    get_logger().info(
        "accelerate: FSDP2 %s, ZeRO %d", "as its environment says" if given else "as parallel.zero says", zero
    )
    return zero


class AccelerateLoop(Loop):
    """Micro-batches whose backward passes go through the Accelerator; sharded by FSDP2 where `zero` is given."""

    def __init__(self, model: LossModel, accelerator: Any, zero: int | None = None) -> None:
        super().__init__(model, zero)
        self.accelerator = accelerator

    def run(self, batches: Sequence[Batch]) -> Tensor:
        """See `Passes`."""
        total: Tensor | None = None
        for number, batch in enumerate(batches, 1):
            if self.zero is not None:
                begin_micro_batch(self._wrapped, self.zero, last=number == len(batches))
            loss = self.model(batch["input_ids"], **batch).sum()
            self.accelerator.backward(loss)
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total


class ReplicatedLoop(AccelerateLoop):
    """Micro-batches through DDP, which reduces gradients at the last of them, as a mean that is taken back."""

    def __init__(self, model: LossModel, accelerator: Any, wrapped: DistributedDataParallel, size: int) -> None:
        super().__init__(model, accelerator)
        self.wrapped, self.size = wrapped, size
        model.factor = size

    def run(self, batches: Sequence[Batch]) -> Tensor:
        """See `Passes`."""
        total = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(batches, 1):
            self.wrapped.require_backward_grad_sync = number == len(batches)  # as its no_sync does
            loss = self.wrapped(batch["input_ids"], **batch).sum()
            self.accelerator.backward(loss * self.size)
            total = total + loss.detach()
        return total


class ReplicatedMasters(ShardedMasters):
    """The float32 parameters under DDP, of which every rank has all."""

    def __init__(self, roots: Sequence[nn.Module], parameters: Mapping[str, nn.Parameter], size: int) -> None:
        super().__init__(roots, parameters)
        self.size = size

    def grad_square(self, scale: Tensor) -> Tensor:
        """This rank's share of the squared norm over `scale`: every rank knows all of it."""
        return super().grad_square(scale) / self.size
