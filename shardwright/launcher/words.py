"""What a launch says of itself: one line for each event, and how processes ended in words.

Under supervise.py. `ended` is what the keeper of a host tells of an attempt there (host.py).
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import TextIO

from shardwright.launcher.hosts import Link, Message
from shardwright.log import outlive


def first_code(ended: Message) -> int:
    """Exit code of the rank that failed first on a host, negative for a signal; the agent's own where no rank did."""
    if "failures" in ended:
        return int(ended["failures"][str(ended["first"])]["code"])
    return int(ended["code"])


def describe(link: Link, ended: Message) -> str:
    """What failed on a host, in words: `rank 3 on node2 (local rank 1, pid 77): killed by SIGKILL`."""
    where = "this machine" if link.host.local else link.host.name
    if "failures" not in ended:
        return f"the agent on {where}: {ended.get('error') or how(ended['code'])}"
    first = ended["failures"][str(ended["first"])]
    place = f"local rank {first['local_rank']}, pid {first['pid']}"
    return f"rank {first['rank']} on {where} ({place}): {how(first['code'])}"


def how(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def say(text: str) -> None:
    """One line for each event."""
    tell(f"shardwright: {text}", sys.stderr)


def tell(line: str, stream: TextIO) -> None:
    """Print it; where the terminal is gone or the disk of a log is full, the run is still led to its end."""
    try:
        print(line, file=stream, flush=True)
    except OSError as error:
        with suppress(OSError):
            outlive(error)
