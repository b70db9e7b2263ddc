"""Worker processes that do units in any order and hand results back in the units' order. Part of `prepare`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, Protocol

from shardwright.config import RunError


class Pool(Protocol):
    """Runs a function over argument tuples; results come in order, and only a few tasks are held at once."""

    def __call__(self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]: ...


@contextmanager
def build_pool(workers: int) -> Iterator[Pool]:
    """`workers` processes, or this one alone when it is 1. Processes are spawned: forking under threads deadlocks."""
    if workers == 1:
        yield lambda function, tasks: (function(*task) for task in tasks)
        return
    before = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield lambda function, tasks: _in_order(executor, 2 * workers + 2, function, tasks)
    except (BrokenProcessPool, BrokenPipeError):
        # Of a pool that broke while it started the executor forgets the others, and the exit would wait for them.
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise RunError(
            "a worker process of prepare died; is memory short (use fewer workers=), or does the calling script lack "
            "`if __name__ == '__main__':`? Run again to go on where it stopped"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def num_workers(asked: int) -> int:
    """Processes to use: as asked, or one for each core this process may use."""
    return asked or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else asked or os.cpu_count() or 1


def _in_order(
    executor: ProcessPoolExecutor, most: int, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]
) -> Iterator[Any]:
    """Results in the tasks' order; at most `most` tasks are under way, which bounds memory."""
    pending: deque[Future[Any]] = deque()
    for task in tasks:
        pending.append(executor.submit(function, *task))
        if len(pending) >= most:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, die with it, and keep libraries to one thread: the processes are the parallelism."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
