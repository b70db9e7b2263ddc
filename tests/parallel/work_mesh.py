"""What the ranks of test_mesh.py do."""

import os

import torch
from torch.distributed.tensor import DTensor, Shard

from shardwright.config import ParallelConfig
from shardwright.parallel.mesh import join_world


def two_worlds(ports: list[int]) -> list[bool]:
    """One run after the other in one process: whether results lie on the mesh of their own run."""
    found = []
    for port in ports:
        os.environ["MASTER_PORT"] = str(port)
        with join_world("cpu", 1, ParallelConfig(tensor=2, timeout="60s")) as world:
            assert world.mesh is not None
            x = DTensor.from_local(torch.ones(4), world.mesh["tensor"], [Shard(0)], run_check=False)
            found.append((x + x).device_mesh is x.device_mesh)
    return found
