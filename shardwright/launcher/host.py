"""What `launch` runs on each host: it starts the agent of an attempt, watches it, and leaves nothing behind.

`python -m shardwright.launcher.host`, started by hosts.py as a child or over ssh. It listens on no port: orders come as
lines of JSON on one pipe, answers go out on another (over ssh standard input and output). When the pipe closes, or
nothing has come for the agreed time, all processes of the run on this host are killed: the launcher is gone or cut off
and may start them elsewhere, and two of the same run must not write into one folder.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from shardwright.launcher.leash import STOPPED, WORDS, adopt_orphans, end_descendants
from shardwright.launcher.network import Route, bind, find_way_out, loopback

TICK_S = 0.1
Message = dict[str, Any]


class Channel:
    """Lines of JSON to and from the launcher; remembers when it was last heard."""

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO) -> None:
        self._in, self._out, self._lock = incoming, outgoing, threading.Lock()
        self.orders: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.heard = time.monotonic()
        self.closed = False

    def read(self) -> None:
        """Take orders until the other side closes; None is put then."""
        with suppress(OSError, ValueError):
            for line in self._in:
                self.heard = time.monotonic()
                order = json.loads(line)
                if "beat" not in order:
                    self.orders.put(order)
        self.closed = True
        self.orders.put(None)

    def send(self, **message: Any) -> None:
        """Tell the launcher; where it is gone, the end of orders says so soon enough."""
        with self._lock, suppress(OSError, ValueError):
            self._out.write(json.dumps(message).encode() + b"\n")
            self._out.flush()


class Agent:
    """The agent of one attempt, its ranks, and the folder in which they say how they ended."""

    def __init__(
        self,
        order: Message,
        environment: Mapping[str, str],
        listening: socket.socket | None,
        channel: Channel | None,
    ) -> None:
        self._words = tempfile.TemporaryDirectory(prefix="shardwright-")
        self.folder = Path(self._words.name)
        self.report = self.folder / "report.json"
        sockets = () if listening is None else (listening.fileno(),)
        self.process = subprocess.Popen(
            agent_command(order, self.report, sockets[0] if sockets else -1),
            env={**environment, WORDS: str(self.folder)},
            stdin=subprocess.DEVNULL,
            stdout=None if channel is None else subprocess.PIPE,
            stderr=None if channel is None else subprocess.PIPE,
            pass_fds=sockets,
            start_new_session=True,  # Ctrl-C is for the launcher alone, which passes it on once
        )
        self.pipes = [] if channel is None else [self._forward(channel, number) for number in (1, 2)]
        if listening is not None:
            listening.close()  # the agent has it

    def _forward(self, channel: Channel, number: int) -> threading.Thread:
        pipe = self.process.stdout if number == 1 else self.process.stderr
        assert pipe is not None

        def forward() -> None:
            for line in pipe:
                channel.send(output=number, text=line.decode(errors="replace").rstrip("\n"))

        thread = threading.Thread(target=forward, daemon=True)
        thread.start()
        return thread

    def pass_on(self, number: signal.Signals) -> None:
        """Send a signal to each rank: past torchrun, which would end all when the first of them leaves.

        Where no rank is started yet, the agent is ended.
        """
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children() or [self.process]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def close(self) -> Message:
        """Kill what is left; how the attempt ended on this host."""
        if self.process.poll() is None:
            self.process.kill()
        code = self.process.wait()
        clean = end_descendants()
        for thread in self.pipes:
            thread.join(5.0)
        report: Message = {}
        with suppress(OSError, ValueError):
            report = json.loads(self.report.read_text())
        stopped = sum(name.name.isdecimal() and name.read_text() == str(STOPPED) for name in self.folder.iterdir())
        self._words.cleanup()
        return {"code": code, "stopped": stopped, "clean": clean, **report}

    def discard(self) -> None:
        """Remove its folder; nobody asks any more how it ended."""
        shutil.rmtree(self.folder, ignore_errors=True)


def agent_command(order: Message, report: Path, listening: int) -> list[str]:
    """The agent's command line."""
    options = {
        "nnodes": order["nodes"],
        "node-rank": order["node"],
        "nproc-per-node": order["processes"],
        "master-addr": order["master"],
        "master-port": order["port"],
        "max-restarts": 0,
        "rdzv-id": order["attempt"],
    }
    agent = [sys.executable, "-m", "shardwright.launcher.agent", str(report), str(listening)]
    return [*agent, *(f"--{name}={value}" for name, value in options.items()), "-m", *order["command"]]


