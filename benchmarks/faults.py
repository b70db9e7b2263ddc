"""Faults at random moments of runs under `shardwright launch`; each has to end with the curve of an uninterrupted run.

What can go wrong is in tests/faults/faults.py: processes, hosts in network namespaces, their network, signals, the
disk, checkpoints, servers of shards. A trial is a run of its own, held against one process that nothing happened to:
every step's loss and evaluation to 1e-5, every step's sequence numbers exactly. Trials go round-robin over the faults.
Each is one line in runs/faults/points.jsonl by revision, fault and number, and not done again: the script can be
stopped and started. The page holds the trials of the newest revision of each fault. Ends with 1 where one failed.

Examples: python benchmarks/faults.py --limit-minutes 30
          python benchmarks/faults.py --only 'network*' --repeats 3
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes started from here

from common import ROOT, add_line, facts_table, machine, parser, publish, read_lines, say, table  # noqa: E402
from kill import revision_of_tree  # noqa: E402

sys.path.insert(0, str(ROOT))  # for `tests`, which is not installed

from tests import netns  # noqa: E402
from tests.equivalence.cells import LOSS  # noqa: E402
from tests.equivalence.matrix import prepare_text  # noqa: E402
from tests.faults.faults import EVERY, FAULTS, LEASE_S, PAUSE_S, Outcome, Stage, Texts, build_texts  # noqa: E402

Line = dict[str, Any]
SMOKE = ("rank killed", "checkpoint torn")


def main() -> int:
    """Run what has no line yet, write the page; 1 where a trial failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the runs and networks end as well
    options = arguments()
    log, revision = options.runs / "points.jsonl", revision_of_tree()
    skipped = {name: reason for name in options.faults if (reason := FAULTS[name].why_not()) is not None}
    for name, reason in skipped.items():
        say(f"{name}: skipped: {reason}")
    if not options.page:
        run_trials([name for name in options.faults if name not in skipped], log, revision, options)
    lines = newest(read_lines(log))
    write_page(lines, skipped, options)
    return int(any(not line["passed"] for line in lines))


def arguments() -> argparse.Namespace:
    """The command line."""
    p = parser(__doc__, "faults.md")
    p.add_argument("--repeats", type=int, default=10, help="trials of each fault")
    p.add_argument("--only", action="append", metavar="FAULT", help=f"of: {', '.join(FAULTS)}; * is any")
    p.add_argument("--steps", type=int, default=24, help="steps of a run")
    p.add_argument("--seed", type=int, default=0, help="of the random moments")
    p.add_argument("--limit-minutes", type=float, default=None, help="start no trial after this time")
    p.add_argument("--page", action="store_true", help="write the page from what is there and run none")
    p.add_argument("--runs", type=Path, default=ROOT / "runs" / "faults", help="where the runs lie")
    options = p.parse_args()
    options.runs = options.runs.resolve()
    if options.smoke:
        options.only, options.repeats, options.steps = options.only or SMOKE, 1, 14
        options.runs = options.runs.with_name("faults-smoke")
        options.out = options.runs / "faults.md"
    wanted = options.only or ["*"]
    options.faults = [name for name in FAULTS if any(fnmatch.fnmatch(name, pattern) for pattern in wanted)]
    if not options.faults:
        sys.exit(f"faults: none is called {' or '.join(wanted)}; there are {', '.join(FAULTS)}")
    return options


# ---------------------------------------------------------------------------------------------- running


def run_trials(names: Sequence[str], log: Path, revision: str, options: argparse.Namespace) -> None:
    """One after the other, a round over all faults before the next, until the time is over."""
    end = float("inf") if options.limit_minutes is None else time.monotonic() + 60 * options.limit_minutes
    done = {(line["fault"], line["number"]) for line in read_lines(log) if line["revision"] == revision}
    trials = [(name, number) for number in range(1, options.repeats + 1) for name in names]
    left = [trial for trial in trials if trial not in done]
    say(f"{revision}: {len(trials) - len(left)} of {len(trials)} trials are done")
    if not left:
        return
    folder = options.runs / revision.replace("+", "-") / f"{options.steps}-steps"
    texts = build_texts(prepare_text(options.runs / "text"), folder, options.steps)
    for name, number in left:
        if time.monotonic() > end:
            return say(f"{options.limit_minutes:g} minutes are over")
        begin, load = time.monotonic(), os.getloadavg()[0]
        outcome = trial(name, number, folder, texts, options)
        key = {"fault": name, "number": number, "revision": revision, "date": datetime.date.today().isoformat()}
        cost = {"passed": outcome.passed, "seconds": time.monotonic() - begin, "load": load}
        add_line(log, {**key, **outcome.record(), **cost})
        say(f"{name} {number}: {outcome.moment}: {in_words(outcome)}")


def trial(name: str, number: int, folder: Path, texts: Texts, options: argparse.Namespace) -> Outcome:
    """One fault in a folder of its own, which stays where it failed."""
    place = folder / f"{name.replace(' ', '-').replace(':', '')}-{number}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    rng = random.Random(f"{options.seed} {name} {number}")
    outcome = FAULTS[name].trial(Stage(place, texts, options.steps, rng, asynchronous=number % 2 == 1))
    if outcome.passed:
        shutil.rmtree(place)
    return outcome


