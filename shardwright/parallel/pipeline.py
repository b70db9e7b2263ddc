"""Pipeline parallelism: the stages of a rank run under one of torch's schedules, all micro-batches of a step at once.

Shapes are told to torch beforehand, so that no stage ever runs on made-up data to find them out. Labels, weights and
document numbers travel as keyword arguments to every rank, activations [B, T, D] alone from stage to stage; the loss is
summed inside the last stage. Stages.py says which layers a stage has. P ranks, S stages, B rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, schedules

from shardwright.parallel.precision import master_format
from shardwright.parallel.stages import SCHEDULES, check_micro_batches, check_virtual

Batch = Mapping[str, Tensor]

_TRAINING: dict[str, type] = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}
# Forward passes alone, by where a schedule puts its stages; these take any number of micro-batches.
_FORWARD: dict[str, type] = {
    "single": schedules.ScheduleGPipe,
    "loop": schedules.ScheduleLoopedBFS,
    "v": schedules.ScheduleZBVZeroBubble,
}


class _Key(NamedTuple):
    """What one of torch's schedules is made for."""

    shapes: tuple[tuple[str, torch.Size], ...]  # of a micro-batch's arrays, by name
    num_micro: int  # micro-batches of a step
    training: bool


class Pipeline:
    """Runs the stages of this rank together with those of the other ranks of its pipeline.

    A stage module is called as `module(x, **batch)`: x is `batch["input_ids"]` in stage 0 and the activations of the
    stage before elsewhere; it gives activations, or float32 [terms] in the last stage. Modules may be roots of FSDP
    (`fully_shard`), of ZeRO stage 1, or 3 where the schedule does not split its backward pass: torch reduces their
    gradients once a step, at its end.
    """

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        *,
        schedule: str,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        activation: Callable[[Mapping[str, torch.Size]], Sequence[int]],
        terms: int = 1,
    ) -> None:
        """`modules` by stage index; `activation`: shapes of a rank's micro-batch -> [B, T', D] between stages.

        `dtype` is that of activations, `terms` the number of loss terms, which are in its master format. ValueError for
        a schedule that cannot have so many stages a rank.
        """
        if reason := check_virtual(schedule, len(modules)):
            raise ValueError(reason)
        self.modules = dict(sorted(modules.items()))
        self.schedule, self.group, self.device, self.dtype = schedule, group, device, dtype
        self.activation, self.terms, self.wide = activation, terms, master_format(dtype)
        self.size = dist.get_world_size(group)
        self.num_stages = self.size * len(modules)
        self._schedules: dict[_Key, Any] = {}

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage, which alone knows the loss."""
        return self.num_stages - 1 in self.modules

    @property
    def at_once(self) -> int:
        """Batches of one evaluation pass: enough to fill the pipeline twice."""
        return 2 * self.num_stages

    def run(self, batches: Sequence[Batch]) -> Tensor:
        """Forward and backward of all micro-batches of a step; gradients add up in the modules.

        Every rank of the pipeline gives the same batches, all of one shape. Returns the sum of all outputs of the last
        stage, 0-dim without a gradient; 0 on ranks that do not have it. ValueError where the schedule cannot
        run so many micro-batches, before anything is sent.
        """
        if reason := check_micro_batches(self.schedule, self.size, len(self.modules), len(batches)):
            raise ValueError(reason)
        schedule = self._schedule(_Key(_shapes(batches), len(batches), training=True))
        losses: list[Tensor] = []
        # The target is no label (those are in the batches), but a schedule with a loss asks for one.
        target = torch.zeros(len(batches))
        schedule.step(*self._inputs(batches), target=target, losses=losses, return_outputs=False, **_joined(batches))
        if not self.is_last:
            return torch.zeros((), dtype=self.wide, device=self.device)
        return torch.stack([loss.detach() for loss in losses]).sum()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Forward passes alone, any number of them: the last stage's outputs added up, [terms]; 0 elsewhere."""
        schedule = self._schedule(_Key(_shapes(batches), len(batches), training=False))
        outputs = schedule.step(*self._inputs(batches), **_joined(batches))
        if not self.is_last:
            return torch.zeros(self.terms, dtype=self.wide, device=self.device)
        return outputs.view(len(batches), self.terms).sum(0)

    def _inputs(self, batches: Sequence[Batch]) -> tuple[Tensor, ...]:
        return (torch.cat([batch["input_ids"] for batch in batches]),) if 0 in self.modules else ()

    def _schedule(self, key: _Key) -> Any:
        """The schedule for such a step, made at its first use: torch's are of one shape and number of micro-batches."""
        if key not in self._schedules:
            self._schedules[key] = self._build(key)
        return self._schedules[key]

    def _build(self, key: _Key) -> Any:
        placement = SCHEDULES[self.schedule].placement
        stages = [self._stage(index, key) for index in self.modules]
        return (_TRAINING[self.schedule] if key.training else _FORWARD[placement])(
            stages[0] if placement == "single" else stages,
            key.num_micro,
            loss_fn=_total if key.training else None,
            scale_grads=False,
        )

    def _stage(self, index: int, key: _Key) -> _Stage:
        """torch's description of a stage, with all shapes."""
        last, shapes = index == self.num_stages - 1, dict(key.shapes)
        between = torch.empty(
            tuple(self.activation(shapes)), dtype=self.dtype, device="meta", requires_grad=key.training
        )
        first = torch.empty(shapes["input_ids"], dtype=torch.int64, device="meta")
        loss = torch.empty(self.terms, dtype=self.wide, device="meta", requires_grad=key.training)
        return _Stage(
            self.modules[index],
            index,
            self.num_stages,
            self.device,
            input_args=between if index else first,
            output_args=loss if last else between,
            group=self.group,
        )


