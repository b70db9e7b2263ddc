"""What a launch is to run, and one attempt at it: a world of hosts as far as the supervisor has heard of it.

Between hosts.py and supervise.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwright.launcher.hosts import SSH, Host, Link, Message
from shardwright.launcher.words import first_code


@dataclass(frozen=True)
class Job:
    """What to run where, and what to do when something is lost. Times in seconds."""

    command: Sequence[str]  # module and arguments, the same on every host
    hosts: Sequence[Host]
    fits: Callable[[int], str | None]  # why the run cannot be spread over so many processes
    checkpoints: Path
    progress: Path  # a file that grows while the run makes steps
    min_hosts: int
    restarts: int = 3
    once: bool = False  # a failure is an answer: nothing is said of it or started again
    grace_s: float = 60.0
    lease_s: float = 30.0
    rejoin_s: float | None = 300.0
    wait_s: float = 600.0
    python: str = sys.executable
    ssh: Sequence[str] = SSH
    environment: Mapping[str, str] = field(default_factory=dict)  # for other hosts; this one has its own


class Attempt:
    """One world of the run, as far as the supervisor has heard of it."""

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = list(links)
        self.ended: dict[Link, Message] = {}
        self.lost: list[Link] = []
        self.begun = 0  # bytes of the progress file at its start
        self.started = False  # agents were
        self.deadline: float | None = None  # for ranks that were asked to stop, or that follow a failure
        self.asked: str = ""  # why they were asked to stop
        self.killed = False

    @property
    def running(self) -> list[Link]:
        """Hosts from which no end was heard."""
        return [link for link in self.links if link not in self.ended and link not in self.lost]

    @property
    def size(self) -> int:
        """Processes."""
        return sum(link.slots for link in self.links)

    def send(self, **order: Any) -> None:
        """Give an order to every host where the attempt runs."""
        for link in self.running:
            link.send(**order)

    def failures(self) -> list[tuple[Link, Message]]:
        """Hosts on which it failed, with the rank that failed first; ranks that were killed before others."""
        found = [(link, ended) for link, ended in self.ended.items() if ended["code"] != 0 and not ended["ours"]]
        return sorted(found, key=lambda entry: first_code(entry[1]) >= 0)
