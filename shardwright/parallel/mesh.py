"""The world a process finds itself in: its rank, its device, and the mesh of all ranks by axis.

The one place where a device is chosen and process groups are made. One process is the degenerate case of every
layout: all degrees 1, no group, no communication.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardwright.config import ConfigError, ParallelConfig, RunError, parse_duration

# Outermost first: neighbours in rank talk most. An axis `expert` has its place between shard and context.
AXES = ("pipeline", "replicate", "shard", "context", "tensor")
SAME_TOKENS = ("pipeline", "tensor")  # axes whose ranks read the same tokens
SAME_LOSS = ("tensor",)  # axes whose ranks all have the loss of their tokens, where a pipeline's last alone has it


@dataclass(frozen=True)
class World:
    """Where this process stands among all."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    mesh: DeviceMesh | None = None  # every one of AXES, also of size 1; None in one process

    @property
    def leads(self) -> bool:
        """Whether this rank writes logs."""
        return self.rank == 0

    def degree(self, axis: str) -> int:
        """Ranks along an axis; `data` is replicate x shard."""
        if axis == "data":
            return self.degree("replicate") * self.degree("shard")
        return 1 if self.mesh is None else self.mesh.shape[AXES.index(axis)]

    def index(self, axis: str) -> int:
        """This rank's place on an axis."""
        if axis == "data":
            return self.index("replicate") * self.degree("shard") + self.index("shard")
        place = None if self.mesh is None else self.mesh.get_coordinate()
        return 0 if place is None else place[AXES.index(axis)]

    @property
    def token_copies(self) -> int:
        """How often a sum over all ranks counts each token."""
        return math.prod(map(self.degree, SAME_TOKENS))

    @property
    def loss_copies(self) -> int:
        """How often a sum over all ranks counts the loss of each token."""
        return math.prod(map(self.degree, SAME_LOSS))

    def describe(self, settings: ParallelConfig | None = None) -> str:
        """The degrees in words, `data 2 x tensor 2` or `one process`, and those of the settings that matter to them."""
        degrees = [(axis, self.degree(axis)) for axis in ("data", "pipeline", "context", "tensor")]
        words = [" x ".join(f"{axis} {degree}" for axis, degree in degrees if degree > 1) or "one process"]
        if settings is not None and self.degree("data") * self.degree("context") > 1:
            words.append(f"ZeRO {settings.zero}")
        if settings is not None and self.degree("pipeline") > 1:
            words.append(settings.schedule)
        if settings is not None and self.degree("tensor") > 1 and not settings.sequence:
            words.append("no sequence parallelism")
        return ", ".join(words)

    def sharding_mesh(self) -> DeviceMesh:
        """What parameters are replicated and sharded over: (replicate, shard x context), or the latter alone."""
        assert self.mesh is not None
        if self.degree("context") == 1:
            return self.mesh["replicate", "shard"]
        spread = self.mesh["shard", "context"]._flatten("spread")
        return spread if self.degree("replicate") == 1 else DeviceMesh._concatenate([self.mesh["replicate"], spread])

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a small tensor over all ranks, on the device, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def share(self, value: float) -> float:
        """Rank 0's number, on the host of every rank."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device="cpu")
        dist.broadcast(shared, src=0)
        return float(shared)

    def first(self, place: int, text: str) -> str:
        """The text of the rank with the smallest `place`, on every rank; at most 500 bytes of it."""
        if self.size == 1:
            return text
        least = torch.tensor([place * self.size + self.rank], device="cpu")
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        buffer = torch.zeros(500, dtype=torch.uint8, device="cpu")
        data = text.encode()[:500]
        buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(buffer, src=int(least) % self.size)
        return bytes(buffer.tolist()).rstrip(b"\0").decode(errors="replace")

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank, decided on the hosts."""
        if self.size == 1:
            return flag
        found = torch.tensor([int(flag)], device="cpu")
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)


def world_size(environment: Mapping[str, str] | None = None) -> int:
    """Processes of the run, as the launcher's variables tell."""
    return _number(os.environ if environment is None else environment, "WORLD_SIZE", 1)


