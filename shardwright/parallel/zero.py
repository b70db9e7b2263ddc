"""Data parallelism and the ZeRO stages (Rajbhandari et al. 2020), as settings of FSDP2.

Every run of several processes goes through here, also where the data axis is 1, so that casts and gradients take one
way in all of them: float32 parameters, sharded over the mesh (replicate, shard), are the masters; FSDP gathers copies
of them in the compute format and reduces gradients in float32. Sums, never means: losses were divided by global counts
before. Stage 1 gathers parameters once a step and reduces gradients on the last micro-batch alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from shardwright.parallel.logical import Logical, norm_here
from shardwright.parallel.pipeline import check_tied, copy_tied, sum_tied
from shardwright.parallel.precision import master_format


class Stage(NamedTuple):
    """What a ZeRO stage shards beyond the stage before it."""

    shards: bool  # masters, optimizer state and reduced gradients
    reduces_each: bool  # gradients are reduced and sharded at every micro-batch
    reshards: bool  # parameters are let go after each block's forward pass, and gathered again for its backward


STAGES: dict[int, Stage] = {
    0: Stage(False, False, False),
    1: Stage(True, False, False),
    2: Stage(True, True, False),
    3: Stage(True, True, True),
}


def apply_zero(
    root: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    stage: int,
    compute: torch.dtype,
    offload: bool = False,
) -> None:
    """Wrap each of `blocks`, then `root` with what is left (embedding, final norm, head), in place.

    mesh: (replicate, shard), sizes 1 allowed. Parameters are in `master_format(compute)`; they may be on the meta
    device, and DTensors of a tensor axis.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master_format(compute), cast_forward_inputs=False)
    offloading = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for module in blocks:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offloading,
            reshard_after_forward=STAGES[stage].reshards,
        )
    fully_shard(root, mesh=mesh, mp_policy=policy, offload_policy=offloading, reshard_after_forward=False)
    for wrapped in sharded_modules(root):  # neither setting reaches submodules by itself
        wrapped.set_gradient_divide_factor(1.0)
        wrapped.set_force_sum_reduction_for_comms(True)


def sharded_modules(root: nn.Module) -> Iterator[FSDPModule]:
    """`root` and every module in it that FSDP manages."""
    return (module for module in root.modules() if isinstance(module, FSDPModule))


def begin_micro_batch(wrapped: Sequence[FSDPModule], stage: int, *, last: bool) -> None:
    """Say before a forward pass whether its gradients are reduced and its parameters let go afterwards.

    wrapped: `sharded_modules` of the root, which comes first; looked up once, for a walk through all modules costs as
    much as a block's hooks. Without the flags of the last micro-batch, later steps would compute with stale weights.
    """
    root = wrapped[0]
    for module in wrapped:  # one by one: each setter would walk through all modules by itself
        module.set_requires_gradient_sync(last or STAGES[stage].reduces_each, recurse=False)
        module.set_requires_all_reduce(last, recurse=False)  # over replicas once a step: sums of shards wait for it
        # What is the root's own, the next forward pass begins with.
        reshards = STAGES[stage].reshards and module is not root
        module.set_reshard_after_backward(last or reshards, recurse=False)
    root.set_is_last_backward(last)


def reshard(wrapped: Iterable[FSDPModule]) -> None:
    """Let go of gathered parameters: after an evaluation or a load, whose weights are others."""
    for module in wrapped:
        module.reshard()


