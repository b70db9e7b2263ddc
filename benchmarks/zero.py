"""ZeRO stages on real ranks: peak bytes by rank and category beside formulas; bytes and time beside DeepSpeed.

memory: stages 0 (replicated), 1, 2 and 3 of this project and 1, 2, 3 of DeepSpeed; the most that live tensors took in
a step of four micro-batches (their storages, followed by a dispatch mode, not a guess), by category, beside the formula
of shardwright/estimate/memory.py and the ZeRO paper's figure for model states.
traffic: what the collectives of a step send, counted.
time: the same stages of both take turns in the same gloo processes, over the same model, weights and micro-batches;
the ratio is taken round by round. sums: again in bf16, with a DeepSpeed that adds up gradients in float32, as ours.
Losses have to agree, or the script ends with 1.
Each part at each number of processes and format is one JSON line in --points; what has its line for this revision is
not measured again. DeepSpeed is that of this environment (pip install -e '.[deepspeed]').

Example: python benchmarks/zero.py --processes 2 4 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before torch and DeepSpeed are imported, in the processes started from here.
os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

from common import ROOT, add_line, machine, parser, read_lines, say  # noqa: E402
from kill import revision_of_tree  # noqa: E402

sys.path.insert(0, str(ROOT))  # for `tests` and `benchmarks`, which are not installed

from benchmarks.zero_contenders import Job  # noqa: E402
from benchmarks.zero_report import AGREES, names_of, write_page  # noqa: E402
from tests.ranks import Ranks  # noqa: E402

PARTS = ("memory", "traffic", "time", "sums")
PATIENCE = 580.0  # seconds that a point may take


def main() -> int:
    """Measure what has no line yet, write the page; 1 where losses differ."""
    options = arguments()
    revision = revision_of_tree()
    run_points(options, revision)
    points = newest(read_lines(options.points), options)
    if not points:
        sys.exit("zero: no points yet")
    return write_page(points, job_of(options, "fp32"), None if options.smoke else options.out)


def arguments() -> argparse.Namespace:
    """The command line."""
    p = parser(__doc__, "zero.md")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    p.add_argument("--precision", nargs="+", choices=list(AGREES), default=list(AGREES))
    p.add_argument("--layers", type=int, default=6, help="of the GPT-2")
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--vocab-size", type=int, default=2048)
    p.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    p.add_argument("--batch", type=int, default=2, help="sequences of a micro-batch; a step has four of them")
    p.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    p.add_argument("--steps", type=int, default=2, help="steps of a turn")
    p.add_argument("--beside", default="", help="what else ran on the machine while time was measured, for the page")
    p.add_argument("--points", type=Path, default=ROOT / "runs" / "zero" / "points.jsonl", help="lines of results")
    p.add_argument("--page", action="store_true", help="write the page from what is there and measure nothing")
    options = p.parse_args()
    if options.smoke:
        options.processes, options.layers, options.width, options.vocab_size = [2], 2, 64, 128
        options.length, options.batch, options.rounds, options.steps = 16, 1, 2, 1
        options.points = options.points.with_name("smoke.jsonl")
    return options


# ---------------------------------------------------------------------------------------------- measuring


def run_points(options: argparse.Namespace, revision: str) -> None:
    """Every point without a line, each in processes of its own."""
    done = {key_of(line) for line in read_lines(options.points) if line["revision"] == revision}
    for processes, precision, part in wanted(options):
        job = job_of(options, precision)
        point = {"part": part, "processes": processes, "precision": precision, "job": asdict(job)}
        if options.page or key_of(point) in done:
            continue
        function = "time" if part == "sums" else part
        say(f"{part}, {processes} processes, {precision}")
        ranks = measure(f"benchmarks.zero_contenders:measure_{function}", processes, job, names_of(part))
        facts = {key: value for key, value in machine().items() if key != "threads"}
        line = {**point, "revision": revision, "facts": facts, "beside": options.beside, "ranks": ranks}
        add_line(options.points, line)


def wanted(options: argparse.Namespace) -> list[tuple[int, str, str]]:
    """(processes, precision, part) of every point."""
    return [
        (n, form, part)
        for part in options.parts
        for n in options.processes
        for form in options.precision
        if part != "sums" or form == "bf16"
    ]


def job_of(options: argparse.Namespace, precision: str) -> Job:
    """What the contenders train."""
    names = ("layers", "width", "vocab_size", "length", "batch", "steps", "rounds")
    return Job(precision=precision, **{name: getattr(options, name) for name in names})


def measure(function: str, processes: int, job: Job, names: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """What each rank found. DeepSpeed remembers groups of its process, hence new ones each time."""
    pool = Ranks()
    try:
        return pool.run(processes, function, job, names, timeout=PATIENCE)
    finally:
        pool.close()


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two points the same; how often it was timed is no part of memory."""
    job = {k: v for k, v in line["job"].items() if line["part"] in ("time", "sums") or k not in ("rounds", "steps")}
    return line["part"], line["processes"], line["precision"], json.dumps(job, sort_keys=True)


def newest(lines: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The last line of each point that was asked for, in the order of the page."""
    last = {key_of(line): line for line in lines}
    asked = [
        key_of({"part": part, "processes": n, "precision": form, "job": asdict(job_of(options, form))})
        for n, form, part in wanted(options)
    ]
    return [last[key] for key in asked if key in last]


if __name__ == "__main__":
    sys.exit(main())