class Keeper:
    """The host's side of a launch."""

    def __init__(self, channel: Channel, *, forwards: bool) -> None:
        self.channel, self._forwards = channel, forwards
        self.agent: Agent | None = None
        self._listening: socket.socket | None = None
        self._lock: BinaryIO | None = None
        self._place = Path()
        self._variables: dict[str, str] = {}
        self._lease_s = 30.0

    def run(self) -> None:
        """Follow orders until there are none."""
        threading.Thread(target=self.channel.read, daemon=True).start()
        begin = self.channel.orders.get()
        if begin is None or not self._begin(begin):
            return
        threading.Thread(target=self._guard, daemon=True).start()
        while True:
            try:
                order = self.channel.orders.get(timeout=TICK_S)
            except queue.Empty:
                self._look()
                continue
            if order is None:
                return
            self._follow(order)

    def _begin(self, order: Message) -> bool:
        """Enter the working folder, and wait until an earlier process of this launch on this host is gone."""
        self._lease_s = float(order["lease"])
        try:
            os.chdir(order["folder"])
            self._lock = self._take_lock(order["launch"])
        except OSError as error:
            self.channel.send(failed=f"{order['folder']}: {error.strerror or error}")
            return False
        os.environ.update(order["environment"])
        self.channel.send(hello={"name": socket.gethostname(), "devices": count_devices(), "pid": os.getpid()})
        threading.Thread(target=self._beat, daemon=True).start()
        return True

    def _take_lock(self, launch: str) -> BinaryIO:
        """Held for as long as this keeper's processes live; the file is removed at the end."""
        self._place = Path(tempfile.gettempdir()) / f"shardwright-{os.getuid()}-{launch}-{socket.gethostname()}.lock"
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.fdopen(os.open(self._place, flags, 0o600), "r+b", buffering=0)
            while not _try_lock(file):
                if self.channel.closed or time.monotonic() - self.channel.heard > self._lease_s:
                    raise OSError(f"{self._place}: another keeper of this launch does not end")
                time.sleep(TICK_S)
            with suppress(OSError):
                if os.stat(self._place).st_ino == os.fstat(file.fileno()).st_ino:
                    return file
            file.close()  # of a file that its last holder removed

    def close(self) -> None:
        """Leave nothing: no process, no file."""
        gone = end_descendants()
        if self.agent is not None:
            self.agent.discard()
        if gone and self._lock is not None:
            self._place.unlink(missing_ok=True)

    def _beat(self) -> None:
        while True:
            time.sleep(self._lease_s / 5)
            self.channel.send(beat=1)

    def _guard(self) -> None:
        """From a thread of its own, since the main one may wait for a pipe that nobody empties."""
        while time.monotonic() - self.channel.heard < self._lease_s:
            time.sleep(min(self._lease_s / 10, 1.0))
        self.close()
        os._exit(1)

    def _follow(self, order: Message) -> None:
        if "meet" in order:
            self._meet(**order["meet"])
        elif "start" in order:
            channel = self.channel if self._forwards else None
            environment = {**self._variables, **os.environ}  # where a user chose, that stands
            self.agent, self._listening = Agent(order["start"], environment, self._listening, channel), None
        elif "signal" in order and self.agent is not None:
            self.agent.pass_on(signal.Signals(order["signal"]))
        elif "kill" in order and self.agent is not None:
            self._end()

    def _meet(self, peer: str | None, leads: bool) -> None:
        """Find the way to the other hosts; the first host also opens the port at which all meet."""
        try:
            route = loopback() if peer is None else self._way_out(peer)
            self._variables = interface_variables(route.interface)
            if leads:
                self._listening = bind(route.address)
                self._listening.set_inheritable(True)
            port = self._listening.getsockname()[1] if self._listening is not None and leads else None
        except (OSError, ValueError) as error:
            self.channel.send(met={"problem": str(error)})
            return
        self.channel.send(met={"interface": route.interface, "address": route.address, "port": port})

    def _way_out(self, peer: str) -> Route:
        """The way to another host; ValueError where the environment has gloo stay on this one."""
        chosen = os.environ.get("GLOO_SOCKET_IFNAME", "")
        if chosen.partition(",")[0] == loopback().interface:
            raise ValueError(f"GLOO_SOCKET_IFNAME={chosen}: reaches this host only; unset it, and the launcher chooses")
        return find_way_out(peer)

    def _look(self) -> None:
        if self.agent is not None and self.agent.process.poll() is not None:
            self._end()

    def _end(self) -> None:
        assert self.agent is not None
        ended = self.agent.close()
        self.agent = None
        self.channel.send(ended=ended)


def _try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def interface_variables(interface: str) -> dict[str, str]:
    """What makes gloo and NCCL use one interface, and torchrun's own default of threads."""
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}", "OMP_NUM_THREADS": "1"}


def count_devices() -> int:
    """GPUs of this host that a process may use; torch is not imported for that."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip() not in ("", "-1")])
    with suppress(Exception):  # no library or no driver: no GPU
        import pynvml

        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    return 0


def main() -> None:
    """Serve one launcher."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pipes", help="descriptors to read orders from and answer to; default standard input, output")
    pipes = parser.parse_args().pipes
    incoming, outgoing = map(int, pipes.split(",")) if pipes else (os.dup(0), os.dup(1))
    if not pipes:  # nothing else may write between the lines
        os.dup2(2, 1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ignore)  # orders come from the launcher; SIG_IGN itself would be inherited by the ranks
    adopt_orphans()
    keeper = Keeper(Channel(os.fdopen(incoming, "rb"), os.fdopen(outgoing, "wb")), forwards=not pipes)
    try:
        keeper.run()
    finally:
        keeper.close()
        os._exit(0)  # threads may wait for pipes


def _ignore(*_: object) -> None:
    """A handler in place of SIG_IGN."""


if __name__ == "__main__":
    main()
