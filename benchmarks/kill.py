"""kill -9 at random points of a real run, also during a save; each is resumed and has to end as if nothing happened.

One uninterrupted run is the reference. Each kill is a run of its own: killed in the middle of a random step (odd
numbers) or while a random checkpoint is being written (even numbers), then started again by the same command. It has
to have every step once, with losses, gradient norms and learning rates bit-identical to the reference, the same
evaluation at the end and the same bits in every tensor of the last checkpoint.

Rows go to results/kill.md as they are done; a kill that has its row for this commit is not repeated, so the script can
itself be stopped and started. Example: python benchmarks/kill.py --kills 20
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, commit, english, facts_table, machine, parser, rounded, say, table

SETTINGS = [
    "model.width=128",
    "model.residual_dropout=0.1",
    "checkpoint.every=5",
    "evaluate.every=10",
    "evaluate.max_tokens=4096",
    "log.tensorboard=false",
    "train.compile=false",
    "train.threads=1",
]
HEADER = ("commit", "kill", "date", "killed", "left behind", "went on after step", "steps alike", "tensors alike", "")
PATIENCE = 600.0  # seconds that a run may take
EXACT = ("loss", "grad_norm", "lr", "loss_scale", "tokens", "val_loss", "val_bits_per_byte")


@dataclass(frozen=True)
class Outcome:
    """What a kill and the resumption after it came to."""

    killed: str
    left: str
    resumed: int
    steps: str
    tensors: str
    problem: str

    def row(self, revision: str, number: int) -> list[Any]:
        """A line of the table."""
        date = datetime.date.today().isoformat()
        verdict = self.problem or "bit-identical"
        return [revision, number, date, self.killed, self.left, self.resumed, self.steps, self.tensors, verdict]


def main() -> int:
    """Run what has no row yet; 1 where a run ended differently."""
    options = arguments()
    revision = revision_of_tree()
    folder = options.runs / revision.replace("+", "-")
    data = english()
    reference = folder / "reference"
    if not (reference / "result.json").is_file():
        say(f"the uninterrupted run: {options.steps} steps")
        shutil.rmtree(reference, ignore_errors=True)
        finish_run(reference, options, data)
    if not options.out.is_file():
        write_head(options)
    done = rows_done(options.out, revision)
    for number in range(1, options.kills + 1):
        if number in done:
            say(f"kill {number}: has its row for {revision}, skipped")
            continue
        outcome = one_kill(number, folder / f"kill-{number}", reference, options, data)
        append(options.out, outcome.row(revision, number))
        say(f"kill {number} of {options.kills}: {outcome.killed}; {outcome.problem or 'bit-identical'}")
    return conclude(options, revision)


def arguments() -> argparse.Namespace:
    """The command line."""
    p = parser(__doc__, "kill.md")
    p.add_argument("--kills", type=int, default=20, help="kills, each of a run of its own")
    p.add_argument("--steps", type=int, default=40, help="steps of a run")
    p.add_argument("--seed", type=int, default=0, help="of the random points")
    p.add_argument("--runs", type=Path, default=ROOT / "runs" / "kill", help="where the runs lie")
    options = p.parse_args()
    if options.smoke:
        options.kills, options.steps, options.runs = 2, 20, options.runs.with_name("kill-smoke")
        options.out = options.runs / "kill.md"
    return options


def revision_of_tree() -> str:
    """The commit, and where the tree differs from it a hash of the source: what a row is true of."""
    name = commit().replace(" ", "-")
    if not name.endswith("+"):
        return name
    source = hashlib.sha256()
    for path in sorted((ROOT / "shardwright").rglob("*.py")):
        source.update(path.read_bytes())
    return name + source.hexdigest()[:6]


# ------------------------------------------------------------------------------------------------- runs


def start_run(run: Path, options: argparse.Namespace, data: Path) -> subprocess.Popen:
    """The training command on this run folder, in a session of its own."""
    command = [sys.executable, "-m", "shardwright", "train", "configs/debug/gpt2.yaml", f"run={run}"]
    command += [f"data.path={data}", f"train.steps={options.steps}", *SETTINGS]
    run.parent.mkdir(parents=True, exist_ok=True)
    with (run.parent / f"{run.name}.log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def finish_run(run: Path, options: argparse.Namespace, data: Path) -> None:
    """Run to the end; ends this script where it fails."""
    code = start_run(run, options, data).wait(PATIENCE)
    if code:
        log = (run.parent / f"{run.name}.log").read_text("utf-8")
        sys.exit(f"kill: {run} ended with code {code}:\n{log[-2000:]}")


def one_kill(number: int, run: Path, reference: Path, options: argparse.Namespace, data: Path) -> Outcome:
    """Start, kill at this number's random point, start again, compare."""
    shutil.rmtree(run, ignore_errors=True)
    (run.parent / f"{run.name}.log").unlink(missing_ok=True)
    rng = random.Random(f"{options.seed} {number}")
    process = start_run(run, options, data)
    aim = aim_at_save if number % 2 == 0 else aim_at_step
    killed = aim(process, run, reference, options, rng)
    process.kill()
    process.wait()
    left = what_is_left(run)
    finish_run(run, options, data)
    outcome = compare(killed, left, run, reference)
    if not outcome.problem:
        shutil.rmtree(run)
    return outcome


