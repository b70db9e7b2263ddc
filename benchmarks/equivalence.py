"""Every layout against one process: the whole matrix of tests/equivalence/cells.py, in real gloo processes.

A cell is a small model of a family under one layout with one setting (optimizer, number format, recomputation, ...): 20
steps on real packed text, each step's loss and gradient norm and the final weights compared with those of one process.
What is done is kept by cell and revision in runs/equivalence/cells.jsonl, and not done again: the script can be stopped
and started. The page holds each cell's newest figures. Ends with 1 where a cell is out of its bound.

Examples: python benchmarks/equivalence.py --limit-minutes 30
          python benchmarks/equivalence.py --only 'llama/tensor2*' --list
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Bits differ between one and two threads. Before torch is imported, here and in the processes started from here.
os.environ["OMP_NUM_THREADS"] = "1"

from common import ROOT, add_line, facts_table, machine, parser, publish, read_lines, say, table  # noqa: E402
from kill import revision_of_tree  # noqa: E402

sys.path.insert(0, str(ROOT))  # for `tests`, which is not installed

from tests.equivalence.cells import BOUNDS, FAMILIES, LAYOUTS, SETTINGS, SHAPES, Cell, fits, matrix, sample  # noqa: E402
from tests.equivalence.matrix import Matrix, Verdict, prepare_text  # noqa: E402
from tests.ranks import SIZE, Ranks  # noqa: E402

FIGURES = ("loss", "norm", "weights", "validation")
PRECISIONS = {"fp32": "float32", "fp16": "fp16, one overflow", "bf16": "bf16", "fp64": "float64"}


def main() -> int:
    """Run what has no figures yet, write the page; 1 where a cell is out of its bound."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the ranks end as well
    options = arguments()
    cells = chosen(options)
    if options.list:
        print("\n".join(cell.name for cell in cells))
        return 0
    revision = revision_of_tree()
    log = options.runs / "cells.jsonl"
    if not options.page:
        run_cells(missing(cells, log, revision), log, revision, options)
    newest = read(log)
    write_page(newest, options)
    return int(any(newest[cell.name]["problem"] for cell in cells if cell.name in newest))


def arguments() -> argparse.Namespace:
    """The command line."""
    p = parser(__doc__, "equivalence.md")
    p.add_argument("--only", action="append", metavar="PATTERN", help="cells by name: shape/layout/setting; * is any")
    p.add_argument("--limit-minutes", type=float, default=None, help="start no cell after this time")
    p.add_argument("--sample", type=int, default=None, metavar="SEED", help="take the cells in an order of this seed's")
    p.add_argument("--list", action="store_true", help="print the names of the cells and run none")
    p.add_argument("--page", action="store_true", help="write the page from what is there and run none")
    p.add_argument("--patience", type=float, default=600.0, help="most seconds a cell may take")
    p.add_argument("--runs", type=Path, default=ROOT / "runs" / "equivalence", help="where the runs lie")
    options = p.parse_args()
    if options.smoke:
        options.only = options.only or ["gpt2/zero3/plain", "gpt2/tensor2/fp16"]
        options.runs = options.runs.with_name("equivalence-smoke")
        options.out = options.runs / "equivalence.md"
    return options


def chosen(options: argparse.Namespace) -> list[Cell]:
    """The cells that were asked for."""
    cells = list(matrix()) if options.sample is None else sample(options.sample)
    if not options.only:
        return cells
    found = [cell for cell in cells if any(fnmatch.fnmatch(cell.name, pattern) for pattern in options.only)]
    if not found:
        sys.exit(f"equivalence: no cell is called {' or '.join(options.only)}; --list prints them")
    return found


# ---------------------------------------------------------------------------------------------- running


def missing(cells: Sequence[Cell], log: Path, revision: str) -> list[Cell]:
    """Cells without figures of this revision, or with a failure of it."""
    done = {line["cell"] for line in read_lines(log) if line["revision"] == revision and not line["problem"]}
    left = [cell for cell in cells if cell.name not in done]
    say(f"{revision}: {len(cells) - len(left)} of {len(cells)} cells are done")
    return left


def run_cells(cells: Sequence[Cell], log: Path, revision: str, options: argparse.Namespace) -> None:
    """One after the other, until the time is over."""
    end = float("inf") if options.limit_minutes is None else time.monotonic() + 60 * options.limit_minutes
    folder = options.runs / revision.replace("+", "-")
    pool = Ranks()
    try:
        bench = Matrix(pool, prepare_text(options.runs / "text"), folder, patience=options.patience)
        for number, cell in enumerate(cells, 1):
            if time.monotonic() > end:
                say(f"{options.limit_minutes:g} minutes are over; {len(cells) - number + 1} cells are left")
                return
            verdict = bench.check(cell)
            append(log, cell, verdict, revision)
            say(f"{number} of {len(cells)}  {cell.name}  {verdict.seconds:.1f} s  {in_words(verdict)}")
    finally:
        pool.close()


def append(log: Path, cell: Cell, verdict: Verdict, revision: str) -> None:
    """One more line."""
    line = {"cell": cell.name, "revision": revision, "date": datetime.date.today().isoformat(), **verdict._asdict()}
    add_line(log, line)


def in_words(verdict: Verdict) -> str:
    """For the progress line."""
    figures = "  ".join(f"{name} {value:.1e}" for name, value in verdict.differences.items())
    return f"{figures}  FAILED: {verdict.problem}" if verdict.problem else figures


def read(log: Path) -> dict[str, dict[str, Any]]:
    """The newest figures of each cell."""
    return {line["cell"]: line for line in read_lines(log)}


