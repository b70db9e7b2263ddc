"""SIGTERM, SIGUSR1 and Ctrl-C: a run finishes the step, saves and leaves; a second one leaves at once.

One that comes when all is saved and how the run ends is known changes nothing: a run that is done ends with 0, since 75
promises that the same command goes on.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from shardwright.log import get_logger

_CAUGHT = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LINGER_S = 8.0  # torchrun kills after 30


class Signals:
    """Within its block, remembers that the run was asked to stop; `tell` is called once it can matter no more."""

    def __init__(self, tell: Callable[[], None] | None = None) -> None:
        self.received: str | None = None
        self._tell, self._settled = tell, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # Only the main thread may set handlers; a run started from another one is stopped by its caller.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _CAUGHT}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def settle(self) -> None:
        """All is saved, and how the run ends is known: from here on signals change nothing."""
        self._settled = True
        if self._tell is not None:
            self._tell()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._settled:
            return
        if number == signal.SIGTERM and self.received == signal.SIGUSR1.name:
            return  # of SLURM, as the time that SIGUSR1 announced is over: the save may still be whole before SIGKILL
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        get_logger().info("%s: finishing the step and saving; once more to leave at once", self.received)


@contextmanager
def lingering(world_size: int) -> Iterator[None]:
    """Within, SIGTERM ends this process a while later, for ranks with nothing to save; nothing on one process.

    When a rank dies its launcher sends SIGTERM to the others at once, and one of them has to say who is gone. That one
    has left this block by its error and has yet to print it: after an error the handler stays.
    """
    if world_size == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _leave_soon)
    yield
    signal.signal(signal.SIGTERM, before)


def _leave_soon(number: int, _frame: FrameType | None) -> None:
    timer = threading.Timer(LINGER_S, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()


# Where the main thread waits inside of C, as for the address of a rank that is gone, launcher/early.py calls this.
_leave_soon.from_any_thread = True  # type: ignore[attr-defined]
