"""The world a process finds itself in: its rank, how many there are, and its device.

The one place where a device is chosen. One process is the degenerate case of every layout.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shardwright.config import ConfigError


@dataclass(frozen=True)
class World:
    """Where this process stands among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this rank writes logs."""
        return self.rank == 0


def build_world(
    device: str = "auto", threads: int | None = None, environment: Mapping[str, str] | None = None
) -> World:
    """The world as the launcher's variables tell it; ConfigError where it cannot be."""
    environment = os.environ if environment is None else environment
    size = int(environment.get("WORLD_SIZE", "1"))
    if size > 1:
        raise ConfigError(
            f"WORLD_SIZE={size}: this version trains in one process; start it without a launcher, "
            "or with one process (--nproc-per-node 1)"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    keep_host_memory()
    return World(rank=0, size=1, device=choose_device(device))


def choose_device(wanted: str = "auto") -> torch.device:
    """The device of this process: a GPU where one is present, else the CPU."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda: this torch sees no GPU; use train.device=auto or cpu")
    return torch.device(wanted, 0) if wanted == "cuda" else torch.device(wanted)


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
