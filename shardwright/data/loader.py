"""From a stream and a plan to step batches on the device: in line, on a prefetch thread, or by worker processes.

Top of the room; `train` calls `start(step, drawn)` and then `next`. The consumer's count is the only state: what was
read ahead and never taken is forgotten, and who reads ahead changes nothing but time.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from shardwright.config import ConfigError
from shardwright.data.buffers import BufferPool
from shardwright.data.order import Plan
from shardwright.data.workers import WorkerPool
from shardwright.objective.raw import Arrays, Empty

# Tokens corrupted at a time: enough to spread numpy's cost for each call, little enough to stay in a core's cache.
_BLOCK_TOKENS = 65536
# Numbers whose order is worked out at a time, over as many steps as they fill.
_ORDER_SEQUENCES = 1024
# Tokens that a worker sends at a time, over as many steps as they fill.
_SENT_TOKENS = 65536
_CLOSE_WAIT_S = 5.0
MicroBatch = dict[str, Tensor]


class Corrupts(Protocol):
    """What makes a batch of sequences, as an objective does: arrays whose first axis is the sequences'."""

    @property
    def neighbours(self) -> bool: ...
    def corrupt(self, raw: Any, empty: Empty) -> Arrays: ...


class SequenceReader(Protocol):
    """What the readers of sequences and those of examples have in common."""

    @property
    def num_sequences(self) -> int | None: ...
    @property
    def raw_length(self) -> int: ...
    def neighbours(self, numbers: np.ndarray) -> np.ndarray: ...
    def batches(self, numbers: np.ndarray, size: int) -> Iterator[Any]: ...


@dataclass(frozen=True)
class StepBatch:
    """What one rank gets for one step."""

    step: int
    drawn: int  # sequences drawn before this step
    count: int  # sequences of this step over all ranks; drawn + count is the state after it
    first: int  # smallest and largest sequence number of the step, over all ranks
    last: int
    micro_batches: list[MicroBatch]


class _Task(NamedTuple):
    """One step's worth of reading, as sent to a worker: all it needs, so that workers hold no state."""

    step: int
    drawn: int
    taken: int  # StepBatch.count, a name that tuples have taken
    first: int
    last: int
    share: np.ndarray  # int64 [micro-batches, micro_batch]


#: A step's task and its micro-batches, on the host.
_Read = tuple[_Task, list[MicroBatch]]


