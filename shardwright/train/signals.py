"""SIGTERM and Ctrl-C: finish the step, save, leave. A second one leaves at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from shardwright.log import get_logger

_CAUGHT = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Within its block, remembers that the run was asked to stop."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # Only the main thread may set handlers; a run started from another one is stopped by its caller.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _CAUGHT}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        get_logger().info("%s: finishing the step and saving; once more to leave at once", self.received)
