"""docs/families.md promises nothing by assertion: each cell of its table names a test that pytest finds."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardwright.model.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/families.md").read_text("utf-8")
COLUMNS = ["pretrain", "fine-tune", "import", "export", "generate", "every layout"]


def table(first: str) -> list[list[str]]:
    """Cells of the table whose head begins with this cell, row by row."""
    lines = PAGE[PAGE.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]


HEAD, *ROWS = table("`model.family`")
LETTERS = {
    letter: f"{path}::{function}"
    for letter, test, *_ in table("letter")[1:]
    for path, function in re.findall(r"\[(\S+)\]\(\S+\)`::(\w+)`", test)
}


def named(cell: str) -> Iterator[str]:
    """The tests that a cell names, as `file::function[id`."""
    for letter, parameter in re.findall(r"([A-Z]) `(\w+)`", cell):
        yield f"{LETTERS[letter]}[{parameter}"


@pytest.fixture(scope="module")
def collected() -> list[str]:
    """What pytest collects of the files that the page names."""
    files = sorted({test.partition("::")[0] for test in LETTERS.values()})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.splitlines()


def test_every_family_has_a_row_and_every_row_all_columns() -> None:
    assert ["`model.family`", *COLUMNS] == HEAD
    assert [row[0].strip("`") for row in ROWS] == list(FAMILIES)
    assert all(len(row) == len(HEAD) and all(row) for row in ROWS)


def test_every_cell_names_tests_that_exist(collected: list[str]) -> None:
    for family, *cells in ROWS:
        for column, cell in zip(COLUMNS, cells, strict=True):
            if cell.startswith("—"):
                continue
            tests = list(named(cell))
            assert tests, f"{family}, {column}: {cell} names no test"
            for test in tests:
                ends = (f"{test}]", f"{test}-", f"{test}/")
                assert any(line.startswith(ends) for line in collected), f"{family}, {column}: there is no {test}]"


def test_what_cannot_be_has_its_reason() -> None:
    for family, *cells in ROWS:
        for cell in cells:
            if cell.startswith("—"):
                assert re.search(rf"^- — {cell[1:]} \w", PAGE, re.M), f"{family}: {cell} has no line below the table"
