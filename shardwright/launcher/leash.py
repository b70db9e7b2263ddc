"""What ties processes of a launched run together, so that none is left behind, whoever is killed.

Under host.py and agent.py; cli.py puts every rank that `launch` started on it. Linux does the work: a process may ask
to be killed when its parent dies, and a process may ask to become the parent of whatever its descendants leave behind.
Elsewhere the launcher still ends what it started, unless it is killed itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

WORDS = "SHARDWRIGHT_WORDS"  # folder in which the ranks of one attempt say how they ended
STOPPED = 75
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def on_leash(command: Callable[[], int]) -> int:
    """The exit code of a command, which dies with its parent where `launch` started it.

    There a rank that was stopped with all saved says so in a file and leaves with 0: torchrun would take 75 for a
    failure, and end the ranks that are still writing.
    """
    folder = os.environ.pop(WORDS, None)  # not for the processes that this one starts
    if folder is None:
        return command()
    die_with_parent()
    code = command()
    if code != STOPPED:
        return code
    with suppress(OSError):
        (Path(folder) / os.environ.get("RANK", "0")).write_text(str(code))
    return 0


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends."""
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went in between
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of all that descendants leave behind, so that `end_descendants` reaches it."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(limit_s: float = 20.0) -> bool:
    """Kill all processes under this one and wait until they are gone; whether they are."""
    deadline = time.monotonic() + limit_s
    own = psutil.Process()
    while family := own.children(recursive=True):
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _bury()
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _bury() -> None:
    """Take the exit codes of adopted processes that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0)
