"""Jobs of test_logical.py and test_optim_spread.py: what one of several gloo ranks does.

Tensors are spread as training spreads them: the tensor plan's cut first, then `fully_shard` over (replicate, shard).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from shardwright import checkpoint
from shardwright.config import OptimizerConfig
from shardwright.parallel.logical import Logical, Share, mean_all, norm_all, sum_all
from shardwright.train.optim import build_optimizer, load_state_tensors, set_factor, state_tensors
from shardwright.train.optim.spread import Dealing, deal

AXES = ("replicate", "shard", "tensor")
# Sizes along AXES. Every kind of cut: even, uneven, empty, by rows, by columns, twice by rows, shared.
LAYOUTS = {
    "shard 2": (1, 2, 1),
    "replicate 2": (2, 1, 1),
    "tensor 2": (1, 1, 2),
    "shard 4": (1, 4, 1),
    "replicate 2 x shard 2": (2, 2, 1),
    "shard 2 x tensor 2": (1, 2, 2),
    "replicate 2 x tensor 2": (2, 1, 2),
    # Here torch 2.13 misreads its own strided shards of 13 rows.
    "shard 3 x tensor 2": (1, 3, 2),
}
SHAPES = {
    "embed.tokens.weight": (19, 8),
    "embed.positions.weight": (7, 8),
    "blocks.0.attention_norm.weight": (8,),
    "blocks.0.attention.q.weight": (8, 8),
    "blocks.0.attention.q.bias": (8,),
    "blocks.0.attention.k.weight": (5, 8),
    "blocks.0.attention.v.weight": (1, 8),
    "blocks.0.attention.out.weight": (8, 8),
    "blocks.0.mlp.up.weight": (13, 8),
    "blocks.0.mlp.up.bias": (13,),
    "blocks.0.mlp.down.weight": (8, 13),
    "blocks.0.mlp.down.bias": (1,),
    "blocks.1.attention.q.weight": (8, 8),
    "blocks.1.attention.k.weight": (8, 8),
    "blocks.1.mlp.up.weight": (13, 8),
    "blocks.1.mlp.down.weight": (3, 13),
    "blocks.1.experts.weight": (3, 5, 8),
    "head.weight": (19, 8),
}
PLAN: dict[str, Placement] = {"tokens": Shard(0), "q": Shard(0), "k": Shard(0), "v": Shard(0), "up": Shard(0)}
PLAN |= {"head": Shard(0), "out": Shard(1), "down": Shard(1), "experts": Shard(1)}
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw"},
    "adam": {"name": "adam"},
    "sgd": {"name": "sgd"},
    "adafactor": {"name": "adafactor", "lr": 0.02},
    "adafactor relative": {"name": "adafactor", "relative_step": True},
    "lamb": {"name": "lamb"},
    "muon": {"name": "muon"},
    "muon plain": {"name": "muon", "nesterov": False, "matrix_lr": 0.02},
}
STEPS, SKIPPED = 5, 2


# ------------------------------------------------------------------------------------------ what all jobs share


def make_weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Whole tensors of SHAPES."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) * 0.1 for name, shape in SHAPES.items()}


def join(layout: str) -> DeviceMesh:
    """Meet the other ranks."""
    dist.init_process_group("gloo")
    return init_device_mesh("cpu", LAYOUTS[layout], mesh_dim_names=AXES)


def spread(whole: Mapping[str, Tensor], mesh: DeviceMesh) -> dict[str, DTensor]:
    """The tensors as parameters that FSDP2 manages."""
    module = nn.Module()
    for name, tensor in whole.items():
        parameter = tensor.clone()
        if mesh["tensor"].size() > 1:
            role = name.split(".")[0] if name.startswith("head") else name.split(".")[-2]
            place = PLAN.get(role, Replicate())
            place = Replicate() if tensor.ndim == 1 and place == Shard(1) else place
            parameter = distribute_tensor(parameter, mesh["tensor"], [place])
        module.register_parameter(name.replace(".", "/"), nn.Parameter(parameter))
    fully_shard(module, mesh=mesh["replicate", "shard"])
    found = {name.replace("/", "."): parameter for name, parameter in module.named_parameters()}
    assert all(isinstance(parameter, DTensor) for parameter in found.values())
    return found  # type: ignore[return-value]


def build(
    whole: Mapping[str, Tensor], mesh: DeviceMesh, options: Mapping[str, Any], matmul: torch.dtype = torch.float32
) -> tuple[torch.optim.Optimizer, dict[str, Logical]]:
    """An optimizer over this rank's parts."""
    logical = {name: Logical.of(parameter) for name, parameter in spread(whole, mesh).items()}
    parts = [(name, one.local) for name, one in logical.items()]
    config = OptimizerConfig(**{"lr": 0.01, **options})
    return build_optimizer(config, parts, logical=logical, matmul_dtype=matmul), logical