# ------------------------------------------------------------------------------------------------- page


def write_page(newest: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """The page and the last line."""
    cells = [cell for cell in matrix() if cell.name in newest]
    failed = [cell for cell in cells if newest[cell.name]["problem"]]
    revisions = sorted({newest[cell.name]["revision"] for cell in cells})
    facts = {**machine(), "commit": ", ".join(revisions), "processes": f"gloo, one pool of {SIZE}, one thread each"}
    parts = [introduction(), facts_table(facts), verdict_of(cells, failed)]
    parts += [section(name, cells, newest) for name in BOUNDS]
    parts += ["## Every family under every layout", families(newest), "## Every cell", rows(cells, newest)]
    figures = {
        "benchmark": "equivalence", "commit": ", ".join(revisions), "cells": len(cells), "of": len(matrix()),
        "passed": len(cells) - len(failed), "failed": [cell.name for cell in failed],
        "worst": {name: worst(cells, newest, name) for name in BOUNDS},
    }  # fmt: skip
    publish(options.out, "Every layout against one process", parts, figures)


def introduction() -> str:
    """What was compared."""
    bounds = BOUNDS["fp32"]
    return (
        f"{len(matrix())} cells: {len(SHAPES)} shapes, {len(LAYOUTS)} layouts, {len(SETTINGS)} settings, not all of "
        "their products (tests/equivalence/cells.py has the list). Each is 20 optimizer steps from one seed on real "
        "packed text (English, byte-level BPE of 512 tokens, sequences of 64 with several documents each), 4 "
        "micro-batches or more a data rank, clipped in every step, five steps of warm-up, then an evaluation. A cell "
        "is held against one process with the same model, data and optimizer, without the layout and without what "
        "must change nothing (recomputation, compilation, offload, size of micro-batches).\n\n"
        "*Loss* and *norm*: the largest relative difference of a step's loss and gradient norm before clipping. "
        "*Weights*: after the last step, the larger of the greatest difference of any weight and the relative one of "
        "all of them in the 2-norm, but for key biases where the softmax does not see them. *Validation*: of each "
        f"evaluation's loss. In float32 the bounds are {bounds['loss']:g}, {bounds['norm']:g}, "
        f"{bounds['weights']:g} and {bounds['validation']:g}. Those of bf16 "
        "and fp16 are three times what taking 2, 4 or 8 sequences at once in one process does to it "
        "(`*/one/bf16+micro*`). In each fp16 run the last rank alone overflows in step 4: every rank has to skip that "
        "step, and loss scales, learning rates and token counts have to be the same numbers in every step."
    )


def verdict_of(cells: Sequence[Cell], failed: Sequence[Cell]) -> str:
    """Failures first."""
    left = len(matrix()) - len(cells)
    head = f"**{len(cells) - len(failed)} of {len(cells)} cells are within their bounds**"
    return f"{head}{f'; {left} were not run' if left else ''}."


def section(precision: str, cells: Sequence[Cell], newest: dict[str, dict[str, Any]]) -> str:
    """Failures of one number format, and its largest differences."""
    own = [cell for cell in cells if cell.precision == precision]
    failed = [f"- **{cell.name}**: {first_line(newest[cell.name])}" for cell in own if newest[cell.name]["problem"]]
    found = worst(own, newest, precision)
    body = [[name, f"{value:.1e}", f"{BOUNDS[precision][name]:g}", where] for name, (value, where) in found.items()]
    return "\n\n".join(
        [f"## {PRECISIONS[precision]}: {len(own)} cells", *(["\n".join(failed)] if failed else []),
         table(("largest difference", "found", "bound", "in"), body)]
    )  # fmt: skip


def first_line(line: dict[str, Any]) -> str:
    """A failure in short: of a traceback the last line."""
    return str(line["problem"]).strip().splitlines()[-1]


def worst(cells: Iterable[Cell], newest: dict[str, dict[str, Any]], precision: str) -> dict[str, tuple[float, str]]:
    """The largest difference of each figure, and the cell it is in."""
    own = [(newest[cell.name]["differences"], cell.name) for cell in cells if cell.precision == precision]
    found = {name: max(((d[name], where) for d, where in own if name in d), default=None) for name in FIGURES}
    return {name: value for name, value in found.items() if value is not None}


def families(newest: dict[str, dict[str, Any]]) -> str:
    """Layouts by families, without other settings."""

    def sign(family: str, layout: str) -> str:
        if not fits(family, layout):
            return "-"
        line = newest.get(Cell(family, layout).name)
        return "" if line is None else "**failed**" if line["problem"] else "ok"

    body = [[layout, *(sign(family, layout) for family in FAMILIES)] for layout in LAYOUTS if layout != "one"]
    return f"-: refused, docs/families.md says why.\n\n{table(('layout', *FAMILIES), body)}"


def rows(cells: Sequence[Cell], newest: dict[str, dict[str, Any]]) -> str:
    """One row a cell, failures on top."""
    ordered = sorted(cells, key=lambda cell: not newest[cell.name]["problem"])
    header = ("cell", "processes", *FIGURES, "", "commit", "date")
    return table(header, [row(cell, newest[cell.name]) for cell in ordered])


def row(cell: Cell, line: dict[str, Any]) -> list[Any]:
    """One cell."""
    figures = [f"{line['differences'][name]:.1e}" if name in line["differences"] else "" for name in FIGURES]
    verdict = "**failed**" if line["problem"] else "ok"
    return [cell.name, cell.processes, *figures, verdict, line["revision"], line["date"]]


if __name__ == "__main__":
    sys.exit(main())
