"""Attempts of a run over its hosts: start all, watch, and on a loss start again from the newest whole checkpoint.

Above attempt.py, under launch.py. Each attempt is a new world: the hosts that are there, node ranks given here, a fresh
port, one torchrun agent a host with --max-restarts 0. torchrun's own scaling down after a loss is not relied on
(pytorch issues 111646 and 147064): it waits for agents that are gone, or goes on without hosts that are there.

Not used, after reading them: torchft skips the step in which a replica died and then averages over those that are left,
so that the global batch depends on what died when; its managers listen on every interface. nvidia-resiliency-ext's
ft_launcher is a fork of torchrun whose restart in place needs NCCL, and it does not know which numbers of hosts fit a
layout. From both: agents that are told apart from ranks, a lease, spares, a fresh rendezvous for each attempt.
"""

from __future__ import annotations

import os
import queue
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from shardwright.checkpoint import find_newest
from shardwright.config import ConfigError, RunError
from shardwright.launcher.attempt import Attempt, Job
from shardwright.launcher.hosts import Host, Link, Message, keeper_command
from shardwright.launcher.leash import STOPPED
from shardwright.launcher.words import describe, first_code, say, tell

FAILED, MISTAKE = 1, 2
CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
ASKED = (-signal.SIGTERM, 128 + signal.SIGTERM)  # how ranks end that were to stop for a host that came back
TICK_S, REOPEN_S, WORD_S, MARGIN_S = 0.1, 2.0, 3.0, 2.0
MOST_CHOICES = 1000  # sets of hosts that are looked at


