"""Who is missing when a collective fails, in one line.

Beside mesh.py. Each rank leaves its host and process id at the rendezvous store. When a rank dies the collectives of
others fail; the first of each host to see that looks which process of its own host is dead without having said so,
or else, after a while, which one has not seen it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from shardwright.config import RunError
from shardwright.parallel.mesh import World

PATIENCE_S = 10.0  # for a word from the host of the lost rank, where that is another one
_SIGNS = ("gloo", "connection", "nccl", "timed out", "does not answer", "socket")


@contextmanager
def watch_peers(world: World) -> Iterator[None]:
    """Turn the failure of a collective inside the block into one RunError that names the rank that is gone.

    One rank raises it; the others leave with exit code 1 and no word.
    """
    if world.size == 1:
        yield
        return
    book = _open_book()
    book.set(f"who/{world.rank}", f"{os.getpid()} {socket.gethostname()}")
    try:
        yield
    except Exception as error:
        if not is_loss(error):
            _leave_word(book, world)
            raise
        report = _report(book, world)
        if report is None:
            raise SystemExit(1) from None
        raise RunError(f"{report}; start the same command again to go on from the newest checkpoint") from error


def is_loss(error: BaseException) -> bool:
    """Whether an error is that of a collective whose other side is gone, and not one of this rank's own."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


def _open_book() -> dist.PrefixStore:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE_S))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"shardwright/{attempt}", store)


def _leave_word(book: dist.PrefixStore, world: World) -> None:
    """This rank ends with an error of its own, which it says itself: the others need not look for who is gone."""
    with suppress(dist.DistError, RuntimeError):
        book.set(f"here/{world.rank}", "")
        book.set("told", "")


def _report(book: dist.PrefixStore, world: World) -> str | None:
    """The line that names who is gone, for the rank that is to say it; None for the others."""
    try:
        book.set(f"here/{world.rank}", "")
        if book.add(f"reporters/{socket.gethostname()}", 1) > 1:
            return None
        gone = [rank for rank in _neighbours(world) if _is_gone(book, rank)]
        if gone:
            book.set("told", "")
            names, verb = ", ".join(_name(book, rank) for rank in gone), "is" if len(gone) == 1 else "are"
            return f"{names} {verb} gone: killed or crashed (the launcher's report has the exit code)"
        if _is_told(book):
            return None
        silent = [rank for rank in _neighbours(world) if not book.check([f"here/{rank}"])]
        if silent:
            names, verb = ", ".join(_name(book, rank) for rank in silent), "does" if len(silent) == 1 else "do"
            return f"{names} {verb} not answer: stopped, or stuck in something else than a collective"
        if len(_neighbours(world)) == world.size:
            return "the connection between ranks of this host broke, though all of them run"
        return "the connection to a rank on another host broke: it is gone, or the network"
    except (dist.DistError, RuntimeError):
        return "rank 0, or the launcher at which all ranks met, is gone: killed or crashed"


def _neighbours(world: World) -> range:
    """Ranks of this host, as the launcher numbers them."""
    first = world.rank - int(os.environ.get("LOCAL_RANK", world.rank))
    return range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))


def _is_gone(book: dist.PrefixStore, rank: int) -> bool:
    """Whether a process of this host has ended without a word; those that saw the loss themselves said so before."""
    pid, host = _who(book, rank)
    return host == socket.gethostname() and not _is_alive(pid) and not book.check([f"here/{rank}"])


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but that nobody waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _who(book: dist.PrefixStore, rank: int) -> tuple[int, str]:
    pid, _, host = book.get(f"who/{rank}").decode().partition(" ")
    return int(pid), host


def _name(book: dist.PrefixStore, rank: int) -> str:
    pid, host = _who(book, rank)
    return f"rank {rank} on {host} (pid {pid})"


def _is_told(book: dist.PrefixStore) -> bool:
    """Whether the host of the lost rank says who it was, before long."""
    deadline = time.monotonic() + PATIENCE_S
    while not book.check(["told"]):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