class TiedWeight:
    """A weight that several stages use, each by a copy: `copies` are those on this rank.

    Embedding and head are one, of the first stage and the last; so is a table that all blocks share, of every stage.
    group: of the ranks that have copies; None where one rank has all of them, and on ranks that have none. counts:
    whether this rank has the first stage's, the only one that a norm counts.
    """

    def __init__(
        self, name: str, copies: Sequence[nn.Parameter], group: dist.ProcessGroup | None, *, counts: bool
    ) -> None:
        self.name, self.copies, self.group, self.counts = name, copies, group, counts

    def sum_gradients(self) -> None:
        """All copies get the sum of their gradients; once a step, after the last backward pass."""
        sum_tied([_local_gradient(copy) for copy in self.copies], self.group)

    def follow(self) -> None:
        """Where one rank has several copies, the first has the optimizer and the others do as it does."""
        copy_tied(self._parts(), None)

    def difference(self) -> Tensor:
        """The largest difference of the copies' parts here (0-dim); 0 where they are as they must be."""
        return check_tied(self._parts(), self.group)

    def _parts(self) -> list[Tensor]:
        return [Logical.of(copy.detach()).local for copy in self.copies]


class ShardedMasters:
    """The float32 masters of modules wrapped by `apply_zero`; the methods of `precision.Masters`.

    `weights` are DTensors by logical name, for checkpoints; `parts` are this rank's parts of those that are trained, as
    plain tensors, for the optimizer.
    """

    def __init__(
        self, roots: Sequence[nn.Module], parameters: Mapping[str, nn.Parameter], tied: Sequence[TiedWeight] = ()
    ) -> None:
        self.roots, self.parameters, self.tied = roots, parameters, tied
        #: Copies of what another rank has as well, and counts.
        self.uncounted = {weight.name for weight in tied if not weight.counts}
        self._wrapped = [module for root in roots for module in sharded_modules(root)]
        self.logical = {name: Logical.of(parameter.detach()) for name, parameter in parameters.items()}
        self.parts: dict[str, Tensor] = {
            name: self.logical[name].local for name, parameter in parameters.items() if parameter.requires_grad
        }
        self.weights = {name: logical.wrap(logical.local) for name, logical in self.logical.items()}

    @torch.no_grad()
    def publish(self) -> None:
        """Forget gathered copies of the weights, after a step or a load."""
        for weight in self.tied:
            weight.follow()
        reshard(self._wrapped)

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """`weights`, which share the memory of the parts, were filled from a checkpoint."""
        self.publish()

    def clear(self) -> None:
        """Forget the gradients."""
        for part in self.parts.values():
            part.grad = None
        for root in self.roots:
            root.zero_grad(set_to_none=True)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within the block gradients may be computed again; afterwards those from before are back."""
        every = [p for root in self.roots for p in root.parameters()]
        grads = [p.grad for p in every]
        for parameter in every:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, grad in zip(every, grads, strict=True):
                parameter.grad = grad

    @torch.no_grad()
    def collect(self) -> None:
        """Hand the parts their gradients, once all backward passes are done; zero where none came."""
        for name, part in self.parts.items():
            part.grad = _local_gradient(self.parameters[name])
        for weight in self.tied:
            weight.sum_gradients()

    def grad_square(self, scale: Tensor) -> Tensor:
        """This rank's share of the squared 2-norm of all gradients over `scale`; all ranks' shares add up to it."""
        shares: dict[int, list[Tensor]] = {}
        for name, part in self.parts.items():
            assert part.grad is not None
            if name not in self.uncounted:
                shares.setdefault(self.logical[name].copies, []).append(part.grad)
        if not shares:  # a stage may have copies alone
            return torch.zeros_like(scale)
        squares = [(torch.stack(_norms(grads)) / scale).square().sum() / copies for copies, grads in shares.items()]
        return torch.stack(squares).sum()

    def scale_grads(self, factor: Tensor) -> None:
        """Multiply every gradient by a scalar on the device."""
        torch._foreach_mul_([part.grad for part in self.parts.values() if part.grad is not None], factor)


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """2-norms of tensors on one device."""
    if tensors[0].device.type == "cpu":
        return [norm_here(tensor) for tensor in tensors]
    return list(torch._foreach_norm(tensors))


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a gradient, as a plain tensor in the gradient's memory; zeros where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    gradient = parameter.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
