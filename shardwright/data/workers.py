"""Worker processes that turn jobs into numpy arrays, in order, for `loader`.

Each worker has a pipe of its own and one job at a time, so that nothing can deadlock; results travel through the pipe
as raw bytes (no shared memory: containers give little of it, and a killed process leaves it behind). Workers are
spawned, hold no state, leave signals to the parent, and end when it does. One that dies is an error that names it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, resource_tracker, util
from typing import Any

import numpy as np

from shardwright.config import RunError
from shardwright.data.buffers import BufferPool

Arrays = dict[str, np.ndarray]
#: What a job gives: blocks of named arrays.
Result = list[Arrays]
_ALIGN = 64
_LEFT_TO_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SLURM sends them to every process of a task


class WorkerTraceback(Exception):
    """Where in a worker an error came from; the cause of the error raised here."""


class WorkerPool:
    """`count` processes that run `function(job)`; `function` and jobs must be picklable."""

    def __init__(self, function: Callable[[Any], Iterable[Arrays]], count: int) -> None:
        pickled = pickle.dumps(function)
        self._workers = [_Worker(number, pickled) for number in range(count)]
        # Run by multiprocessing before it would join the workers at exit, which ignore its SIGTERM.
        self.close = util.Finalize(self, _shut_down, args=(self._workers,), exitpriority=10)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.pid for worker in self._workers]

    def kill(self) -> None:
        """End the processes; a thread in `run` gets RunError. `close` afterwards, when no thread is left in there."""
        _kill(self._workers)

    def run(self, jobs: Iterator[Any]) -> Iterator[tuple[Any, Result]]:
        """Each job and its result, in order. RunError where a worker died; an error in a job is raised in its place."""
        for worker in self._workers:
            worker.forget()
        underway: deque[tuple[_Worker, Any]] = deque()
        for worker in self._workers:
            _give(worker, jobs, underway)
        while underway:
            worker, job = underway.popleft()
            result = worker.receive()
            _give(worker, jobs, underway)
            yield job, result


def _give(worker: _Worker, jobs: Iterator[Any], underway: deque[tuple[_Worker, Any]]) -> None:
    for job in jobs:
        worker.send(job)
        underway.append((worker, job))
        return


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, number: int, function: bytes) -> None:
        context = multiprocessing.get_context("spawn")
        self.number, self._busy, self._buffers = number, False, BufferPool()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, function), name=f"shardwright-data-{number}", daemon=True
        )
        with _signals_held_back():
            self.process.start()
        theirs.close()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def send(self, job: Any) -> None:
        try:
            self.connection.send(job)
        except OSError:
            self._raise_dead()
        self._busy = True

    def receive(self) -> Result:
        """The result of the job underway."""
        connection.wait([self.connection, self.process.sentinel])
        try:
            kind, value, size = self.connection.recv()
            self._busy = False
            payload = _read_exactly(self.connection.fileno(), self._buffers.empty((size,), np.uint8))
        except (EOFError, OSError):
            self._raise_dead()
        if kind == "error":
            error, text = value
            raise error from WorkerTraceback(f"in data worker {self.number} (pid {self.pid}):\n{text}")
        return [{name: _view(payload, *place) for name, place in block.items()} for block in value]

    def forget(self) -> None:
        """Let go of a result that nobody will ask for."""
        if self._busy:
            with contextlib.suppress(Exception):
                self.receive()

    def _raise_dead(self) -> None:
        self.process.join(5)
        code = self.process.exitcode
        if code is None:
            how = "closed its pipe"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += " (out of memory?)" if -code == signal.SIGKILL else ""
        else:
            how = f"ended with exit code {code}"
        raise RunError(
            f"data worker {self.number} (pid {self.pid}) {how}; nothing is lost: start the run again, "
            "with fewer data.workers if memory is short"
        )


def _shut_down(workers: list[_Worker]) -> None:
    _kill(workers)
    for worker in workers:
        worker.connection.close()


def _kill(workers: list[_Worker]) -> None:
    """End the processes, whatever they do; they hold nothing that could be lost."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join()


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Start a process in here and it never sees SIGINT, SIGTERM or SIGUSR1, not even while it still imports."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # for the tracker too, which minds the others
    resource_tracker.ensure_running()  # starting it would let the signals through
    signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: connection.Connection, function: bytes) -> None:
    """The worker's whole life: jobs in, results out, until the parent closes the pipe."""
    for number in _LEFT_TO_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        run = None
        while True:
            job = pipe.recv()
            try:
                run = run or pickle.loads(function)
                header, payload = _flatten(list(run(job)))
            except Exception as error:
                pipe.send(("error", (_portable(error), traceback.format_exc()), 0))
            else:
                pipe.send(("result", header, len(payload)))
                _write_all(pipe.fileno(), payload)
    os._exit(0)


def _portable(error: Exception) -> Exception:
    """The error itself where it survives pickling, else its text."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        return copy if isinstance(copy, Exception) else RunError(str(error))
    except Exception:
        return RunError(f"{type(error).__name__}: {error}")


def _flatten(result: Result) -> tuple[list[dict[str, tuple]], bytes]:
    """Arrays -> where each lies in one run of bytes, and the bytes."""
    pieces: list[bytes] = []
    size = 0

    def place(array: np.ndarray) -> tuple[int, str, tuple[int, ...]]:
        nonlocal size
        at, data = size, array.tobytes()
        padding = -len(data) % _ALIGN
        pieces.extend((data, bytes(padding)))
        size += len(data) + padding
        return at, array.dtype.str, array.shape

    header = [{name: place(array) for name, array in block.items()} for block in result]
    return header, b"".join(pieces)


def _view(payload: np.ndarray, at: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    array = np.dtype(dtype)
    size = int(np.prod(shape)) * array.itemsize
    return payload[at : at + size].view(array).reshape(shape)


def _read_exactly(descriptor: int, payload: np.ndarray) -> np.ndarray:
    rest = payload.data
    while len(rest):
        got = os.readv(descriptor, [rest])
        if not got:
            raise EOFError
        rest = rest[got:]
    return payload


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while len(rest):
        rest = rest[os.write(descriptor, rest) :]