class Supervisor:
    """Runs a job to its end."""

    def __init__(self, job: Job) -> None:
        self.job, self.name = job, secrets.token_hex(8)
        self.inbox: queue.SimpleQueue[tuple[Any, Message | None]] = queue.SimpleQueue()
        self.links: dict[str, Link] = {}
        self.opened: dict[str, float] = {}  # when a link to a host was last tried
        self.fences: dict[str, float] = {}  # when the processes of a lost host have ended themselves for certain
        self.attempts = self.restarts = 0
        self.attempt: Attempt | None = None
        self.signals: list[int] = []
        self._gone: set[Link] = set()
        self._considered: list[Link] = []  # hosts by which a larger world was last looked for
        self._beaten = 0.0
        self._own_failure: Path | None | str = "none yet"
        self._reasons: dict[int, str | None] = {}

    def run(self) -> int:
        """Exit code of the whole run: 0, 1, 2, 75 (stopped, all saved), or 128 + the signal that ended it unsaved."""
        with self._catching():
            try:
                self._gather(first=True)
                while True:
                    code = self._conclude(self._run_attempt(self._choose()))
                    if code is not None:
                        return code
                    self._gather()
            except _Stopped:
                return 128 + self.signals[0]
            finally:
                self._leave()

    # ------------------------------------------------------------------------------------------ hosts

    def _open(self, host: Host) -> None:
        job, folder = self.job, os.getcwd()
        self.opened[host.name] = time.monotonic()
        link = Link(host, self.inbox, keeper_command(host, folder, job.python, job.ssh))
        self.links[host.name] = link
        begin = {"launch": self.name, "lease": job.lease_s, "folder": folder}
        link.open({**begin, "environment": {} if host.local else dict(job.environment)})

    def _up(self) -> list[Link]:
        return [link for host in self.job.hosts if (link := self.links.get(host.name)) is not None and link.up]

    def _gather(self, *, first: bool = False) -> None:
        """Reach every host, or as many as are enough once the others are known to be gone.

        RunError where too few answer.
        """
        begin = time.monotonic()
        while True:
            self._reopen(0.0 if first else REOPEN_S)
            up, now = self._up(), time.monotonic()
            waited = now - begin
            if len(up) == len(self.job.hosts):
                return
            pending = [h for h in self.job.hosts if (link := self.links[h.name]) not in up and not link.closed]
            if first and not pending or waited > self.job.wait_s:
                break
            fenced = all(now >= self.fences.get(host.name, 0.0) for host in self.job.hosts)
            if not first and fenced and len(up) >= self.job.min_hosts:
                break
            self._next()
        if len(self._up()) < self.job.min_hosts:
            raise RunError(self._too_few())
        for host in self.job.hosts:
            if first and not self.links[host.name].up:
                say(f"{host.name} does not answer ({self.links[host.name].problem or 'no word'}); starting without it")

    def _too_few(self) -> str:
        gone = [host.name for host in self.job.hosts if not self.links[host.name].up]
        why = "; ".join(f"{name}: {self.links[name].problem or 'no answer'}" for name in gone)
        return (
            f"{len(self._up())} of {len(self.job.hosts)} hosts answer, {self.job.min_hosts} are needed ({why}); "
            "see to them and start the same command again, or allow fewer with --min-nodes"
        )

    def _reopen(self, after_s: float) -> None:
        """Try hosts that have no link, or whose last try is over and `after_s` ago."""
        now = time.monotonic()
        for host in self.job.hosts:
            link = self.links.get(host.name)
            if link is None or (link.closed and after_s and now - self.opened[host.name] >= after_s):
                self._open(host)

    def _choose(self, up: Sequence[Link] | None = None) -> list[Link]:
        """The largest set of hosts that the layout fits, first come first; RunError where there is none."""
        up = self._up() if up is None else up
        for number in range(len(up), self.job.min_hosts - 1, -1):
            for links in islice(combinations(up, number), MOST_CHOICES):
                if self._why_not(sum(link.slots for link in links)) is None:
                    return list(links)
        size = sum(link.slots for link in up)
        if self.attempts == 0:
            raise ConfigError(self._why_not(size) or f"{len(up)} hosts: fewer than --min-nodes {self.job.min_hosts}")
        raise RunError(f"the {len(up)} hosts that are left ({size} processes) do not fit: {self._why_not(size)}")

    def _why_not(self, size: int) -> str | None:
        if size not in self._reasons:
            self._reasons[size] = self.job.fits(size)
        return self._reasons[size]

    def _lose(self, link: Link, why: str) -> None:
        """A host is gone: whatever runs there ends itself when its lease is over."""
        link.close()
        if link in self._gone:
            return
        self._gone.add(link)
        attempt = self.attempt
        if attempt is not None and link not in attempt.links:
            if link.hello is not None:  # nothing of the run is there, and nothing has to end
                say(f"lost the spare {link.host.name}: {why}")
            return
        if link.hello is not None:
            fence = 1.0 if link.host.local else self.job.lease_s + MARGIN_S
            self.fences[link.host.name] = time.monotonic() + fence
        if attempt is not None and link in attempt.running:
            attempt.lost.append(link)
            say(f"lost host {link.host.name}: {why}")
            self._kill()

    # ------------------------------------------------------------------------------------------ one attempt

    def _run_attempt(self, links: Sequence[Link]) -> Attempt:
        self.attempt = attempt = Attempt(links)
        self.attempts += 1
        attempt.begun = size_of(self.job.progress)
        self._announce(attempt)
        met = self._meet(attempt)
        if met is not None:
            self._start(attempt, met[0])
            self._watch(attempt)
        self.attempt = None
        return attempt

    def _announce(self, attempt: Attempt) -> None:
        hosts, all_hosts = len(attempt.links), len(self.job.hosts)
        where = f"with {hosts} of {all_hosts} hosts, " if all_hosts > 1 else ""
        spares = [link.host.name for link in self._up() if link not in attempt.links]
        spare = f"; spare: {', '.join(spares)}" if spares else ""
        size = f"{attempt.size} process{'es' if attempt.size > 1 else ''}"
        if self.attempts == 1:
            say(f"starting {where}{size}{spare}")
        else:
            count = f" (restart {self.restarts} of {self.job.restarts})" if self.restarts else ""
            newest = find_newest(self.job.checkpoints)[0]
            since = f"from {newest.name}" if newest is not None else "from the beginning: no checkpoint yet"
            say(f"attempt {self.attempts}{count} {where}{size}, {since}{spare}")

    def _meet(self, attempt: Attempt) -> list[Message] | None:
        """Have every host find its way to the first one, which opens a port; None where a host was lost meanwhile."""
        first, *others = attempt.links
        found: list[Message] = []
        for link in attempt.links:
            peer = others[0].host.meets_at if link is first and others else (found[0]["address"] if found else None)
            link.send(meet={"peer": peer, "leads": link is first})
            while link in attempt.running and "met" not in (message := self._next(link) or {}):
                if time.monotonic() - link.heard > self.job.lease_s:
                    self._lose(link, f"no word from it for {self.job.lease_s:g} s")
            if attempt.lost:
                return None
            found.append(message["met"])
            if "problem" in found[-1]:
                raise RunError(f"{link.host.name}: {found[-1]['problem']}")
        return found

    def _start(self, attempt: Attempt, first: Message) -> None:
        attempt.started = True
        for node, link in enumerate(attempt.links):
            link.send(
                start={
                    "nodes": len(attempt.links),
                    "node": node,
                    "processes": link.slots,
                    "master": first["address"],
                    "port": first["port"],
                    "attempt": self.attempts,
                    "command": list(self.job.command),
                }
            )

    def _watch(self, attempt: Attempt) -> None:
        """Until every host of the attempt has ended or is lost."""
        looked = time.monotonic()
        while attempt.running:
            self._next()
            now = time.monotonic()
            for link in self._up():  # spares, too: the next attempt would wait for one that is gone
                if now - link.heard > self.job.lease_s and self.inbox.empty():
                    self._lose(link, f"no word from it for {self.job.lease_s:g} s")
            if attempt.deadline is not None and now > attempt.deadline and not attempt.killed:
                if attempt.asked:
                    say(f"not ended {self.job.grace_s:g} s after {attempt.asked}: killing it")
                self._kill()
            if self.job.rejoin_s is not None and now - looked > self.job.rejoin_s:
                looked = now
                self._reopen(self.job.rejoin_s / 2)
            self._take_back(attempt)

    def _take_back(self, attempt: Attempt) -> None:
        """Where hosts that came back make a larger world, have the run save and stop, to go on with them."""
        up = self._up()
        if self.job.rejoin_s is None or attempt.asked or attempt.deadline is not None or up == self._considered:
            return
        if size_of(self.job.progress) <= attempt.begun:
            return  # it is still starting: there is nothing to save, and hosts may come and go
        self._considered = up
        more = self._choose() if len(up) > len(attempt.links) else []
        if sum(link.slots for link in more) > attempt.size:
            names = ", ".join(link.host.name for link in more if link not in attempt.links)
            say(f"{names} is back: saving, then going on with {len(more)} of {len(self.job.hosts)} hosts")
            self._ask(attempt, "the return of a host", signal.SIGTERM)

    def _ask(self, attempt: Attempt, why: str, number: int) -> None:
        """Have every rank finish its step, save and leave, within the grace period."""
        attempt.asked, attempt.deadline = why, time.monotonic() + self.job.grace_s
        attempt.send(signal=number)

    def _kill(self) -> None:
        attempt = self.attempt
        assert attempt is not None
        if not attempt.killed:
            attempt.killed = True
            attempt.send(kill=1)

    # ------------------------------------------------------------------------------------------ events

    def _next(self, link: Link | None = None) -> Message | None:
        """Handle one event, or none within a moment; gives it back where it is a message of `link`."""
        self._beat()
        try:
            source, message = self.inbox.get(timeout=TICK_S)
        except queue.Empty:
            return None
        if source is None:
            assert message is not None
            self._on_signal(message["signal"])
        elif message is None:
            if source in self.links.values():
                self._lose(source, source.problem or "its connection or its keeper ended")
        elif "output" in message:
            self._print(source, message)
        elif "ended" in message:
            self._on_end(source, message["ended"])
        return message if source is link else None

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._beaten > self.job.lease_s / 5:
            self._beaten = now
            for link in self.links.values():
                if not link.closed:
                    link.send(beat=1)

    def _print(self, link: Link, message: Message) -> None:
        attempt = self.attempt
        first = attempt is None or attempt.links[0] is link
        stream = sys.stdout if message["output"] == 1 else sys.stderr
        tell(message["text"] if first else f"[{link.host.name}] {message['text']}", stream)

    def _on_signal(self, number: int) -> None:
        name, attempt = signal.Signals(number).name, self.attempt
        self.signals.append(number)
        if attempt is None or not attempt.started or not attempt.running:
            raise _Stopped
        if len(self.signals) > 1:
            say(f"{name} once more: killing the run")
            return self._kill()
        say(f"{name}: the run finishes its step and saves, for at most {self.job.grace_s:g} s; once more to kill it")
        if attempt.asked:  # the ranks are at it; another signal would have them leave at once
            attempt.deadline = time.monotonic() + self.job.grace_s
        else:
            self._ask(attempt, name, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def _on_end(self, link: Link, ended: Message) -> None:
        attempt = self.attempt
        if attempt is None or link not in attempt.running:
            return
        attempt.ended[link] = ended
        ended["ours"] = attempt.killed and "failures" not in ended  # ended by this launcher
        if not ended["clean"]:
            say(f"{link.host.name}: a process could not be killed; it may wait for a device or a file system")
        if ended["code"] == 0 or attempt.killed:
            return
        if first_code(ended) < 0:
            return self._kill()
        # It may have failed because of a rank on another host, whose agent is about to say so.
        attempt.deadline = min(attempt.deadline or float("inf"), time.monotonic() + WORD_S)

    # ------------------------------------------------------------------------------------------ between attempts

    def _conclude(self, attempt: Attempt) -> int | None:
        """The exit code, where the run is over; None where it is to go on."""
        failures, lost = attempt.failures(), bool(attempt.lost)
        if not failures and not lost and not attempt.killed:
            stopped = any(ended["stopped"] for ended in attempt.ended.values())
            if stopped and attempt.asked and not self.signals:
                return None  # to go on with more hosts, which is none of the restarts
            return STOPPED if stopped else 0
        if failures and not lost and first_code(failures[0][1]) == MISTAKE:
            return MISTAKE
        if failures and self.job.once:
            return FAILED
        if self.signals:
            say("ended before all was saved; the same command goes on from the newest checkpoint")
            return 128 + self.signals[0]
        if attempt.asked and failures and not lost and all(first_code(ended) in ASKED for _, ended in failures):
            return None  # the run was just ending: what is left of it is done by the next attempt
        if failures and not lost:
            say(f"lost {describe(*failures[0])}")
        return self._count(own=bool(failures) and not lost and first_code(failures[0][1]) > 0)

    def _count(self, *, own: bool) -> int | None:
        """Whether to start again after a loss: None, or the exit code of a run that is given up."""
        newest = find_newest(self.job.checkpoints)[0]
        if own and self._own_failure == newest:
            say("the run failed twice by itself and saved nothing in between; not started again")
            return FAILED
        self._own_failure = newest if own else self._own_failure
        if self.restarts >= self.job.restarts:
            say(f"given up after {self.restarts} restarts; the same command goes on from the newest checkpoint")
            return FAILED
        self.restarts += 1
        return None

    def _leave(self) -> None:
        """Cut every link; the keepers kill what is left."""
        for link in self.links.values():
            link.close()
        for link in self.links.values():
            link.wait(5.0)

    @contextmanager
    def _catching(self) -> Iterator[None]:
        """Put signals among the events."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        put = lambda number, _: self.inbox.put((None, {"signal": number}))  # noqa: E731
        before = {number: signal.signal(number, put) for number in CAUGHT}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Stopped(Exception):
    """A signal came while nothing ran."""


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
