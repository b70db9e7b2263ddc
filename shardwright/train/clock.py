"""The wall clock of a run: seconds of training over all its starts, and the positions that a budget was given.

The first step of a start builds and compiles. In a run's first start that time is part of the budget but not of the
schedule; after a restart it is part of neither, so that no restart cuts the annealing short. Positions are written to
clock.jsonl as they are taken: a run that is killed replays those of the steps that it has to do again.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from shardwright.parallel.mesh import World
from shardwright.train.position import Position
from shardwright.train.schedule import Progress
from shardwright.train.writing import writing

CLOCK = "clock.jsonl"


class Clock:
    """Keeps `position.elapsed`, `position.startup` and the recorded positions of `progress`."""

    def __init__(self, folder: Path, progress: Progress, world: World) -> None:
        self.path, self.progress, self.world = folder / CLOCK, progress, world
        self.step_seconds = 0.0  # of the last step; 0 before there is one to go by
        self._begun = time.monotonic()
        self._zero = self._begun
        self._first = True

    def start(self, position: Position, *, replay: bool = True) -> None:
        """Begin to count: from where the command began in a new run, from now on in one that goes on.

        `replay`: take over what was recorded after the checkpoint; not after a roll-back, whose steps are new ones.
        """
        self._first = True
        if position.elapsed:
            self._zero = time.monotonic() - position.elapsed
            if replay:
                self._read(position.step)

    def finish_step(self, position: Position, begin: float) -> None:
        """A step that began at `begin` (monotonic seconds) is done."""
        now = time.monotonic()
        self.step_seconds = 0.0 if self._first else now - begin
        if self._first and position.elapsed:
            self._zero += now - begin
        position.elapsed = now - self._zero
        if self.progress.unit == "seconds":  # rank 0's clock is that of all
            self.step_seconds = self.world.share(self.step_seconds)
            position.elapsed = self.world.share(position.elapsed)
        if position.step == 1:
            position.startup = position.elapsed
        self._first = False

    def record(self, step: int) -> None:
        """Write down the position of 0-based step `step`, where it was taken from the clock just now."""
        if self.progress.unit != "seconds" or step != len(self.progress.trace) - 1 or not self.world.leads:
            return
        line = json.dumps({"step": step, "position": self.progress.trace[step]}) + "\n"
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def _read(self, step: int) -> None:
        """Take over the positions after a checkpoint of `step` steps; a line replaces what stood from its step on."""
        if self.progress.unit != "seconds" or not self.path.is_file():
            return
        trace: list[float] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError):  # a line torn by a kill
                found = json.loads(line)
                del trace[int(found["step"]) :]
                trace.append(float(found["position"]))
        if trace[:step] == self.progress.trace[:step]:
            self.progress.trace[:] = trace
