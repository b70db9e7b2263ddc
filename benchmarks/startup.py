"""From the command to the first step, beyond importing torch: one process, by turns with `import torch` alone.

The aim is under 5 seconds. A run of the debug config begins in a new folder each time; its first step has ended when
its line is printed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, Spread, english, facts_table, machine, parser, publish, say, table

AIM_S = 5.0


def main() -> int:
    """Take turns, write the page."""
    p = parser(__doc__, "startup.md")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--config", default="debug/gpt2", help="config of the run, by file or name")
    options = p.parse_args()
    if options.smoke:
        options.rounds, options.out = 1, None
    if options.config == "debug/gpt2":
        english()
    seconds: dict[str, list[float]] = {"import torch": [], "to the first step": [], "beyond torch": []}
    run_python("import torch")  # files into memory
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            seconds["import torch"].append(run_python("import torch"))
            seconds["to the first step"].append(first_step(options.config, Path(folder) / str(number)))
            seconds["beyond torch"].append(seconds["to the first step"][-1] - seconds["import torch"][-1])
            say(f"round {number + 1}: {', '.join(f'{name} {times[-1]:.2f} s' for name, times in seconds.items())}")
    spreads = {name: Spread.of(times) for name, times in seconds.items()}
    rows = [(name, *(f"{value:.2f} s" for value in spread)) for name, spread in spreads.items()]
    parts = [
        facts_table({**machine(), "rounds": str(options.rounds), "config": options.config}),
        table(["From the command", "Median", "Least", "Most"], rows),
        f"Aim: under {AIM_S:g} s beyond importing torch. Blocks are not compiled; that is counted by `step.py`.",
    ]
    publish(
        options.out, "From the command to the first step", parts, {"beyond_torch_s": spreads["beyond torch"].median}
    )
    return 0


def run_python(code: str) -> float:
    """Seconds that a new Python takes for some code."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.monotonic() - begin


def first_step(config: str, run: Path) -> float:
    """Seconds from the command to the line of its first step."""
    settings = [f"run={run}", "train.steps=1", "schedule.warmup_steps=0", "train.compile=false", "train.device=cpu"]
    command = [sys.executable, "-m", "shardwright", "train", config, *settings]
    begin = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if " step 1/1 " in line:
                seconds = time.monotonic() - begin
                process.stderr.read()  # the evaluation and the save
                return seconds
    raise SystemExit("".join(lines))


if __name__ == "__main__":
    sys.exit(main())
