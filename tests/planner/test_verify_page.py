"""The page and the text of a verification, passed and failed, in a real browser."""

import dataclasses
import math

import pytest

from shardwright.planner.verify_page import as_text, build, write_page
from shardwright.train.compare import BOUNDS, Figure, Pair, Report, StepReport
from tests.pages import open_browser

NAMES = [f"blocks.{n}.mlp.{part}.weight" for n in range(40) for part in ("up", "down")]


def figures(**changed: float) -> tuple[Figure, ...]:
    """Figures well within the bounds of fp32, but for those given by name."""
    return tuple(Figure(name, changed.get(name, 1e-6), 1e-3, 1e-7) for name in NAMES)


@pytest.fixture
def passed() -> Report:
    steps = [StepReport(n, Pair(9.0, 9.0), Pair(1.5, 1.5 + 1e-6), figures(), figures()) for n in (1, 2)]
    return Report(
        config={"model": {"family": "<gpt2>"}}, layout="data 2 x tensor 2", processes=4, device="a CPU",
        number_format="fp32", against="fp32", bounds=BOUNDS["fp32"], steps=tuple(steps), repeat="", retries=0,
        warnings=("mind the gap",), versions={"torch": "2.13"}, seconds=3.0,
    )  # fmt: skip


@pytest.fixture
def failed(passed: Report) -> Report:
    bad = StepReport(2, Pair(9.0, math.nan), Pair(1.5, 1.6), figures(**{NAMES[3]: 0.5, NAMES[1]: math.inf}), figures())
    return dataclasses.replace(passed, steps=(passed.steps[0], bad), repeat=None)


def test_a_verdict_names_the_first_step_and_tensor(passed, failed):
    assert passed.passed and "every figure is within its bound" in passed.verdict()
    assert not failed.passed and f"step 2: the gradient of {NAMES[1]} is off by inf" in failed.verdict()
    assert [excess.tensor for excess in failed.excesses()] == [None, None, NAMES[1], NAMES[3]]
    unsteady = dataclasses.replace(passed, repeat="weight a at step 1")
    assert not unsteady.passed and "a second run changed the weight a at step 1" in unsteady.verdict()


def test_the_text_has_every_step_the_bounds_and_the_warnings(passed, failed):
    text = as_text(passed)
    for words in ("data 2 x tensor 2 on 4 processes in fp32", "step 1: loss 9 beside 9 (0.0e+00)", "step 2:",
                  "bounds: loss 1e-05", "warning: mind the gap", "changed no bit", "passed: "):  # fmt: skip
        assert words in text, words
    text = as_text(failed)
    assert "FAILED: " in text and text.count("out of bound: ") == 4


def test_the_page_stands_alone_and_reads_at_both_widths(passed, failed, tmp_path):
    with open_browser() as browser:
        for report, word in ((passed, "Passed"), (failed, "Failed")):
            path = write_page(report, tmp_path / word / "page.html")
            for width in (1300, 390):
                page = browser.open(path, width=width)
                assert page.errors == [] and page.requests == []
                assert page.evaluate("document.querySelector('h1').textContent").startswith(word)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
            body = page.evaluate("document.body.textContent")
            assert "the 50 worst of 80" in body and ("✗" in body) is (report is failed)


def test_the_page_escapes_what_it_shows(passed):
    assert "<gpt2>" not in build(passed) and "&lt;gpt2&gt;" in build(passed)