def take_steps(optimizer: torch.optim.Optimizer, logical: Mapping[str, Logical], steps: Iterable[int]) -> None:
    """Steps with gradients that are functions of the step; one of them overflows."""
    for step in steps:
        gradients = make_weights(100 + step, next(iter(logical.values())).local.dtype)
        for name, one in logical.items():
            one.local.grad = one.part(gradients[name] * 10).clone()
            if step == SKIPPED:
                one.local.grad.fill_(float("nan"))
        optimizer.found_inf = torch.tensor(float(step == SKIPPED))  # type: ignore[attr-defined]
        set_factor(optimizer, 1.0 / (1 + step))
        optimizer.step()


def alone(options: Mapping[str, Any], steps: Iterable[int], matmul: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights that one process ends with."""
    logical = {name: Logical.whole(tensor) for name, tensor in make_weights().items()}
    config = OptimizerConfig(**{"lr": 0.01, **options})
    named = [(name, one.local) for name, one in logical.items()]
    take_steps(build_optimizer(config, named, matmul_dtype=matmul), logical, steps)
    return {name: one.local for name, one in logical.items()}


def digest(tensor: Tensor) -> str:
    """Equal just where the bits are."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


# ------------------------------------------------------------------------------------------ logical tensors


def geometry(layout: str) -> list[int]:
    """Where parts lie, over all of SHAPES; the copies of each."""
    mesh, whole = join(layout), make_weights()
    copies = []
    for name, parameter in spread(whole, mesh).items():
        logical = Logical.of(parameter)
        assert logical.shape == SHAPES[name] and not isinstance(logical.local, DTensor)
        check_part(logical, whole[name])
        logical.local.fill_(3.0)
        with torch.no_grad():
            assert (parameter.to_local() == 3).all(), "shares the parameter's memory"
        check_sums(logical, whole[name])
        check_wrapped(logical, whole[name])
        copies.append(logical.copies)
    return copies


def check_part(logical: Logical, whole: Tensor) -> None:
    part, (offsets, sizes) = logical.part(whole), logical.box()
    assert torch.equal(part, logical.local), (part.shape, logical.local.shape)
    assert torch.equal(whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))], logical.local)
    assert torch.equal(logical.gather(logical.local), whole)
    assert torch.equal(logical.gather(logical.local.double()), whole.double())


def check_sums(logical: Logical, whole: Tensor) -> None:
    part = logical.part(whole)
    torch.testing.assert_close(logical.sum(part.sum()), whole.sum())
    (norm,) = norm_all([(logical, part)])
    torch.testing.assert_close(norm, whole.norm())
    if whole.ndim == 2:
        row, column = logical.keep(part.sum(dim=1), [0]), logical.keep(part.sum(dim=0), [1])
        torch.testing.assert_close(logical.sum(row.local, [1]), row.part(whole.sum(dim=1)))
        torch.testing.assert_close(logical.sum(column.local, [-2]), column.part(whole.sum(dim=0)))
        rows, columns = mean_all([(logical, part, -1), (logical, part, -2)])
        torch.testing.assert_close(row.gather(rows), whole.mean(dim=1))
        torch.testing.assert_close(column.gather(columns), whole.mean(dim=0))
    value = part.sum()
    before = value.clone()
    sum_all([Share(logical, value)])
    assert torch.equal(value, before), "what was given is left as it was"


def check_wrapped(logical: Logical, whole: Tensor) -> None:
    own = torch.zeros_like(logical.local)
    wrapped = logical.wrap(own)
    assert isinstance(wrapped, DTensor) and wrapped.shape == whole.shape
    own.copy_(logical.part(whole))
    assert torch.equal(wrapped.full_tensor(), whole)
    (chunk,) = wrapped.__create_chunk_list__()
    if own.numel():  # an empty part lies nowhere in particular
        assert (tuple(chunk.offsets), tuple(chunk.sizes)) == logical.box()
    if whole.ndim == 2:
        for dims, mean in (([0], whole.mean(dim=1)), ([1], whole.mean(dim=0))):
            local = logical.keep(own[:, 0] if dims == [0] else own[0:1, :].sum(dim=0), dims).part(mean).clone()
            statistic = logical.wrap(local, dims)
            assert isinstance(statistic, DTensor) and torch.equal(statistic.full_tensor(), mean)


