"""The processes that share a checkpoint, and the few small things that they must agree on.

Sits below saving and loading. One process needs no group; several use a gloo group of their own, because a save goes on
in the background while training uses its group (collectives of two threads in one group mix up). What travels is a
flag, one line of text or a few hashes a rank: never tensors, never manifests. A rank that does not answer is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from shardwright.checkpoint.integrity import CheckpointError, DamagedError, SaveError
from shardwright.config import ConfigError, RunError

TIMEOUT = timedelta(minutes=30)
TEXT_BYTES = 4096
# What may be raised, by its number on the wire; every rank must raise the same type, or they would part ways.
KINDS: tuple[type[Exception], ...] = (CheckpointError, DamagedError, SaveError, ValueError, ConfigError, RunError)
T = TypeVar("T")


class Ranks:
    """`rank` of `size` processes, alone when `group` is None."""

    def __init__(self, group: dist.ProcessGroup | None, *, owned: bool = False) -> None:
        self.group, self._owned = group, owned
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    def together(self, doing: str, work: Callable[[], T] | None) -> T | None:
        """Run `work` (None: nothing to do on this rank); if it failed on any rank, raise that failure on every rank.

        `doing` says what was tried, for the line that a rank that fails to answer gets.
        """
        result, failure = None, None
        try:
            result = work() if work is not None else None
        except Exception as error:
            failure = error
        first = self._first_failing(failure is not None, doing)
        if first is None:
            return result
        if self.group is None and failure is not None and not isinstance(failure, OSError):
            raise failure
        number, text = self._failure_of(first, failure)
        where = f"rank {first}: " if self.size > 1 else ""
        raise KINDS[number](where + text) from failure

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """A small int64 tensor of one shape from each rank: [...] -> [size, ...]."""
        if self.group is None:
            return values[None]
        found = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(found, values, group=self.group)
        return torch.stack(found)

    def union(self, mask: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum of an int32 mask over all ranks, in place."""
        if self.group is not None:
            dist.all_reduce(mask, op=dist.ReduceOp.MAX, group=self.group)
        return mask

    def share(self, text: str) -> str:
        """Rank 0's text (of any length), on every rank."""
        if self.group is None:
            return text
        data = text.encode()
        length = torch.tensor([len(data)], device="cpu")
        dist.broadcast(length, group=self.group, group_src=0)
        if not int(length):
            return ""
        buffer = torch.zeros(int(length), dtype=torch.uint8, device="cpu")
        if self.rank == 0:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, group=self.group, group_src=0)
        return buffer.numpy().tobytes().decode()

    def close(self) -> None:
        """Give back the group, if it was made here."""
        if self._owned and self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group, self._owned = None, False

    def _first_failing(self, failed: bool, doing: str) -> int | None:
        if self.group is None:
            return 0 if failed else None
        try:
            dist.monitored_barrier(self.group, timeout=TIMEOUT, wait_all_ranks=True)  # its error names silent ranks
            lowest = torch.tensor([self.rank if failed else self.size], device="cpu")
            dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=self.group)
        except RuntimeError as error:
            raise CheckpointError(f"{doing}: another rank does not answer ({_one_line(error)[:200]})") from error
        return int(lowest) if int(lowest) < self.size else None

    def _failure_of(self, rank: int, own: Exception | None) -> tuple[int, str]:
        """(number in KINDS, line) of the failure on `rank`."""
        number = KINDS.index(type(own)) if type(own) in KINDS else 0
        data = f"{number}{_one_line(own)}".encode() if own else b""
        if self.group is not None:
            buffer = torch.zeros(TEXT_BYTES, dtype=torch.uint8, device="cpu")
            if self.rank == rank:
                buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)[:TEXT_BYTES]
            dist.broadcast(buffer, group=self.group, group_src=rank)
            data = buffer.numpy().tobytes().rstrip(b"\0")
        text = data.decode(errors="replace")
        return int(text[0]), text[1:]


def build_ranks(group: dist.ProcessGroup | None = None, *, alone: bool = False) -> Ranks:
    """The processes of a checkpoint: `group`, or a new gloo group of the whole world, or this process alone.

    Making the group is a collective call: where torch.distributed runs, every rank has to come here.
    """
    if alone or not (dist.is_available() and dist.is_initialized()):
        return Ranks(None)
    if group is not None:
        return Ranks(group)
    return Ranks(dist.new_group(backend="gloo", timeout=TIMEOUT), owned=True)


@contextmanager
def open_ranks(group: dist.ProcessGroup | None = None, *, alone: bool = False) -> Iterator[Ranks]:
    """`build_ranks` for one call, given back at the end."""
    ranks = build_ranks(group, alone=alone)
    try:
        yield ranks
    finally:
        ranks.close()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    known = isinstance(error, CheckpointError | ValueError | RuntimeError)
    return text if known else f"{type(error).__name__}: {text}"
