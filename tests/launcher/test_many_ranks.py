"""16,384 ranks on 2,048 hosts, without sockets: what each launcher says, the mesh, the data and the folders agree."""

from __future__ import annotations

import math
import queue
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardwright.checkpoint.integrity import rank_path
from shardwright.config import ParallelConfig
from shardwright.data.order import Plan
from shardwright.launcher.attempt import Attempt, Job
from shardwright.launcher.hosts import Link, read_hosts
from shardwright.launcher.supervise import Supervisor
from shardwright.launcher.world import enter_world
from shardwright.parallel.mesh import AXES, World, build_world, mesh_shape
from shardwright.train.capsule import batch_path
from shardwright.train.watch import heartbeat_path

HOSTS, SLOTS = 2048, 8
RANKS = HOSTS * SLOTS
LAYOUT = ParallelConfig(pipeline=4, context=2, tensor=8, zero=2, shard=8)
SHAPE = (4, 32, 8, 2, 8)


def by_torchrun(host: int, local: int) -> dict[str, str]:
    return {
        "RANK": str(host * SLOTS + local), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(SLOTS), "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "1",
    }  # fmt: skip


def by_srun(host: int, local: int) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(host * SLOTS + local), "SLURM_NTASKS": str(RANKS), "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(host), "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77", "SLURM_NNODES": str(HOSTS),
        "SLURM_STEP_TASKS_PER_NODE": f"{SLOTS}(x{HOSTS})", "SLURM_JOB_NODELIST": f"gpu[0001-{HOSTS}]",
    }  # fmt: skip


def by_mpirun(host: int, local: int) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(host * SLOTS + local), "OMPI_COMM_WORLD_SIZE": str(RANKS),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local), "OMPI_COMM_WORLD_LOCAL_SIZE": str(SLOTS), "MASTER_ADDR": "10.0.0.1",
    }  # fmt: skip


