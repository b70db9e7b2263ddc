"""Runs under `shardwright launch` that are killed in places, for tests and for benchmarks/faults.py.

`Launch` starts the real command as a process of its own; what it runs on each rank is tests/faults/recorded.py: the
same `shardwright`, which also writes down the sequence numbers of every step. Faults are functions of a `Launch`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from shardwright.train.metrics import read_metrics
from tests import netns
from tests.faults.recorded import HOLD, LAUNCH, PAUSE
from tests.faults.test_lost_rank import MARK, marked

ROOT = Path(__file__).resolve().parents[2]
RECORDS = "records"


class Launch:
    """One `shardwright launch` over a config; none of its processes is left after `with`."""

    def __init__(
        self,
        folder: Path,
        raw: dict[str, Any],
        *options: str,
        hold: Sequence[int] = (),
        pause: float = 0.0,
        prefix: Sequence[str] = (),
    ):
        """`hold`: steps after which ranks wait for `release`. `pause`: seconds that a rank is late in each step.

        `prefix`: what the command is run by. A launch over the folder of an earlier one goes on with its run.
        """
        self.folder, self.run, self.mark = folder, Path(raw["run"]), uuid.uuid4().hex
        (folder / RECORDS).mkdir(exist_ok=True)
        number = len(list(folder.glob("output-*.txt")))
        self.output, path = folder / f"output-{number}.txt", folder / "config.yaml"
        path.write_text(yaml.safe_dump(raw))
        self.environment = {MARK: self.mark, "SHARDWRIGHT_TEST_RECORDS": str(folder / RECORDS)}
        self.environment |= {HOLD: ",".join(map(str, hold)), LAUNCH: str(number), PAUSE: str(pause)}
        for mark in [*(folder / RECORDS).glob("held-*"), *(folder / RECORDS).glob("go-*")]:
            mark.unlink()
        names = [f"--env={name}" for name in self.environment] if any("--hosts" in o for o in options) else []
        command = [sys.executable, "-m", "tests.faults.recorded", "launch", *options, *names, str(path)]
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                [*prefix, *command], cwd=ROOT, stdout=file, stderr=file, env={**os.environ, **self.environment}
            )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pid in marked(self.mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.output.read_text(errors="replace")

    @property
    def lines(self) -> list[str]:
        """Its own lines, one for each event."""
        return [
            line.removeprefix("shardwright: ") for line in self.text.splitlines() if line.startswith("shardwright:")
        ]

    def wait_for(self, condition: Any, seconds: float = 300.0) -> Any:
        """What `condition()` gives once it is true; AssertionError with the output where the launch ends before."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None  # before the look: it may be the last thing that it says
            if answer := condition():
                return answer
            assert not ended and time.monotonic() < deadline, self.text
            time.sleep(0.02)

    def wait_held(self, step: int, seconds: float = 300.0) -> None:
        """Until every rank waits after a step that it was to be held at."""
        self.wait_for(lambda: len(list((self.folder / RECORDS).glob(f"held-{step}-*"))) == self.world(), seconds)

    def wait_line(self, words: str, seconds: float = 300.0) -> str:
        """The launcher's line that has these words, once it is there."""
        return self.wait_for(lambda: next((line for line in self.lines if words in line), None), seconds)

    def world(self) -> int:
        """Processes of the attempt that is running or ran last."""
        sizes = re.findall(r"(\d+) process(?:es)?", "\n".join(self.lines))
        return int(sizes[-1]) if sizes else -1

    def release(self, step: int) -> None:
        """Let ranks that are held after a step go on; none is held there again."""
        (self.folder / RECORDS / f"go-{step}").touch()

    def finish(self, seconds: float = 300.0) -> int:
        """Its exit code; AssertionError where anything of it is left."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.text) from None
        deadline = time.monotonic() + 30
        while left := marked(self.mark):
            assert time.monotonic() < deadline, (left.keys(), self.text)
            time.sleep(0.05)
        return code

    def pids(self, kind: str, **variables: str) -> list[int]:
        """Processes of the launch with a word in their command line and these variables set, oldest first."""
        found = []
        for pid, environment in sorted(marked(self.mark).items()):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if kind.encode() in words and all(environment.get(k) == v for k, v in variables.items()):
                    found.append(pid)
        return found

    def records(self) -> list[dict[str, Any]]:
        """metrics.jsonl: the last record of each step."""
        return read_metrics(self.run)

    def steps(self) -> list[dict[str, Any]]:
        """What each rank wrote after each step, of all launches over this folder; see recorded.py."""
        return recorded_steps(self.folder / RECORDS)

    def sequences(self) -> dict[int, list[int]]:
        """Sequence numbers of each step, over all ranks, as the last attempt that made the step took them."""
        return recorded_sequences(self.folder / RECORDS)


def recorded_steps(folder: Path) -> list[dict[str, Any]]:
    """What ranks have written into a folder, line by line."""
    found = []
    for file in sorted(folder.glob("rank-*")):
        for line in file.read_text().splitlines():
            with suppress(ValueError):  # cut off by the kill
                found.append(json.loads(line))
    return found


def recorded_sequences(folder: Path) -> dict[int, list[int]]:
    """Sequence numbers of each step that ranks have written into a folder; those of the last attempt that made it."""
    steps: dict[int, dict[int, list[int]]] = {}
    for record in recorded_steps(folder):
        steps.setdefault(record["step"], {}).setdefault(record["attempt"], []).extend(record["sequences"])
    return {step: sorted(attempts[max(attempts)]) for step, attempts in steps.items()}


def over_hosts(net: netns.Network, folder: Path, slots: int, *more: str) -> list[str]:
    """What `launch` is told of the hosts of a network."""
    hosts = netns.hosts_file(folder / "hosts", net.hosts, slots)
    return ["--hosts", str(hosts), "--ssh", f"ssh -F {net.ssh_config}", *more]


def kill_rank(launch: Launch, rank: int) -> None:
    """kill -9 of one rank."""
    os.kill(launch.pids("train", RANK=str(rank))[0], signal.SIGKILL)


def kill_agent(launch: Launch, number: int = 0) -> None:
    """kill -9 of a torchrun agent, the `number`-th of all."""
    os.kill(launch.pids("shardwright.launcher.agent")[number], signal.SIGKILL)


def kill_keeper(launch: Launch, number: int = 0) -> None:
    """kill -9 of what the launcher runs on a host, the `number`-th of all."""
    os.kill(launch.pids("shardwright.launcher.host")[number], signal.SIGKILL)


def expected_sequences(steps: int, batch: int) -> dict[int, list[int]]:
    """Those of a run that nothing happened to: step s takes the s-th global batch."""
    return {step: list(range((step - 1) * batch, step * batch)) for step in range(1, steps + 1)}
