"""The world of a process and its device."""

import pytest
import torch

from shardwright.config import ConfigError, ParallelConfig
from shardwright.parallel.mesh import build_world, choose_device, mesh_shape
from tests.ranks import free_port


def test_one_process_is_the_degenerate_world():
    world = build_world("cpu", environment={})
    assert (world.rank, world.size, world.leads, world.device) == (0, 1, True, torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "size", "shape"),
    [
        ({}, 4, (1, 1, 4, 1, 1)),
        ({"zero": 0}, 4, (1, 4, 1, 1, 1)),
        ({"shard": 2, "tensor": 2}, 8, (1, 2, 2, 1, 2)),
        ({"pipeline": 2, "context": 2, "tensor": 2}, 8, (2, 1, 1, 2, 2)),
    ],
)
def test_degrees_become_a_mesh(settings, size, shape):
    assert mesh_shape(ParallelConfig(**settings), size) == shape


def test_degrees_that_do_not_make_the_world_are_said():
    with pytest.raises(ConfigError, match="tensor=2 does not make the world of 1 process; start 2 or change a degree"):
        build_world("cpu", parallel=ParallelConfig(tensor=2), environment={})
    with pytest.raises(ConfigError, match="RANK=None: several processes need the launcher's"):
        build_world("cpu", environment={"WORLD_SIZE": "2"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_said():
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="train.device=cuda"):
        choose_device("cuda")


def test_a_second_run_in_one_process_uses_its_own_groups(ranks):
    ports = [free_port(), free_port()]
    assert ranks.run(2, "tests.parallel.work_mesh:two_worlds", ports) == [[True, True]] * 2