def other_placements() -> None:
    """What `distribute_tensor` makes on two axes, and what has no parts."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    for shape in ((8, 8), (7, 5), (3, 2), (5,)):
        whole = torch.randn(shape)
        dist.broadcast(whole, 0)
        kinds: list[list[Placement]] = [[Shard(0), Shard(0)], [Replicate(), Shard(0)], [Replicate(), Replicate()]]
        kinds += [[Shard(0), Shard(1)], [Shard(1), Shard(0)], [Shard(1), Replicate()]] if len(shape) == 2 else []
        for placements in kinds:
            check_part(Logical.of(distribute_tensor(whole, mesh, placements)), whole)
    two, seven = torch.ones(2), torch.Size([7])
    for bad, said in [
        (DTensor.from_local(two, mesh, [Partial(), Replicate()]), "partial sums"),
        (DTensor.from_local(two, mesh, [Shard(0), Replicate()], shape=seven, stride=(1,)), "leaves"),
    ]:
        try:
            Logical.of(bad)
        except ValueError as error:
            assert said in str(error), error
        else:
            raise AssertionError(f"{said}: was not refused")


def coalesced(layout: str) -> tuple[int, int]:
    """(all-reduces, broadcasts) of the norms of all tensors at once."""
    mesh, counts = join(layout), {"all_reduce": 0, "broadcast": 0}
    logical = [Logical.of(parameter) for parameter in spread(make_weights(), mesh).values()]
    for name in counts:
        setattr(dist, name, counted(name, getattr(dist, name), counts))
    try:
        norm_all([(one, one.local) for one in logical])
    finally:
        for name in counts:
            setattr(dist, name, getattr(dist, name).__wrapped__)
    return counts["all_reduce"], counts["broadcast"]


def counted(name: str, function: Any, counts: dict[str, int]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    call.__wrapped__ = function  # type: ignore[attr-defined]
    return call


# ------------------------------------------------------------------------------------------ optimizers


def train(layout: str, matmul: str = "float32") -> dict[str, dict[str, tuple[Tensor, Any, str]]]:
    """By optimizer and weight after STEPS: the whole one, this rank's box of it, the bits of the part."""
    mesh, results = join(layout), {}
    for label, options in OPTIONS.items():
        optimizer, logical = build(make_weights(), mesh, options, getattr(torch, matmul))
        take_steps(optimizer, logical, range(STEPS))
        results[label] = {n: (one.gather(one.local), one.box(), digest(one.local)) for n, one in logical.items()}
    return results


def dealt(layout: str, most: int) -> list[list[str]]:
    """The matrices of this rank's hands, by dealing; each comes whole, and its parts go home."""
    mesh, whole = join(layout), make_weights()
    named = [(n, Logical.of(p)) for n, p in spread(whole, mesh).items() if len(SHAPES[n]) == 2]
    names, logical = [n for n, _ in named], [one for _, one in named]
    hands = []
    for indices, dealing in deal(logical, most):
        assert isinstance(dealing, Dealing)
        parts = {i: logical[indices[i]].local for i in dealing.needed}
        wholes = dealing.collect(parts, torch.float32)
        assert [*wholes] == dealing.hand
        for i, tensor in wholes.items():
            assert torch.equal(tensor, whole[names[indices[i]]])
        back = dealing.scatter({i: tensor * 2 for i, tensor in wholes.items()}, torch.float32)
        for i, n in enumerate(indices):
            assert torch.equal(back[i], logical[n].local * 2), names[n]
        hands.append([names[indices[i]] for i in dealing.hand])
    return hands


def save_run(layout: str, folder: Path) -> None:
    """Three steps of every optimizer, saved."""
    mesh = join(layout)
    for label, options in OPTIONS.items():
        optimizer, logical = build(make_weights(), mesh, options)
        take_steps(optimizer, logical, range(3))
        checkpoint.save(folder / label, tensors_of(optimizer, logical), {}, step=3)


def resume_run(layout: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Go on from what `save_run` left, under another layout."""
    mesh, results = join(layout), {}
    for label, options in OPTIONS.items():
        optimizer, logical = build(make_weights(seed=9), mesh, options)
        take_steps(optimizer, logical, range(1))  # so that nothing it needs is zero by luck
        checkpoint.load(folder / label / "step_00000003", tensors_of(optimizer, logical))
        take_steps(optimizer, logical, range(3, STEPS))
        results[label] = {name: one.gather(one.local) for name, one in logical.items()}
    return results


def tensors_of(optimizer: torch.optim.Optimizer, logical: Mapping[str, Logical]) -> dict[str, Tensor]:
    """What a checkpoint holds."""
    weights = {f"model.{name}": one.wrap(one.local) for name, one in logical.items()}
    return weights | {f"optimizer.{name}": tensor for name, tensor in state_tensors(optimizer).items()}


def load_states(layout: str) -> None:
    """`load_state_tensors` takes whole tensors, its own DTensors, and refuses what does not fit."""
    mesh = join(layout)
    for options in OPTIONS.values():
        optimizer, logical = build(make_weights(), mesh, options)
        take_steps(optimizer, logical, range(2))
        states = state_tensors(optimizer)
        assert all(isinstance(t, DTensor) != key.startswith("step.") for key, t in states.items())
        whole = {key: t.full_tensor().clone() if isinstance(t, DTensor) else t.clone() for key, t in states.items()}
        copies = {key: t.detach().clone() for key, t in states.items()}
        for given in (whole, copies):
            other, _ = build(make_weights(seed=9), mesh, options)
            load_state_tensors(other, given)
            for key, tensor in state_tensors(other).items():
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                assert torch.equal(full, whole[key]), key
        key = next(key for key in whole if not key.startswith("step."))
        try:
            load_state_tensors(optimizer, whole | {key: torch.zeros(3, 3)})
        except ValueError as error:
            assert key in str(error), error
        else:
            raise AssertionError("another shape was not refused")