class Reader:
    """Turns tasks into blocks of arrays. Picklable: a worker process holds one of its own."""

    def __init__(self, stream: SequenceReader, objective: Corrupts) -> None:
        self.stream, self.objective, self._buffers = stream, objective, BufferPool()

    def __call__(self, tasks: list[_Task]) -> Iterator[Arrays]:
        """The micro-batches of all tasks, one after the other, some whole number of them a block."""
        micro = tasks[0].share.shape[1]
        size = micro * max(1, _BLOCK_TOKENS // (self.stream.raw_length * micro))
        numbers = np.concatenate([task.share for task in tasks]).reshape(-1)
        for raw in self._given(numbers, size):
            yield self.objective.corrupt(raw, self._buffers.empty)

    def _given(self, numbers: np.ndarray, size: int) -> Iterator[Any]:
        """`size` rows at a time, and after them as many neighbours where the objective wants these."""
        if not self.objective.neighbours:
            return self.stream.batches(numbers, size)
        parts = (numbers[first : first + size] for first in range(0, len(numbers), size))
        both = [rows for part in parts for rows in (part, self.stream.neighbours(part))]
        return self.stream.batches(np.concatenate(both), 2 * size)


def _steps(tasks: list[_Task], blocks: Iterable[Arrays]) -> Iterator[_Read]:
    """Each task with its micro-batches, which are views of the blocks."""
    micro_batches = (micro for block in blocks for micro in _cut(block, tasks[0].share.shape[1]))
    for task in tasks:
        yield task, list(itertools.islice(micro_batches, len(task.share)))


def _cut(block: Arrays, size: int) -> Iterator[MicroBatch]:
    parts = [torch.from_numpy(array).unflatten(0, (-1, size)).unbind() for array in block.values()]
    return (dict(zip(block, tensors, strict=True)) for tensors in zip(*parts, strict=True))


class Loader:
    """Step batches of one rank, from any point on. Iterate after `start`; use as a context manager or `close` it.

    `workers`: 0 reads in line, "thread" on one thread, n > 0 in n processes. `prefetch`: steps read ahead.
    """

    def __init__(
        self,
        stream: SequenceReader,
        plan: Plan,
        objective: Corrupts,
        *,
        workers: int | Literal["thread"] = 0,
        prefetch: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        if workers != "thread" and not (type(workers) is int and workers >= 0):
            raise ConfigError(f"data.workers={workers!r}: give a number of processes, 0 or 'thread'")
        self.stream, self.plan = stream, plan
        self.device = torch.device(device)
        self._objective, self._workers, self._prefetch = objective, workers, max(1, prefetch)
        self._pool: WorkerPool | None = None
        self._steps: Generator[_Read, None, None] | _Prefetched | None = None

    def start(self, step: int = 0, drawn: int = 0, plan: Plan | None = None) -> Loader:
        """Go to the step that comes after `drawn` sequences: a seek, whatever was read before."""
        self._stop()
        self.plan = plan or self.plan
        tasks = _tasks(self.stream, self.plan, step, drawn)
        if self._workers == 0:
            self._steps = self._read(tasks)
        elif self._workers == "thread":
            self._steps = _Prefetched(self._read(tasks), self._prefetch)
        else:
            self._pool = self._pool or WorkerPool(Reader(self.stream, self._objective), int(self._workers))
            self._steps = _Prefetched(self._receive(self._pool, tasks), self._prefetch)
        return self

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers; empty without processes."""
        return self._pool.pids if self._pool else []

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepBatch:
        if self._steps is None:
            self.start()
        assert self._steps is not None
        task, parts = next(self._steps)
        micro_batches = [to_device(part, self.device) for part in parts]
        return StepBatch(task.step, task.drawn, task.taken, task.first, task.last, micro_batches)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and the processes."""
        if self._pool is not None:
            self._pool.kill()  # first: the thread may be waiting for a worker
        self._stop()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _stop(self) -> None:
        steps, self._steps = self._steps, None
        if not isinstance(steps, _Prefetched):
            if steps is not None:
                steps.close()
        elif not steps.close() and self._pool is not None:
            self._pool.kill()  # it hangs on a worker, which nobody else may then talk to
            steps.close()
            self._pool.close()
            self._pool = None

    def _read(self, tasks: Iterator[_Task]) -> Generator[_Read, None, None]:
        reader = Reader(
            self.stream, self._objective
        )  # with buffers of its own: a thread left behind may still fill its
        for group in _grouped(tasks, _ORDER_SEQUENCES):
            yield from _steps(group, reader(group))

    def _receive(self, pool: WorkerPool, tasks: Iterator[_Task]) -> Generator[_Read, None, None]:
        for group, result in pool.run(_grouped(tasks, _SENT_TOKENS // self.stream.raw_length)):
            yield from _steps(group, result)


def _tasks(stream: SequenceReader, plan: Plan, step: int, drawn: int) -> Iterator[_Task]:
    """The steps after `drawn`, endless, or until a stream with an end is used up."""
    while stream.num_sequences is None or drawn < stream.num_sequences:
        count = plan.count(step, drawn)
        if stream.num_sequences is not None:
            count = min(count, stream.num_sequences - drawn)
        numbers = plan.numbers(drawn, count)
        yield _Task(step, drawn, count, int(numbers[0]), int(numbers[-1]), plan.share_of(numbers))
        step, drawn = step + 1, drawn + count


def _grouped(tasks: Iterator[_Task], sequences: int) -> Iterator[list[_Task]]:
    """Runs of steps that are worth reading together; the first is one step, so that a seek is quick."""
    group: list[_Task] = []
    size, wanted = 0, 1
    for task in tasks:
        group.append(task)
        size += task.share.size
        if size >= wanted:
            yield group
            group, size, wanted = [], 0, sequences
    if group:
        yield group


def to_device(tensors: MicroBatch, device: torch.device) -> MicroBatch:
    """A micro-batch on the device. The one place that copies to a GPU: from pinned memory, without waiting."""
    if device.type == "cpu":
        return tensors
    if device.type == "cuda":
        # torch's pinned allocator keeps the host copy until the transfer is done.
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


class _Prefetched:
    """Runs an iterator on a thread, `depth` items ahead; its errors come out where its items would."""

    def __init__(self, items: Generator[_Read, None, None], depth: int) -> None:
        self._items: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), name="shardwright-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> _Prefetched:
        return self

    def __next__(self) -> Any:
        if self._stopped.is_set():
            raise StopIteration
        kind, value = self._items.get()
        if kind == "item":
            return value
        self._stopped.set()
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> bool:
        """Ask the thread to end and wait a while; False if it is stuck in a read, after which it will end alone."""
        self._stopped.set()
        deadline = time.monotonic() + _CLOSE_WAIT_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):  # it may be waiting for room
                while True:
                    self._items.get_nowait()
            self._thread.join(0.01)
        return not self._thread.is_alive()

    def _run(self, items: Generator[_Read, None, None]) -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    self._items.put(("item", item))
                    if self._stopped.is_set():
                        return
            self._items.put(("end", None))
        except BaseException as error:  # handed to the consumer, who raises it
            self._items.put(("error", error))