def build_world(
    device: str = "auto",
    threads: int | None = None,
    parallel: ParallelConfig | None = None,
    environment: Mapping[str, str] | None = None,
) -> World:
    """The world as the launcher's variables tell it, laid out as `parallel` says; ConfigError where it cannot be."""
    environment = os.environ if environment is None else environment
    size = world_size(environment)
    parallel = parallel or ParallelConfig()
    shape = mesh_shape(parallel, size)
    if threads is not None:
        torch.set_num_threads(threads)
    keep_host_memory()
    chosen = choose_device(device, _number(environment, "LOCAL_RANK", 0))
    if size == 1:
        return World(0, 1, chosen)
    rank = _number(environment, "RANK", None)
    _join(rank, size, chosen, parallel)
    return World(rank, size, chosen, init_device_mesh(chosen.type, shape, mesh_dim_names=AXES))


@contextmanager
def join_world(device: str, threads: int | None, parallel: ParallelConfig) -> Iterator[World]:
    """`build_world` for the length of a run; the process groups made for it are given back."""
    before = dist.is_initialized()
    world = build_world(device, threads, parallel)
    try:
        yield world
    finally:
        if not before and dist.is_initialized():  # one process has a group too where an engine made it
            dist.destroy_process_group()
            _forget_meshes()


def _forget_meshes() -> None:
    """Drop DTensor's answers: remembered by how a mesh looks, with the groups of the mesh that it was first."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache  # 0.4 s to import, inductor with it

    _clear_sharding_prop_cache()


def fixed_degrees(parallel: ParallelConfig) -> int:
    """Ranks of one data-parallel copy: all degrees but that of the data, which is what is left of the world."""
    return parallel.tensor * parallel.context * parallel.pipeline


def mesh_shape(parallel: ParallelConfig, size: int) -> tuple[int, ...]:
    """Degrees along AXES in a world of `size` ranks; ConfigError where they do not multiply to it."""
    fixed = fixed_degrees(parallel)
    data = parallel.data or max(size // fixed, 1)
    if data * fixed != size:
        raise ConfigError(
            f"parallel: data={parallel.data or 'what is left'} x pipeline={parallel.pipeline} x "
            f"context={parallel.context} x tensor={parallel.tensor} does not make the world of {size} "
            f"process{'es' if size > 1 else ''}; start {data * fixed} or change a degree"
        )
    shard = 1 if parallel.zero == 0 else parallel.shard or data
    if data % shard:
        raise ConfigError(f"parallel.shard={shard}: does not divide the {data} data ranks")
    return (parallel.pipeline, data // shard, shard, parallel.context, parallel.tensor)


def _number(environment: Mapping[str, str], name: str, default: int | None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(
            f"{name}={text}: several processes need the launcher's RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; "
            "start them with torchrun"
        ) from None


def _join(rank: int, size: int, device: torch.device, parallel: ParallelConfig) -> None:
    """Meet the other ranks. On GPUs host values still travel by gloo."""
    if dist.is_initialized():
        return
    timeout = timedelta(seconds=parse_duration(parallel.timeout))
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl", rank=rank, world_size=size, timeout=timeout, device_id=device)
        else:
            dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:  # of the store, of sockets, of a rank that left
        where, text = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}", str(error).splitlines()[0]
        remedy = "start all of them within parallel.timeout, where each can reach that address"
        if "EADDRINUSE" in text:
            remedy = "another program has that port: set MASTER_PORT to a free one"
        raise RunError(f"rank {rank} of {size} did not meet the others at {where}: {text}; {remedy}") from error


def choose_device(wanted: str = "auto", local_rank: int = 0) -> torch.device:
    """The device of this process: the GPU of its place on this host where there is one, else the CPU."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted != "cuda":
        return torch.device(wanted)
    if not torch.cuda.is_available():
        raise ConfigError("train.device=cuda: this torch sees no GPU; use train.device=auto or cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK={local_rank}: this host has {torch.cuda.device_count()} GPUs; start one process for each"
        )
    return torch.device("cuda", local_rank)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_SPARE_BYTES = 64 << 20


def keep_host_memory() -> bool:
    """Have glibc keep freed memory instead of giving it back after every large tensor; False where it is not glibc.

    Fresh pages cost more than the products written into them: a 4096 x 512 x 8192 bf16 product ran at 629
    GFLOP/s into fresh memory and at 2,650 into kept memory. The process then stays at its largest size.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, _SPARE_BYTES))
    return all(mallopt(option, value) == 1 for option, value in wanted)
