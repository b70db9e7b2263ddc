"""How many ranks agree on what is wrong before a process group exists: marks and counters in the rendezvous store.

Under cluster.py. It is made for 16,384 ranks: a rank that finds nothing wrong leaves a mark of a few bytes a step and
reads one value that rank 0 wrote; equal findings are counted where they are made, so that what anyone reads is as long
as the list of different faults, and nothing is gathered. Every wait has a limit; who does not come is named.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from shardwright.config import RunError
from shardwright.launcher.world import Place

REST_S = 5.0  # for one rank to speak before the others leave
SHOWN = 4  # ranks with one fault that are named one by one


class Fault(Exception):
    """What is wrong on this rank, and what to do about it.

    Ranks with an equal text and remedy are one entry, so neither names the rank; `reason` is the first one's own.
    """

    def __init__(self, text: str, remedy: str = "", reason: str = "") -> None:
        super().__init__(text)
        self.text, self.remedy, self.reason = " ".join(text.split()), remedy, " ".join(reason.split())


class Absent(RunError):
    """Ranks that did not come to a step in time; raised on one rank.

    The others leave with SystemExit, but only when that one has called `told`: when the first process leaves, launchers
    end the rest.
    """

    def __init__(self, text: str, told: Callable[[], None] = lambda: None) -> None:
        super().__init__(text)
        self.told = told


@dataclass(frozen=True)
class Finding:
    """A fault that `count` of `size` ranks found at a step; `names` are the first of them."""

    step: str
    text: str
    remedy: str
    count: int
    size: int
    names: Sequence[str]

    def __str__(self) -> str:
        if self.count == self.size:
            return f"all {self.size} ranks: {self.text}"
        more = f" and {self.count - len(self.names)} more" if self.count > len(self.names) else ""
        return f"{', '.join(self.names)}{more}: {self.text}"


class RollCall:
    """The book in which all ranks sign at each step; `limit_s` is how long they wait for each other."""

    def __init__(self, store: dist.Store, place: Place, limit_s: float) -> None:
        self._store, self._place, self.limit_s = store, place, limit_s
        self._host = socket.gethostname()

    @property
    def name(self) -> str:
        """This rank and where it runs."""
        return f"rank {self._place.rank} on {self._host}"

    def arrive(self) -> int:
        """Sign in; the number of hosts, once all are there."""
        if self._store.add(f"host/{self._host}", 1) == 1:
            self._store.add("hosts", 1)
        self._store.set(f"at/{self._place.rank}", self._host)
        self.attend("the meeting")
        return self._store.add("hosts", 0)

    def attend(self, step: str) -> int:
        """Wait until every rank is at this step; the number of faults until then, the same on every rank.

        Absent, or SystemExit where another rank says it.
        """
        self.sign(step)
        try:
            return int(self.read(f"{step}/all"))
        except dist.DistError:
            raise self._absent(step) from None

    def sign(self, step: str) -> None:
        """Leave a mark that this rank is at a step; the last one writes how many faults there are."""
        self._store.set(f"{step}/{self._place.rank}", "")
        if self._store.add(f"{step}/count", 1) == self._place.size:
            self._store.set(f"{step}/all", str(self._store.add("faults", 0)))

    def write(self, key: str, value: str) -> None:
        """For other ranks to read."""
        self._store.set(key, value)

    def read(self, key: str) -> str:
        """What another rank writes, within the limit; DistError where it does not."""
        self._store.wait([key], timedelta(seconds=self.limit_s))
        return self._store.get(key).decode()

    def report(self, step: str, fault: Fault) -> None:
        """Enter a fault, before `attend`. Equal ones are one entry with a number."""
        mark = hashlib.sha256(f"{step}\n{fault.text}\n{fault.remedy}".encode()).hexdigest()[:16]
        number = self._store.add(f"fault/{mark}", 1)
        if number <= SHOWN:
            self._store.set(f"fault/{mark}/{number}", self.name)
        if number == 1:
            entry = self._store.add("faults", 1)
            text = f"{fault.text} ({fault.reason})" if fault.reason else fault.text
            words = {"step": step, "text": text, "remedy": fault.remedy, "mark": mark}
            self._store.set(f"entry/{entry}", json.dumps(words))

    def findings(self) -> Iterator[Finding]:
        """All faults so far, for the rank that says them."""
        for entry in range(1, self._store.add("faults", 0) + 1):
            words = json.loads(self.read(f"entry/{entry}"))
            mark = words.pop("mark")
            count = self._store.add(f"fault/{mark}", 0)
            names = [self.read(f"fault/{mark}/{number}") for number in range(1, min(count, SHOWN) + 1)]
            names.sort(key=lambda name: int(name.split()[1]))
            yield Finding(**words, count=count, size=self._place.size, names=names)

    def part(self, name: str) -> dist.Store:
        """A store of its own, for a process group."""
        return dist.PrefixStore(name, self._store)

    def leave(self) -> None:
        """Let rank 0 say what it has to first, and then the others read that it has; for a moment at most.

        Launchers end the rest when the first process leaves with a failure, and rank 0 may hold the store.
        """
        if self._place.rank == 0:
            self._store.set("said", "")
        with suppress(dist.DistError):
            self._store.wait(["said"], timedelta(seconds=REST_S))
        deadline = time.monotonic() + REST_S
        gone = self._store.add("gone", 1)
        while self._place.rank == 0 and gone < self._place.size and time.monotonic() < deadline:
            time.sleep(0.01)
            gone = self._store.add("gone", 0)

    def _absent(self, step: str) -> BaseException:
        """For the first rank whose patience is over the line that names who is missing; for the others a silent end."""
        try:
            if self._store.add(f"{step}/speaker", 1) > 1:
                with suppress(dist.DistError):
                    self._store.wait([f"{step}/said"], timedelta(seconds=REST_S))
                return SystemExit(1)
            missing = [rank for rank in range(self._place.size) if not self._store.check([f"{step}/{rank}"])]
            named = [self._name(rank) for rank in missing[:SHOWN]]
        except dist.DistError:
            if os.environ.get("LOCAL_RANK", "0") != "0":
                return SystemExit(1)
            return Absent(f"{self.name}: the store at which all ranks met is gone, and with it rank 0 or the launcher")
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        verb = "does" if len(missing) == 1 else "do"
        return Absent(
            f"{', '.join(named)}{more} {verb} not come to {step} within {self.limit_s:g} s; see what its own launcher "
            "says there, and start all ranks within that time or give more with --limit",
            lambda: self._store.set(f"{step}/said", ""),
        )

    def _name(self, rank: int) -> str:
        known = self._store.check([f"at/{rank}"])
        return f"rank {rank} on {self._store.get(f'at/{rank}').decode()}" if known else f"rank {rank} (never seen)"


def open_store(place: Place, limit_s: float) -> dist.Store:
    """The store at which this world meets; RunError where it is not reached within the limit.

    torchrun has one in its agent; else rank 0 opens it, as it would for training.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])  # as enter_world left them
    opens = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not opens:
        _knock(place, address, port, limit_s)
    try:
        store = dist.TCPStore(address, port, place.size, opens, timedelta(seconds=limit_s), wait_for_workers=False)
    except (dist.DistError, RuntimeError) as error:
        raise RunError(f"{_here(place)}: {str(error).splitlines()[0]}; choose another MASTER_PORT") from None
    return dist.PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _knock(place: Place, address: str, port: int, limit_s: float) -> None:
    """Wait until the store's port answers, to say why it does not: torch's own message only says that time is over."""
    deadline, reason = time.monotonic() + limit_s, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), timeout=min(left, 10.0)).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.1)
    raise RunError(
        f"{_here(place)}: {address}:{port} is not reached within {limit_s:g} s ({reason}); start rank 0, "
        "open that port in its firewall, or set MASTER_ADDR to an address that this host reaches"
    )


def _here(place: Place) -> str:
    return f"rank {place.rank} on {socket.gethostname()}"
