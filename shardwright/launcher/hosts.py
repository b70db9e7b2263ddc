"""The hosts of a launch: the file that names them, and the link to the keeper (host.py) on each.

Under supervise.py. A link is a child process: the keeper itself on this machine, or an ssh client that runs it on
another. ssh is called with a list of arguments; the one string that a remote shell reads is quoted word by word, and
nothing of a config is in it.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwright.config import ConfigError
from shardwright.launcher.world import is_loopback

Message = dict[str, Any]
KEEPER = "shardwright.launcher.host"
LAST_WORDS_S = 2.0
SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=10")


@dataclass(frozen=True)
class Host:
    """One machine: `name` as ssh takes it, `address` by which other hosts reach it, `slots` processes (None: ask)."""

    name: str
    address: str = ""
    slots: int | None = None
    port: int | None = None
    local: bool = False

    @property
    def meets_at(self) -> str:
        """Name or address for the run's own connections."""
        return self.address or self.name.rpartition("@")[2]


def read_hosts(path: str | Path) -> list[Host]:
    """The hosts of a file; ConfigError names the line that is wrong.

    A line is `NAME [slots=N] [port=N] [address=A]`, NAME being anything that ssh takes (`user@host`, an alias of
    ~/.ssh/config); DeepSpeed's hostfiles are of this form. An IPv6 address may stand in brackets. Empty lines and
    comments behind # are left out.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hosts {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if words:
            host = _parse(words, f"{path} line {number}")
            if any(host.meets_at == other.meets_at for other in hosts):
                raise ConfigError(f"{path} line {number}: {host.name} stands twice; keep one line, with slots=N")
            hosts.append(host)
    if not hosts:
        raise ConfigError(f"{path}: names no host; expected lines such as: node1 slots=8")
    for host in hosts if len(hosts) > 1 else []:
        if is_loopback(host.meets_at):
            raise ConfigError(f"{path}: {host.name} is this machine only; name it as the other hosts reach it")
        if "%" in host.meets_at:
            raise ConfigError(
                f"{path}: {host.meets_at} is known on one link of one host only; give another address of {host.name}"
            )
    return hosts


def _parse(words: Sequence[str], where: str) -> Host:
    name, *settings = words
    name = _bare(name)
    if name.startswith("-") or not name.isprintable():
        raise ConfigError(f"{where}: {name!r} is no host name")
    if set("[]") & set(name):
        raise ConfigError(f"{where}: {name!r} is no host name; expected such as fd00::1 slots=8 port=2222")
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if key not in ("slots", "port", "address") or not equals or key in given:
            raise ConfigError(f"{where}: {setting!r}: expected slots=N, port=N or address=A, each once")
        if key != "address" and not (value.isdecimal() and int(value) > 0):
            raise ConfigError(f"{where}: {setting!r}: expected a whole number from 1")
        given[key] = _bare(value) if key == "address" else int(value)
    return Host(name, **given)


def _bare(name: str) -> str:
    """Without the brackets that IPv6 addresses have in other places: ssh and torch take `me@fd00::1`."""
    return re.sub(r"(^|@)\[([^\]]*)\]$", r"\1\2", name)


def keeper_command(host: Host, folder: str, python: str, ssh: Sequence[str] = SSH) -> list[str]:
    """The command that runs the keeper there."""
    if host.local:
        return [sys.executable, "-m", KEEPER]
    words = " && ".join([shlex.join(["cd", "--", folder]), "exec " + shlex.join([python, "-m", KEEPER])])
    port = [] if host.port is None else ["-p", str(host.port)]
    return [*ssh, *port, host.name, words]


@dataclass(eq=False)
class Link:
    """The keeper of one host, as long as it answers; what it says goes to `inbox` as (link, message), None at its end.

    A link is used once: a host that is lost gets a new one.
    """

    host: Host
    inbox: queue.SimpleQueue[tuple[Any, Message | None]]
    command: Sequence[str]
    heard: float = field(default_factory=time.monotonic)
    hello: Message | None = None
    problem: str = ""  # the last words before it ended
    closed: bool = False

    def open(self, begin: Message) -> None:
        """Start it and give it the first order."""
        here, there = os.pipe(), os.pipe()  # orders, answers
        if self.host.local:  # the run writes to this terminal itself
            pipes: dict[str, Any] = {"pass_fds": (here[0], there[1]), "stdin": subprocess.DEVNULL}
            command = [*self.command, "--pipes", f"{here[0]},{there[1]}"]
        else:
            pipes, command = {"stdin": here[0], "stdout": there[1], "stderr": subprocess.PIPE}, list(self.command)
        try:
            self._process = subprocess.Popen(command, start_new_session=True, **pipes)
        except OSError as error:
            raise ConfigError(f"{command[0]}: cannot be started: {error.strerror}") from None
        finally:
            os.close(here[0])
            os.close(there[1])
        self._orders, self._answers = os.fdopen(here[1], "wb", buffering=0), os.fdopen(there[0], "rb")
        listener = threading.Thread(target=self._listen, daemon=True) if self._process.stderr is not None else None
        if listener is not None:
            listener.start()
        threading.Thread(target=self._read, args=(listener,), daemon=True).start()
        self.send(**begin)

    @property
    def up(self) -> bool:
        """Whether its keeper has answered and not left."""
        return self.hello is not None and not self.closed

    @property
    def slots(self) -> int:
        """Processes that the host takes: as said, or its GPUs, or one."""
        return self.host.slots or (self.hello or {}).get("devices") or 1

    def send(self, **order: Any) -> None:
        """Give an order; a keeper that is gone misses it, and its end is in the inbox."""
        with suppress(OSError, ValueError):
            self._orders.write(json.dumps(order).encode() + b"\n")

    def close(self) -> None:
        """Cut it: the keeper kills what it has started, and leaves."""
        self.closed = True
        with suppress(OSError):
            self._orders.close()

    def wait(self, limit_s: float) -> None:
        """Let the process end, and end it where it does not."""
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, listener: threading.Thread | None) -> None:
        with suppress(OSError, ValueError):
            for line in self._answers:
                self.heard = time.monotonic()
                message = self._parse(line)
                if message is None:
                    continue
                if "hello" in message:
                    self.hello, self.problem = message["hello"], ""
                if "failed" in message:
                    self.problem = message["failed"]
                if "beat" not in message:
                    self.inbox.put((self, message))
        if listener is not None:
            listener.join(LAST_WORDS_S)  # ssh says why it ended
        self.closed = True
        self.inbox.put((self, None))

    def _parse(self, line: bytes) -> Message | None:
        """A line of the keeper's; None for what a login shell prints before it, as many clusters have it."""
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if isinstance(message, dict):
            return message
        if self.hello is None:
            self.problem = line.decode(errors="replace").strip() or self.problem
        return None

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode(errors="replace").rstrip()
            if text:
                self.problem = text if self.hello is None else self.problem
                if self.up:
                    with suppress(OSError):  # a terminal that is gone
                        print(f"[{self.host.name}] {text}", file=sys.stderr, flush=True)
