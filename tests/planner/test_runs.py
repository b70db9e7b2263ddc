"""What is read from a run folder, hurt ones included, and what a page makes of figures that hardly vary."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardwright.planner.report import report
from shardwright.planner.runs import load_run
from tests.pages import Browser, open_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as running:
        yield running


def write_run(folder: Path, losses: list[float], *lines: str) -> Path:
    """A run folder with a loss a step, and these lines after them."""
    folder.mkdir()
    records = [json.dumps({"step": step, "tokens": 64 * step, "loss": loss}) for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("\n".join([*records, *lines]) + "\n")
    return folder


def test_a_line_without_a_step_is_passed_over(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", [3.0, 2.0], '{"loss": 1.0}', '{"step": null}', "[1]", "torn"))
    assert [record["step"] for record in run.records] == [1, 2]
    assert run.last("loss") == 2.0


def test_ticks_of_a_narrow_range_are_told_apart(browser: Browser, tmp_path: Path) -> None:
    losses = [6.95 - 0.0005 * step for step in range(20)]
    path = report(write_run(tmp_path / "run", losses), tmp_path / "page.html")
    page = browser.open(path, width=1000)
    labels = page.evaluate("[...document.querySelectorAll('#chart-0 .ytick text')].map(t => t.textContent)")
    assert len(labels) >= 3 and len(set(labels)) == len(labels), labels
