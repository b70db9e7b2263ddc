"""Ctrl-C and SIGTERM while a command starts: one line in place of a traceback out of some import.

Imports nothing of weight, so that it is in force before what has; once training begins, train/signals.py takes over.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_CAUGHT = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Within, a signal ends the process with a line and exit code 128 + its number: 130 for Ctrl-C, 143 for SIGTERM."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = {number: signal.signal(number, _leave) for number in _CAUGHT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        print(f"shardwright: interrupted by {name} while no step was under way; nothing to save", file=sys.stderr)
        sys.stderr.flush()
    os._exit(128 + number)  # an exception could be caught by whatever is being imported
