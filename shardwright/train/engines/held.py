"""What a DeepSpeed engine holds, by logical name: where every use of DeepSpeed's own bookkeeping stands.

Under deepspeed.py, which makes the engine. Most of it goes through DeepSpeed's safe_get_... and safe_set_... functions;
where those do not reach or fail, the reason stands at the place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwright.parallel.logical import norm_here
from shardwright.train.optim.state import build_adam_state, build_momentum_state


class Held:
    """Parameters, masters, moments and gradients inside of an engine, by logical name, whole.

    Everything whole is for a moment on every rank: each of these methods has to be called by all of them.
    """

    def __init__(
        self,
        engine: Any,
        base: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        shapes: Mapping[str, torch.Size],
        names: Sequence[Sequence[str]],
        states: Sequence[str],
    ) -> None:
        self.engine, self.base, self.parameters, self.shapes = engine, base, parameters, shapes
        self.stage: int = engine.zero_optimization_stage()
        self.names, self.states = names, states
        self.group_of = {name: index for index, group in enumerate(names) for name in group}

    @property
    def wrapper(self) -> Any:
        """DeepSpeed's own optimizer around `base`; `base` itself at ZeRO 0."""
        return self.engine.optimizer

    def shards(self, group: int) -> list[Tensor]:
        """What `base` updates, of one of its groups."""
        if self.stage == 3:
            flat, groups = self.wrapper.fp32_partitioned_groups_flat, self.wrapper.sub_group_to_group_id
            return [shard for index, shard in enumerate(flat) if groups[index] == group]
        return list(self.base.param_groups[group]["params"])

    def build_states(self, optimizer: str, momentum: float) -> None:
        """Make the optimizer's state, which torch would make at the first step, so that it can be saved and loaded."""
        if optimizer == "sgd" and not momentum:
            self.states = ()
            return
        build = build_momentum_state if optimizer == "sgd" else build_adam_state
        for group in range(len(self.names)):
            for shard in self.shards(group):
                self.base.state[shard] = build(shard)
        link = getattr(self.wrapper, "_lazy_init_hp_params_optimizer_state", None)
        if self.stage in (1, 2) and link is not None:
            link()

    def get(self, name: str, state: str | None = None) -> Tensor:
        """The float32 master, or a moment of it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.parameters[name]
        if self.stage == 0:
            return parameter.detach() if state is None else self.base.state[parameter][state]
        if state is None:
            return cast(Tensor, safe_get_full_fp32_param(parameter))
        return cast(Tensor, safe_get_full_optimizer_state(parameter, state))

    def set(self, name: str, value: Tensor, state: str | None = None) -> None:
        """Put `value` in the place of a master or moment; `publish` has to follow."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter = self.parameters[name]
        if self.stage == 0:
            self.get(name, state).copy_(value)
        elif self.stage == 3:
            self._set_part(parameter, value, state)
            if state is None:
                self._set_copy(parameter, value)
        elif state is not None:
            safe_set_full_optimizer_state(parameter, value, state)
        else:
            safe_set_full_fp32_param(parameter, value)

    def _set_part(self, parameter: nn.Parameter, value: Tensor, state: str | None) -> None:
        """As DeepSpeed's `set_full_hp_param`, which fails where the ranks do not divide a tensor (seen in 0.19.8).

        The part of the last rank is padded, and what lies behind the tensor stays as it is.
        """
        wrapper = self.wrapper
        part, group = wrapper._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=state
        )
        first = part.numel() * wrapper._get_param_partition_rank(parameter)
        own = value.flatten()[first : first + part.numel()]
        part.data[: own.numel()].copy_(own)
        if wrapper._swappable_optimizer_subgroup(group):
            wrapper._optimizer_states_and_gradient_swap_out(group)

    def _set_copy(self, parameter: nn.Parameter, value: Tensor) -> None:
        """The compute copy of a parameter that is sharded."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(value)

    def gradient(self, name: str) -> Tensor:
        """The gradient that the next step takes, before clipping."""
        from deepspeed.utils import safe_get_full_grad

        found = safe_get_full_grad(self.parameters[name])
        return torch.zeros(self.shapes[name], device=self.engine.device) if found is None else found

    def steps(self, name: str) -> Tensor | None:
        """The counter of finished steps that the shards of a name's group have; None where the optimizer has none."""
        shards = self.shards(self.group_of[name])
        return self.base.state[shards[0]].get("step") if shards else None

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the compute copies up to date with masters that were set; at ZeRO 3 `set` has done so."""
        if self.stage in (1, 2):
            self.wrapper.update_lp_params()

    def norm(self) -> Tensor:
        """The norm of all gradients as DeepSpeed computes it, to clip by it; infinite where it is not finite."""
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
        from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors

        wrapper = self.wrapper
        if self.stage == 0:
            grads = [p.grad for p in self.parameters.values() if p.grad is not None]
            return torch.stack([norm_here(grad) for grad in grads]).square().sum().sqrt()
        if isinstance(wrapper, BF16_Optimizer):
            return get_global_norm_of_tensors(wrapper.get_grads_for_norm()[0])
        if self.stage == 3:
            return combine_grad_norm_groups(wrapper._get_norm_groups())
        return wrapper.scaled_global_norm()
