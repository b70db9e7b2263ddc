"""`shardwright` with a record: ranks of `train` write the sequence numbers of their steps, and `launch` starts this.

With SHARDWRIGHT_TEST_HOLD=N,M the ranks wait after those steps, before they save, until a file `go-N` is there, so that
a test can kill them at a known step. With SHARDWRIGHT_TEST_PAUSE=S one rank, another each step, is S seconds late, so
that the steps of a tiny model take long enough for a fault to fall into one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

FOLDER, HOLD, LIMIT_S = "SHARDWRIGHT_TEST_RECORDS", "SHARDWRIGHT_TEST_HOLD", 300.0
LAUNCH, PAUSE = "SHARDWRIGHT_TEST_LAUNCH", "SHARDWRIGHT_TEST_PAUSE"
ATTEMPTS = 1000  # more than a launch makes


def record_steps() -> None:
    """Have every Run write what it takes."""
    import torch

    from shardwright.train import run as loop

    folder = Path(os.environ[FOLDER])
    held = [int(step) for step in os.environ.get(HOLD, "").split(",") if step]
    rank, attempt = os.environ["RANK"], number_of_attempt()
    attempt += ATTEMPTS * int(os.environ.get(LAUNCH, "0"))
    pause = float(os.environ.get(PAUSE, "0"))

    class Recorded(loop.Run):
        def _one_step(self) -> None:
            if pause and self.position.step % self.world.size == self.world.rank:
                time.sleep(pause)
            super()._one_step()
            assert self.last is not None
            numbers = torch.cat([batch["sequence"] for batch in self.last.micro_batches])
            first = self.world.rank % (self.world.size // self.world.degree("data")) == 0
            own = numbers[numbers >= 0].tolist() if first else []  # ranks of one data index take the same
            with (folder / f"rank-{rank}").open("a") as file:
                record = {"attempt": attempt, "step": self.position.step, "sequences": own, "time": time.time()}
                file.write(json.dumps(record) + "\n")

        def _after_step(self) -> None:
            step = self.position.step
            if step in held:
                (folder / f"held-{step}-{rank}").touch()
                deadline = time.monotonic() + LIMIT_S
                while not (folder / f"go-{step}").exists() and time.monotonic() < deadline:
                    time.sleep(0.05)
            super()._after_step()

    loop.Run = Recorded  # type: ignore[misc]


def number_of_attempt() -> int:
    """Of `launch`, which counts them; of a SLURM job's start and the step in it."""
    if "SLURM_JOB_ID" in os.environ:
        return 1000 * int(os.environ.get("SLURM_RESTART_COUNT", "0")) + int(os.environ["SLURM_STEP_ID"])
    return int(os.environ["TORCHELASTIC_RUN_ID"])


def main() -> Any:
    """The command line, with a record."""
    from shardwright.launcher import cli, launch

    launch.MODULE = "tests.faults.recorded"
    if FOLDER in os.environ and sys.argv[1] == "train":
        from shardwright.launcher.world import enter_world

        enter_world()
        record_steps()
    cli.main()


if __name__ == "__main__":
    main()
