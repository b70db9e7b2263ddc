"""The world of a process and its device."""

import pytest
import torch

from shardwright.config import ConfigError
from shardwright.parallel.mesh import build_world, choose_device


def test_one_process_is_the_degenerate_world():
    world = build_world("cpu", environment={})
    assert (world.rank, world.size, world.leads, world.device) == (0, 1, True, torch.device("cpu"))


def test_several_processes_are_refused_with_the_reason():
    with pytest.raises(ConfigError, match="WORLD_SIZE=2: this version trains in one process"):
        build_world("cpu", environment={"WORLD_SIZE": "2", "RANK": "1"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_said():
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="train.device=cuda"):
        choose_device("cuda")