def aim_at_step(
    process: subprocess.Popen, run: Path, reference: Path, options: argparse.Namespace, rng: random.Random
) -> str:
    """Wait for a random step to be logged, then for a random part of the next one."""
    step, part = rng.randrange(1, options.steps), rng.random()
    seconds = part * float(np.median([line["step_s"] for line in steps_of(reference).values()]))
    wait_for(process, lambda: step in steps_of(run))
    time.sleep(seconds)
    return f"{seconds * 1e3:.0f} ms after step {step}"


def aim_at_save(
    process: subprocess.Popen, run: Path, reference: Path, options: argparse.Namespace, rng: random.Random
) -> str:
    """Wait for a random checkpoint to be begun, then for some milliseconds of writing."""
    step, seconds = rng.randrange(5, options.steps + 1, 5), rng.uniform(0.0, 0.03)
    unfinished, final = (run / "checkpoints" / f"{kind}step_{step:08}" for kind in ("unfinished_", ""))
    wait_for(process, lambda: unfinished.exists() or final.exists())
    time.sleep(seconds)
    return f"{seconds * 1e3:.0f} ms into the save of step {step}"


def wait_for(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    """Poll twice a millisecond, so that the point that was aimed at is met."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None:
            return  # it was quicker than we: killed after its end, which must be harmless too
        if time.monotonic() > deadline:
            process.kill()
            sys.exit("kill: the run made no progress")
        time.sleep(0.0005)


def what_is_left(run: Path) -> str:
    """The checkpoints that the kill left, in short."""
    folder = run / "checkpoints"
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    short = [name.replace("step_000000", "") for name in names if "step_" in name]
    return ", ".join(short) or "none"


# --------------------------------------------------------------------------------------------- comparing


def steps_of(run: Path) -> dict[int, dict[str, Any]]:
    """Logged steps by number; a line that is being written is left out."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return {}
    return {line["step"]: line for line in lines_of(path) if "loss" in line}


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a metrics file."""
    whole = path.read_text("utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def compare(killed: str, left: str, run: Path, reference: Path) -> Outcome:
    """The resumed run against the reference: every logged number and every bit of the last checkpoint."""
    mine, theirs = exact_lines(run), exact_lines(reference)
    alike = sum(a == b for a, b in zip(mine, theirs, strict=False))
    tensors, other = tensors_of(run), tensors_of(reference)
    same = sum(name in tensors and tensors[name] == value for name, value in other.items())
    problem = ""
    if mine != theirs:
        problem = f"metrics differ: {len(mine)} lines, {alike} alike"
    elif tensors != other:
        problem = "tensors differ"
    resumed = lines_of(run / "starts.jsonl")[-1]["step"]
    return Outcome(killed, left, resumed, f"{alike} of {len(theirs)}", f"{same} of {len(other)}", problem)


def exact_lines(run: Path) -> list[dict[str, Any]]:
    """What must be the same in each line of the metrics, in order; times are not."""
    return [{key: line[key] for key in ("step", *EXACT) if key in line} for line in lines_of(run / "metrics.jsonl")]


def tensors_of(run: Path) -> dict[str, str]:
    """Hash of each tensor of the newest checkpoint."""
    from safetensors.numpy import load_file

    checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text("utf-8").strip()
    hashes = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        for name, array in load_file(path).items():
            hashes[f"{path.name} {name}"] = hashlib.sha256(array.tobytes()).hexdigest()
    assert hashes, f"{checkpoint} holds no tensors"
    return hashes


# ------------------------------------------------------------------------------------------------- page


def write_head(options: argparse.Namespace) -> None:
    """The page up to the head of its table."""
    text = (
        "Each row is a run of `configs/debug/gpt2.yaml` (dropout on, a checkpoint every 5 steps) that was killed with "
        "kill -9 and started again by the same command (`benchmarks/kill.py` says more). *Steps alike*: lines of the "
        "metrics whose loss, gradient norm, learning rate and evaluation are bit-identical to those of an "
        "uninterrupted run; *tensors alike*: tensors of the last checkpoint. *Left behind*: folders of checkpoints "
        "at the moment of the kill; `unfinished_` is a save that was cut off."
    )
    facts = {key: value for key, value in machine().items() if key in ("processor", "system", "torch")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    page = ["# kill -9 and resume", text, facts_table(facts), table(HEADER, [])]
    options.out.write_text("\n\n".join(page) + "\n", "utf-8")


def rows(page: Path, revision: str) -> list[list[str]]:
    """Cells of this revision's rows."""
    lines = page.read_text("utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in cells if row[0] == revision]


def rows_done(page: Path, revision: str) -> set[int]:
    """Numbers of the kills that have a row of this revision."""
    return {int(row[1]) for row in rows(page, revision)}


def append(page: Path, row: list[Any]) -> None:
    """One more row at the end of the page."""
    with page.open("a", encoding="utf-8") as file:
        file.write(f"| {' | '.join(str(cell) for cell in row)} |\n")


def conclude(options: argparse.Namespace, revision: str) -> int:
    """Print the page and the figures of this revision."""
    found = rows(options.out, revision)
    alike = sum(row[-1] == "bit-identical" for row in found)
    cut_off = sum("unfinished" in row[4] for row in found)
    print(options.out.read_text("utf-8"))
    figures = {"benchmark": "kill", "commit": revision, "kills": len(found), "bit_identical": alike}
    print(json.dumps(rounded({**figures, "killed_during_a_save": cut_off, "ratio": alike / max(len(found), 1)})))
    return 0 if alike == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
