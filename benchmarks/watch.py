"""What the watching of a run costs: steps of 4 processes with heartbeats and without, turn and turn about.

In one world of --processes ranks over gloo, turns of --seconds each go with the watch (a heartbeat every --every
seconds, half as far apart as by default so that several fall into a turn) and without any of it. Three figures: the
ratio of the median step times of turns that follow each other, which on a shared machine is mostly noise; that of the
processor time that rank 0 needs for a step, in all of its threads, which is less so; and what can be counted exactly,
the processor time of the watching thread over the time of its turns plus what a step's own marks take. Each pair of
turns is one JSON line in --points; the page is of all lines, and another start adds to them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import ROOT, Spread, english, facts_table, machine, parser, publish, say, table

sys.path.insert(0, str(ROOT))

SETTINGS = ["train.compile=false", "train.steps=1000000", "checkpoint.every=null", "log.every=1000000",
            "log.tensorboard=false", "train.device=cpu", "batch.sequences=32", "batch.micro=4"]  # fmt: skip
MARKS = 20_000


def main() -> int:
    """Start the ranks, or be one."""
    p = parser(__doc__, "watch.md")
    p.add_argument("--config", default="debug/gpt2", help="config of the run, by file or name")
    p.add_argument("--processes", type=int, default=4)
    p.add_argument("--pairs", type=int, default=6, help="turns with, and as many without")
    p.add_argument("--seconds", type=float, default=20.0, help="of a turn")
    p.add_argument("--every", type=float, default=5.0, help="seconds between heartbeats")
    p.add_argument("--points", type=Path, default=ROOT / "runs" / "watch" / "points.jsonl", help="lines of results")
    p.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = p.parse_args()
    if options.smoke:
        options.processes, options.pairs, options.seconds, options.every = 2, 1, 3.0, 1.0
        options.points, options.out = options.points.with_name("smoke.jsonl"), None
    if options.rank:
        return measure(options)
    if options.config == "debug/gpt2":
        english()
    start(options)
    report(options)
    return 0


def start(options: argparse.Namespace) -> None:
    """One world by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(options.processes), __file__, "--rank", "--config", options.config]  # fmt: skip
    for name in ("pairs", "seconds", "every", "points"):
        command += [f"--{name}", str(getattr(options, name))]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


class Nothing:
    """In place of the watch: marks nothing."""

    steps = 0

    def enter(self, phase: str) -> None:
        """Nothing."""

    @contextmanager
    def during(self, phase: str) -> Any:
        """Nothing."""
        yield


def measure(options: argparse.Namespace) -> int:
    """As one rank: pairs of turns."""
    from shardwright.checkpoint.ranks import open_ranks
    from shardwright.parallel.mesh import join_world
    from shardwright.train.build import build_corpus, fit_to_corpus
    from shardwright.train.run import Run
    from shardwright.train.settings import read_config
    from shardwright.train.signals import Signals
    from shardwright.train.watch import Watch

    folder = options.points.parent / "run"
    config = read_config(options.config, [*SETTINGS, f"run={folder}", f"watch.every={options.every}s"])
    corpus = build_corpus(config)
    fit_to_corpus(config, corpus)
    with (
        join_world(config.train.device, 1, config.parallel) as world,
        Signals() as signals,
        open_ranks() as ranks,
        Run(config, world, ranks, corpus, signals, Watch(config, world, ranks)) as run,
    ):
        run.begin(None)
        turn(run, world, 2.0)
        for number in range(options.pairs):
            found: dict[str, Any] = {"processes": world.size, "load": os.getloadavg()[0]}
            for watched in (True, False) if number % 2 else (False, True):
                if watched:
                    with Watch(config, world, ranks) as watch:
                        run.watch, watch.where = watch, run._where
                        clock = time.pthread_getcpuclockid(watch._thread.ident or 0)
                        found["with"] = turn(run, world, options.seconds)
                        found["thread_s"] = time.clock_gettime(clock)
                else:
                    run.watch = Nothing()  # type: ignore[assignment]
                    found["without"] = turn(run, world, options.seconds)
            found["mark_s"] = mark_seconds()
            if world.leads:
                with options.points.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
                medians = [found[name]["median"] for name in ("with", "without")]
                say(f"pair {number + 1}: {medians[0]:.4f} s a step with, {medians[1]:.4f} s without")
        run.watch = Nothing()  # type: ignore[assignment]
    return 0


def turn(run: Any, world: Any, seconds: float) -> dict[str, float]:
    """Steps for so long, as rank 0 decides; their number, time, and median."""
    times: list[float] = []
    begin, used = time.monotonic(), time.process_time()
    while True:
        at = time.perf_counter()
        run._one_step()
        run._after_step()
        times.append(time.perf_counter() - at)
        if len(times) % 8 == 0 and world.any(world.leads and time.monotonic() - begin > seconds):
            total = time.monotonic() - begin
            processor = (time.process_time() - used) / len(times)
            return {"steps": len(times), "seconds": total, "median": statistics.median(times), "processor": processor}


def mark_seconds() -> float:
    """What one mark of the training thread takes."""
    from shardwright.train.watch import Phase

    phase = Phase()
    begin = time.thread_time()
    for _ in range(MARKS):
        phase.enter("data")
    return (time.thread_time() - begin) / MARKS


def report(options: argparse.Namespace) -> None:
    """The page, of all pairs so far."""
    lines = [json.loads(line) for line in options.points.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["processes"] == options.processes]
    ratios = Spread.of(line["with"]["median"] / line["without"]["median"] - 1 for line in lines)
    processor = Spread.of(line["with"]["processor"] / line["without"]["processor"] - 1 for line in lines)
    counted = Spread.of(
        line["thread_s"] / line["with"]["seconds"] + 3 * line["mark_s"] / line["with"]["median"] for line in lines
    )
    rows = [
        ("step time with, over without", f"{ratios.median:+.2%}", f"{ratios.low:+.2%}", f"{ratios.high:+.2%}"),
        (
            "processor time of a step with, over without",
            f"{processor.median:+.2%}",
            f"{processor.low:+.2%}",
            f"{processor.high:+.2%}",
        ),
        ("counted: thread and marks, of the time", *(f"{value:.3%}" for value in counted)),
    ]
    steps = sum(line["with"]["steps"] + line["without"]["steps"] for line in lines)
    busy = statistics.median(line["load"] for line in lines)
    facts = {**machine(), "load during": f"{busy:.1f}", "processes": str(options.processes)}
    parts = [
        facts_table({**facts, "pairs of turns": str(len(lines)), "steps": str(steps), "config": options.config}),
        table(["Cost of the watching", "Median", "Least", "Most"], rows),
        f"A heartbeat every {options.every:g} s, {len(lines)} pairs of turns of some {options.seconds:g} s. The first "
        "row is what steps took; its spread says how much this machine's other work moved them. The last is the "
        "processor time of the thread of rank 0 that watches, and of the three marks of a step.",
    ]
    figures = {
        "ratio": ratios.median,
        "processor": processor.median,
        "counted": counted.median,
        "pairs": len(lines),
        "load": busy,
    }
    publish(options.out, "What the watching of a run costs", parts, figures)


if __name__ == "__main__":
    sys.exit(main())
