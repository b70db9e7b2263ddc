"""Ctrl-C, SIGTERM and SIGUSR1 while a command starts: one line in place of a traceback out of some import.

Imports nothing of weight, so that it is in force before what has; train/signals.py takes over while a run is under way.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_CAUGHT = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


_leaving = threading.Lock()
_settled = threading.Event()


def settle() -> None:
    """All is saved and the exit code is known: until the end of `leaving_at_once`, signals change nothing any more."""
    _settled.set()


@contextmanager
def leaving_at_once(*, last: bool = False) -> Iterator[None]:
    """Within, a signal ends the process with a line and exit code 128 + its number: 130 for Ctrl-C, 143 for SIGTERM.

    Also where the main thread waits inside of C, for the other ranks for example: Python's own handlers would have to
    wait for it, so a thread is woken by the signal. `last`: the process ends behind it, and after `settle` ignores
    signals until it is gone, which takes torch half a second.
    """
    _settled.clear()
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = {number: signal.signal(number, _leave) for number in _CAUGHT}
    come, wake = os.pipe()
    os.set_blocking(wake, False)
    woken = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(come,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        os.close(wake)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last and _settled.is_set() else handler)


def _watch(come: int) -> None:
    """Read the numbers of signals until the other end closes; call those handlers that say that they stand it."""
    while number := os.read(come, 1):
        handler = signal.getsignal(number[0])
        if callable(handler) and getattr(handler, "from_any_thread", False):
            handler(number[0], None)
    os.close(come)


def _leave(number: int, _frame: FrameType | None) -> None:
    if _settled.is_set():
        return
    if not _leaving.acquire(blocking=False):
        return  # the other thread is at it
    if os.environ.get("RANK", "0") == "0":
        print(f"shardwright: {_words(signal.Signals(number).name)}", file=sys.stderr)
        sys.stderr.flush()
    os._exit(128 + number)  # an exception could be caught by whatever is being imported


_leave.from_any_thread = True  # type: ignore[attr-defined]  # training has handlers of its own


def _words(name: str) -> str:
    if name == "SIGTERM" and os.environ.get("WORLD_SIZE", "1") != "1":
        return "ended by SIGTERM before the first step; if another rank is gone, the launcher's report names it"
    return f"interrupted by {name} while no step was under way; nothing to save"
