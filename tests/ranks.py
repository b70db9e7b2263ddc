"""A pool of real processes for tests of several ranks, started once: importing torch in 8 takes 17 s on 2 cores.

Each call of `run` is a job of its own: the first n processes get the launcher's variables (RANK, WORLD_SIZE, ...) with
a fresh rendezvous, call one function, and forget their process groups. A job that fails or hangs costs the pool, which
the next job starts again. Ask for the fixture `ranks`.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing as mp
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

SIZE = 8
GRACE_S = 15.0
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankError(AssertionError):
    """What a rank raised, with its own traceback."""


class Ranks:
    """Up to SIZE processes that wait for jobs."""

    def __init__(self) -> None:
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def run(self, n: int, function: str, *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call ``module:name`` with `args` on n ranks at once; what each returned, by rank.

        RankError where one raised, died or did not answer within `timeout` seconds.
        """
        self._start(n)
        port, deadline = free_port(), time.monotonic() + timeout
        workers = self._workers[:n]
        try:
            for rank, (_, pipe) in enumerate(workers):
                pipe.send((rank, n, port, function, args))
            answers = self._answers([pipe for _, pipe in workers], deadline)
        except BaseException:  # a test that is over its time, or stopped by hand: the next job is for other processes
            self.close()
            raise
        failed = [f"rank {rank} of {n}: {value}" for rank, (good, value) in enumerate(answers) if not good]
        if failed:
            self.close()
            raise RankError("\n".join(failed))
        return [value for _, value in answers]

    def _start(self, n: int) -> None:
        assert n <= SIZE, f"{n} ranks asked of a pool of {SIZE}"
        if self._workers and not all(process.is_alive() for process, _ in self._workers):
            self.close()
        context = mp.get_context("spawn")
        while len(self._workers) < n:
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))

    def _answers(self, pipes: list[Connection], deadline: float) -> list[tuple[bool, Any]]:
        """What each rank answers, by rank; once one has failed the others, which may wait for it, have GRACE_S left."""
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
        while waiting and (ready := wait(list(waiting), max(deadline - time.monotonic(), 0.1))):
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                answers[rank] = receive(pipe)  # type: ignore[arg-type]
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return [answers.get(rank, (False, "did not answer in time")) for rank in range(len(pipes))]

    def close(self) -> None:
        """End the processes; the next `run` starts new ones."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers = []


def receive(pipe: Connection) -> tuple[bool, Any]:
    """The answer that has come in; of a rank that is gone, that it died."""
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        return False, "died"


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(pipe: Connection) -> None:
    """A worker's life: jobs until the pipe closes."""
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
            pipe.send_bytes(pickle.dumps(answer(*job)))
        except (EOFError, OSError):  # the parent is gone
            return


def answer(rank: int, size: int, port: int, function: str, args: tuple[Any, ...]) -> tuple[bool, Any]:
    """Run one job; (True, result) or (False, traceback)."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    values = (rank, rank, size, size, "127.0.0.1", port)
    os.environ.update({name: str(value) for name, value in zip(VARIABLES, values, strict=True)})
    torch.manual_seed(0)
    try:
        module, _, name = function.partition(":")
        return True, getattr(importlib.import_module(module), name)(*args)
    except BaseException:
        return False, traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # DTensor remembers answers by how a mesh looks, with the groups of the mesh it first saw.
        _clear_sharding_prop_cache()
        gc.collect()  # a run is a ring of objects: until then its groups live on, whose threads wake 100 times a second
        gc.freeze()  # what is left is torch and its like, which the next job need not look through
        for name in VARIABLES:
            os.environ.pop(name, None)
        sys.stdout.flush()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """The pool of this test session."""
    pool = Ranks()
    yield pool
    pool.close()