@pytest.mark.parametrize("environment", [by_torchrun, by_srun, by_mpirun])
def test_every_rank_finds_its_place(environment, monkeypatch):
    monkeypatch.setattr("shardwright.launcher.world._address", lambda name: "10.0.0.1")  # no name is real here
    seen = set()
    for host in range(HOSTS):
        for local in range(SLOTS):
            variables = environment(host, local)
            assert enter_world(variables) is not None
            assert (int(variables["RANK"]), int(variables["LOCAL_RANK"])) == (host * SLOTS + local, local)
            assert int(variables["LOCAL_WORLD_SIZE"]) == SLOTS
            seen.add(tuple(variables[name] for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")))
    assert len(seen) == 1 and next(iter(seen))[0] == str(RANKS)


class Silent(Link):
    """A link to no host, which keeps its orders."""

    def send(self, **order: Any) -> None:
        self.__dict__.setdefault("orders", []).append(order)


def test_launch_numbers_the_hosts_that_are_left(tmp_path):
    """One host of 2,048 is lost, and with it a data-parallel copy of 8 hosts cannot be made: 7 are spares."""
    file = tmp_path / "hosts"
    file.write_text("".join(f"node{number} slots={SLOTS}\n" for number in range(HOSTS)))
    hosts = read_hosts(file)
    fixed = LAYOUT.pipeline * LAYOUT.context * LAYOUT.tensor
    job = Job(
        command=["shardwright", "train", "x"], hosts=hosts, min_hosts=HOSTS // 2, checkpoints=tmp_path,
        progress=tmp_path / "metrics.jsonl", fits=lambda size: None if size % fixed == 0 else f"{size} does not divide",
    )  # fmt: skip
    supervisor = Supervisor(job)
    links: list[Silent] = [Silent(host, queue.SimpleQueue(), []) for host in hosts]
    supervisor.links = {link.host.name: link for link in links}
    for link in links[1:]:
        link.hello = {}
    chosen = supervisor._choose()
    attempt = Attempt(chosen)
    supervisor._start(attempt, {"address": "10.0.0.2", "port": 4242})
    orders = [link.orders[-1]["start"] for link in links if "orders" in link.__dict__]  # type: ignore[attr-defined]
    assert attempt.size == RANKS - fixed and len(orders) == HOSTS - fixed // SLOTS
    assert [order["node"] for order in orders] == list(range(len(orders)))
    assert {(order["nodes"], order["master"], order["port"], order["processes"]) for order in orders} == {
        (len(orders), "10.0.0.2", 4242, SLOTS)
    }


@pytest.fixture
def as_rank():
    """Build the world of a rank over a fake process group; one at a time."""

    def build(rank: int) -> World:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
        return build_world("cpu", None, LAYOUT, {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": "0"})

    yield build
    if dist.is_initialized():
        dist.destroy_process_group()


def groups(world: World) -> dict[str, tuple[int, ...]]:
    """Ranks of each group that this rank communicates in."""
    assert world.mesh is not None
    found = {axis: world.mesh.get_group(axis) for axis in AXES}
    found["zero"] = world.sharding_mesh().get_group(world.sharding_mesh().mesh_dim_names[-1])  # type: ignore[index]
    return {name: tuple(dist.get_process_group_ranks(group)) for name, group in found.items()}


def test_every_view_of_the_mesh_is_the_same(as_rank):
    """Each rank's groups, as torch makes them, are those that the other members have; first and last of every group."""
    assert math.prod(SHAPE) == RANKS and mesh_shape(LAYOUT, RANKS) == SHAPE
    numbers = np.arange(RANKS).reshape(SHAPE)
    begin = time.monotonic()
    first = as_rank(5003)
    expected = groups(first)
    assert first.mesh is not None and (first.mesh.mesh.numpy() == numbers).all()
    assert {axis: len(expected[axis]) for axis in AXES} == dict(zip(AXES, SHAPE, strict=True))
    assert len(expected["zero"]) == 16  # shard x context
    for name, members in expected.items():
        for rank in {members[0], members[-1]} - {5003}:
            world = as_rank(rank)
            place = np.argwhere(numbers == rank)[0].tolist()
            assert [world.index(axis) for axis in AXES] == place
            assert groups(world)[name] == members, (name, rank)
    assert time.monotonic() - begin < 60


def test_tensor_ranks_share_a_host_and_every_group_is_a_partition():
    numbers = np.arange(RANKS).reshape(SHAPE)
    for axis in range(len(AXES)):
        rows = np.moveaxis(numbers, axis, -1).reshape(-1, SHAPE[axis])
        assert sorted(rows.ravel()) == list(range(RANKS))
    tensor = numbers.reshape(-1, SHAPE[-1])
    assert (tensor // SLOTS == tensor[:, :1] // SLOTS).all()


@pytest.mark.parametrize("batch", [RANKS, 1000])
def test_the_data_of_a_step_are_read_once(batch):
    size = SHAPE[1] * SHAPE[2]
    shares = [Plan(batch, 4, data_rank=rank, data_size=size).share(3 * batch, batch) for rank in range(size)]
    assert len({share.shape for share in shares}) == 1
    taken = np.concatenate([share.ravel() for share in shares])
    assert sorted(taken[taken >= 0]) == list(range(3 * batch, 4 * batch))


def test_no_folder_of_a_run_has_more_than_a_thousand_files(tmp_path):
    kinds = {
        "checkpoint": [rank_path(tmp_path, r, s) for r in range(RANKS) for s in (".json", ".safetensors")],
        "watch": [
            heartbeat_path(tmp_path, r, s) for r in range(RANKS) for s in (".json", ".new", ".late", ".nccl.json")
        ],
        "capsule": [batch_path(tmp_path, r) for r in range(RANKS)],
    }
    for kind, paths in kinds.items():
        files = Counter(path.parent for path in paths)
        folders = Counter(folder.parent for folder in files if folder != tmp_path)
        most = max((files + folders)[folder] for folder in {*files, *folders})
        assert most <= 990, kind  # and a few beside them