def in_words(outcome: Outcome) -> str:
    """For the progress line."""
    words = f"{outcome.steps_lost} steps again, {outcome.data_lost} sequences lost, loss {outcome.difference:.1e}"
    times = f"heard after {outcome.detected_s:.1f} s, new step after {outcome.resumed_s:.1f} s"
    return f"{times}, {words}" if outcome.passed else f"FAILED: {outcome.problem or words}"


def newest(lines: Sequence[Line]) -> list[Line]:
    """Lines of the last revision that each fault was tried at, the last of each number."""
    last = {line["fault"]: line["revision"] for line in lines}
    kept = {(line["fault"], line["number"]): line for line in lines if line["revision"] == last[line["fault"]]}
    return list(kept.values())


# ------------------------------------------------------------------------------------------------- page


def write_page(lines: Sequence[Line], skipped: dict[str, str], options: argparse.Namespace) -> None:
    """The page and the last line."""
    revisions = ", ".join(sorted({line["revision"] for line in lines}))
    failed = [line for line in lines if not line["passed"]]
    facts = {**machine(), "commit": revisions, "processes": "gloo; two ranks of one thread, or one on each host"}
    facts |= {"load before a trial": spread_of(lines, "load", "{:.1f}")}
    facts["slow link by"] = "tc netem" if netns.has_netem() else "tests/cable.py; this kernel has no sch_netem"
    own = {name: [line for line in lines if line["fault"] == name] for name in FAULTS}
    parts = [introduction(options), facts_table(facts), verdict(own, failed, skipped, options)]
    parts += [table(HEADER, [row(name, found) for name, found in own.items() if found]), WORDS]
    parts += ["## What was shown", facts_table(shown(own))]
    figures = {
        "benchmark": "faults", "commit": revisions, "trials": len(lines), "passed": len(lines) - len(failed),
        "failed": [f"{line['fault']} {line['number']}" for line in failed],
        "data_lost": sum(line["data_lost"] for line in lines),
        "worst_difference": max((line["difference"] or 0.0 for line in lines), default=None),
        "trials_of": {name: len(found) for name, found in own.items()},
    }  # fmt: skip
    publish(options.out, "Faults at random moments", parts, figures)


def introduction(options: argparse.Namespace) -> str:
    """What was done."""
    return (
        f"Each trial is a run of {options.steps} steps of a tiny GPT-2 under `shardwright launch`, two processes on "
        "this machine or one on each of two hosts (three with a spare), which are network namespaces with an sshd "
        f"each. In every step one rank, another each time, is {1e3 * PAUSE_S:.0f} ms late; a checkpoint is due every "
        f"{EVERY} steps, written in the background in odd trials. The fault comes a random part of a step after a "
        "random step, or, where processes or hosts are killed, also while the run starts. Hosts count as lost after "
        f"{LEASE_S:g} s (`--lost-after`). The figures are those of one process that nothing happened to: the loss of "
        f"every step and every evaluation within {LOSS:g}, the sequence numbers of every step exactly."
    )


def verdict(
    own: dict[str, list[Line]], failed: Sequence[Line], skipped: dict[str, str], options: argparse.Namespace
) -> str:
    """How many passed; failures and what was not done, plainly."""
    trials = sum(map(len, own.values()))
    text = [f"**{trials - len(failed)} of {trials} trials lost nothing but time.**"]
    asked = [name for name in options.faults if name not in skipped]
    few = [name for name in asked if len(own[name]) < options.repeats]
    if few:
        which = "each fault" if few == asked else "; ".join(few)
        text.append(f"Fewer than the {options.repeats} trials that were asked for of {which} (column *n*).")
    text += [f"Not tried: {name}: {reason}." for name, reason in skipped.items()]
    words = [
        f"- **{line['fault']} {line['number']}** ({line['moment']}): {line['problem'] or 'another curve or other data'}"
        for line in failed
    ]
    return "\n\n".join([" ".join(text), *(["\n".join(words)] if words else [])])


HEADER = ("fault", "n", "passed", "detected after, s", "resumed after, s", "steps lost", "data lost", "loss differs by")
WORDS = (
    "Medians, and the worst in brackets. *Detected*: from the fault to the first line that tells of it; those that the "
    "run bears have none. *Resumed*: from the fault to the end of the first step that was not done before. Where the "
    "command is given again, it is at once. *Steps lost* are done again; *data lost* counts sequences that a step of "
    "the final curve lacks or has too many."
)


def row(name: str, lines: Sequence[Line]) -> list[Any]:
    """A fault in the table."""
    passed = sum(line["passed"] for line in lines)
    times = [spread_of(lines, key, "{:.1f}") for key in ("detected_s", "resumed_s")]
    lost = sum(line["data_lost"] for line in lines)
    worst = max((line["difference"] for line in lines if line["difference"] is not None), default=None)
    difference = "" if worst is None else f"{worst:.1e}"
    return [name, len(lines), passed, *times, spread_of(lines, "steps_lost", "{:g}"), lost, difference]


def spread_of(lines: Sequence[Line], key: str, form: str) -> str:
    """The median and the greatest."""
    values = sorted(line[key] for line in lines if line[key] is not None)
    if not values:
        return ""
    middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
    return f"{form.format(middle)} ({form.format(values[-1])})"


def shown(own: dict[str, list[Line]]) -> dict[str, str]:
    """What a user saw first in the first trial of each fault."""
    return {name: lines[0]["message"].replace("|", "/") for name, lines in own.items() if lines}


if __name__ == "__main__":
    sys.exit(main())
