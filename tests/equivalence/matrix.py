"""Runs cells of the equivalence matrix in a pool of ranks and holds each against one process.

The one process of a cell has the same meaning and nothing else; cells of one meaning share it. Used by test_sample.py
and by benchmarks/equivalence.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from shardwright.log import get_logger
from shardwright.train.metrics import read_metrics
from tests.conftest import first_documents
from tests.equivalence.cells import BOUNDS, STEPS, Cell, config, disagreement
from tests.equivalence.work import overflow, run
from tests.ranks import RankError, Ranks

SPOILED = 4  # the step of fp16 runs in which one rank's gradients overflow
EXACT = ("step", "tokens", "lr", "loss_scale")  # of each record


class Verdict(NamedTuple):
    """What a cell came to: largest differences by figure, and what was wrong, in words; "" where nothing was."""

    differences: dict[str, float]
    problem: str
    seconds: float


RENEWED = 40  # runs after which the pool is started again: torch's caches keep some of the groups of every run


class Matrix:
    """Cells, run one after the other in `folder` for so many steps; `prepared` is the text they train on."""

    def __init__(
        self, pool: Ranks, prepared: Path, folder: Path, *, patience: float = 600.0, steps: int = STEPS
    ) -> None:
        self.pool, self.prepared, self.folder, self.patience, self.steps = pool, prepared, folder, patience, steps
        self._runs = 0

    def check(self, cell: Cell) -> Verdict:
        """Run the cell, and the one process beside it where no cell before had the same."""
        folder = self.folder / cell.name.replace("/", "--")
        shutil.rmtree(folder, ignore_errors=True)
        begin = time.monotonic()
        try:
            oracle, expected = self._oracle(cell)
            begin = time.monotonic()
            records = self._run(cell, folder, cell.processes, [*cell.meaning, *cell.free])
            differences = compare(folder, records, oracle, expected)
        except (RankError, AssertionError) as error:
            return Verdict({}, str(error) or type(error).__name__, time.monotonic() - begin)
        seconds = time.monotonic() - begin
        bounds = BOUNDS[cell.precision]
        far = [f"{name} {value:.2g}, bound {bounds[name]:g}" for name, value in differences.items()
               if not value < bounds[name]]  # fmt: skip
        if not far:
            shutil.rmtree(folder)
        return Verdict(differences, "; ".join(far), seconds)

    def _oracle(self, cell: Cell) -> tuple[Path, list[dict[str, Any]]]:
        key = hashlib.sha256(json.dumps([cell.shape, cell.meaning]).encode()).hexdigest()[:16]
        folder = self.folder / "one-process" / key
        if not (folder / "result.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            self._run(cell, folder, 1, cell.meaning)
        return folder, read_metrics(folder)

    def _run(self, cell: Cell, folder: Path, processes: int, overrides: list[str]) -> list[dict[str, Any]]:
        self._runs += 1
        if self._runs % RENEWED == 0:
            self.pool.close()
        raw = config(self.prepared, folder, cell.shape, self.steps)
        spoil = (SPOILED, processes - 1) if cell.precision == "fp16" else None
        work = "tests.equivalence.matrix:train_quietly"
        return self.pool.run(processes, work, raw, overrides, spoil, timeout=self.patience)[0]


def train_quietly(raw: dict[str, Any], overrides: list[str], spoil: tuple[int, int] | None) -> list[dict[str, Any]]:
    """What each rank does; `spoil`: (step, rank) whose gradients overflow."""
    log = get_logger()
    log.setLevel(logging.ERROR)
    try:
        return run(raw, overrides) if spoil is None else overflow(raw, overrides, *spoil)
    finally:
        log.setLevel(logging.INFO)


def compare(
    folder: Path, records: list[dict[str, Any]], oracle: Path, expected: list[dict[str, Any]]
) -> dict[str, float]:
    """Largest differences; AssertionError where the runs do not even have the same steps, rates and loss scales."""
    for name in EXACT:
        mine, theirs = ([record.get(name) for record in one] for one in (records, expected))
        assert mine == theirs, f"{name} is another: {mine}, expected {theirs}"
    log = get_logger()
    log.setLevel(logging.WARNING)
    try:
        return disagreement(folder, records, oracle, expected)
    finally:
        log.setLevel(logging.INFO)


def prepare_text(folder: Path) -> Path:
    """The text of the tests, as token shards in `folder`; made where it is missing."""
    from shardwright.config import parse
    from shardwright.data.prepare import PrepareConfig, prepare

    output = folder / "prepared"
    if not (output / "manifest.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "english.jsonl"
        rows = (json.dumps(row, ensure_ascii=False) for row in first_documents("english"))
        source.write_text("\n".join(rows) + "\n", encoding="utf-8")
        raw = {
            "input": [str(source)],
            "output": str(output),
            "tokenizer": {"vocab_size": 512},
            "starts": True,
            "validation_every": 10,
        }
        prepare(parse(PrepareConfig, raw, "prepare"), progress=False)
    return output