def _shapes(batches: Sequence[Batch]) -> tuple[tuple[str, torch.Size], ...]:
    """Those of every micro-batch; ValueError where they differ, since other shapes would hang the other ranks."""
    shapes = {tuple((name, x.shape) for name, x in sorted(batch.items())) for batch in batches}
    if len(shapes) == 1:
        return shapes.pop()
    for name in sorted(batches[0]):
        found = {tuple(batch[name].shape) if name in batch else None for batch in batches}
        if len(found) > 1:
            raise ValueError(f"a pipeline needs micro-batches of one shape, not {sorted(found, key=str)} ({name})")
    raise ValueError("a pipeline needs micro-batches of the same arrays")


def _joined(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """All micro-batches as one, which torch cuts again."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _total(output: Tensor, _target: Tensor) -> Tensor:
    """The loss of a micro-batch, from what the last stage gave: [terms] -> scalar."""
    return output.sum()


class _Stage(PipelineStage):
    """A stage that holds buffers for the micro-batches in flight alone, and sends contiguous tensors.

    torch's own keeps a receive buffer for every micro-batch of a step, both ways and for good, which takes away what
    1F1B saves. Backends copy memory, not elements: a gradient that is dense but transposed would arrive wrong.
    """

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        answer = super()._prepare_forward_infra(*args, **kwargs)
        for infos in self.args_recv_info.values():
            _release(infos)
        return answer

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        answer = super()._prepare_backward_infra(*args, **kwargs)
        for infos in self.grad_recv_info.values():
            _release(infos)
        return answer

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of an activation."""
        _allocate(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of a gradient."""
        if self.has_backward:
            _allocate(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output, ready to be sent."""
        return super().forward_maybe_with_nosync(*args, **kwargs).contiguous()

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of one micro-batch."""
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _release(self.args_recv_info[fwd_chunk_id])
        if not self.has_backward:
            outputs, _inputs = self.fwd_cache.pop(fwd_chunk_id)
            after = self.stage_index_to_group_rank.get(self.stage_index + 1)
            if after != self.group_rank:  # else it is handed over, not sent
                self.fwd_cache[fwd_chunk_id] = (outputs, [])
        return output

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Sends of an activation."""
        ops = super().get_fwd_send_ops(fwd_chunk_id)
        if not self.has_backward:
            del self.fwd_cache[fwd_chunk_id]
        return ops

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor | None, ...]:
        """The gradient for the stage before, on the same rank; none in an evaluation, where torch's own fails."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """Take the gradient of the stage after, on the same rank."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Backward of one micro-batch, whole or of its input alone."""
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if loss is not None:
            loss.detach_()  # the schedule keeps it, and through its graph the activation that it came from
        if self.has_backward:
            _release(self.grad_recv_info[bwd_chunk_id])
            grads = self.bwd_cache[bwd_chunk_id]
            self.bwd_cache[bwd_chunk_id] = tuple(g if g is None else g.contiguous() for g in grads)


def _allocate(infos: Sequence[Any], device: torch.device) -> None:
    for info in infos:
        if not info.is_root_arg and info.buffer is None:
            info.buffer = torch.empty(info.tensor_meta.shape, dtype=info.tensor_meta.dtype, device=device)


def _release(infos: Sequence[Any]) -> None:
    for info in infos:
        info.buffer = None


def build_tied_group(mesh: DeviceMesh, schedule: str, axis: str = "pipeline") -> dist.ProcessGroup | None:
    """The group of the two ranks that hold a weight which embedding and head share; None on all others.

    One for each place on the other axes. None as well where one rank has both stages (a V, or P = 1).
    """
    size, rank = mesh[axis].size(), mesh.get_local_rank(axis)
    if SCHEDULES[schedule].placement == "v" or size == 1 or rank not in (0, size - 1):
        return None
    if size == 2:
        return mesh.get_group(axis)
    members = dist.get_process_group_ranks(mesh.get_group(axis))
    return dist.new_group([members[0], members[-1]], use_local_synchronization=True)


def sum_tied(gradients: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Give all copies of a tied weight the sum of their gradients, in place; bit-equal on all.

    `gradients`: this rank's parts, plain tensors: of each copy that it holds, none on ranks without one; `group`: of
    the ranks that hold copies, None where it is one. Call it once a step, before the gradient norm, which must count
    one copy only.
    """
    if not gradients or not gradients[0].numel():
        return
    total, *others = gradients
    for other in others:
        total.add_(other)
    if group is not None:
        dist.all_reduce(total, group=group)
    for other in others:
        other.copy_(total)


def copy_tied(weights: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Bring all copies of a tied weight up to date with the first rank's first; arguments as of `sum_tied`."""
    if not weights or not weights[0].numel():
        return
    if group is not None:
        dist.broadcast(weights[0], group_src=0, group=group)
    for other in weights[1:]:
        other.copy_(weights[0])


def check_tied(weights: Sequence[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """The largest difference between this rank's parts of all copies, 0-dim float32; 0 where they are bit-equal.

    Arguments as of `sum_tied`. Ranks without a copy give 0, so that the largest over the world is that of the model.
    """
    if not weights or not weights[0].numel():
        return weights[0].new_zeros((), dtype=torch.float32) if weights else torch.zeros(())
    ends = torch.stack([torch.stack([weight, -weight]) for weight in weights]).amax(0)
    if group is not None:
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    return (ends[0] + ends[1]).amax().float()
