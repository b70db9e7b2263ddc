"""The logger and the progress bar: one line format, silent where nobody should hear, live on a real terminal."""

import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright import log
from shardwright.log import duration, get_logger, progress, quantity

LINE = r"\d\d:\d\d:\d\d "
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    get_logger().setLevel(logging.INFO)
    yield
    get_logger().setLevel(logging.INFO)


def test_a_line_is_the_time_and_the_words_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    get_logger().info("read %d of [bold]7[/bold] shards", 3)
    get_logger("shardwright.data").warning("slow disk " + "x" * 300)
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == ""
    assert re.fullmatch(LINE + re.escape("read 3 of [bold]7[/bold] shards"), first)
    assert re.fullmatch(LINE + "warning: slow disk x{300}", second)


def test_other_ranks_say_only_what_matters_and_who_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    get_logger().info("not twice")
    get_logger().error("lost")
    with progress(10, "documents", "clean") as bar:
        bar.advance(10)
    assert re.fullmatch(LINE + "rank 3: error: lost", capsys.readouterr().err.strip())


def test_an_exception_is_shown_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise KeyError("lost")
    except KeyError:
        get_logger().exception("cannot go on")
    err = capsys.readouterr().err
    assert "error: cannot go on" in err
    assert "KeyError: 'lost'" in err


def test_plain_progress_says_share_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PLAIN_SECONDS", 0.0)
    with progress(2e6, "tokens", "tokenise", completed=1e6) as bar:
        bar.advance(5e5)
        assert bar.completed == 1.5e6
        bar.advance(5e5)
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(LINE + r"tokenise: 75 % of 2.00M tokens, \S+ tokens/s, 0:00 left", first)
    assert re.fullmatch(LINE + r"tokenise: 100 % of 2.00M tokens, \S+ tokens/s, took 0:00", last)


def test_a_job_that_is_over_at_once_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(100, "documents", "clean") as bar:
        for _ in range(100):
            bar.advance()
    assert capsys.readouterr().err == ""


def test_quiet_is_one_switch_for_lines_and_bars(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PLAIN_SECONDS", 0.0)
    get_logger().setLevel(logging.WARNING)
    get_logger().info("hush")
    with progress(None, "documents", "clean") as bar:
        bar.advance()
    with progress(None, "documents", "clean", quiet=False) as bar:
        bar.advance()
    assert bar.completed == 1
    assert capsys.readouterr().err == ""


def test_a_bar_is_closed_when_the_job_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), progress(3, "documents", "clean"):
        raise ZeroDivisionError
    get_logger().info("still here")
    assert "still here" in capsys.readouterr().err


def test_a_terminal_gets_a_live_bar_and_lines_above_it() -> None:
    code = (
        "from shardwright.log import get_logger, progress\n"
        "with progress(4, 'shards', 'write') as bar:\n"
        "    bar.advance(3); get_logger().info('a line'); bar.describe('hash'); bar.advance(1)\n"
    )
    shown = _on_a_terminal([sys.executable, "-c", code])
    assert "100 %" in shown
    assert "shards/s" in shown
    assert "hash" in shown
    assert "a line" in shown
    assert shown.count("a line") == 1


@given(st.floats(min_value=1e-6, max_value=9e14, allow_nan=False))
def test_a_quantity_keeps_three_digits(value: float) -> None:
    digits, suffix = re.fullmatch(r"([-+.\de]+)([kMGT]?)", quantity(value)).groups()  # type: ignore[union-attr]
    scale = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[suffix]
    assert float(digits) * scale == pytest.approx(value, rel=5.1e-3)
    assert len(digits) <= 8


def test_quantities_and_durations_read_well() -> None:
    values = (0, 12, 999.96, 12345, 1.31e6, -5e6, 0.052, float("nan"))
    assert [quantity(v) for v in values] == ["0", "12", "1.00k", "12.3k", "1.31M", "-5.00M", "0.052", "nan"]
    assert quantity(9.89e14, " ") == "989 T"
    assert [duration(s) for s in (0.2, 65, 3700, 90060)] == ["0:00", "1:05", "1:01:40", "1d 01:01"]


def _on_a_terminal(command: list[str]) -> str:
    main, other = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "NO_COLOR")} | {"TERM": "xterm"}
    process = subprocess.Popen(command, stderr=other, stdin=other, cwd=ROOT, env=environment)
    os.close(other)
    shown = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # Linux reports the closed end of a terminal so
            break
        if not piece:
            break
        shown += piece
    os.close(main)
    assert process.wait() == 0
    return shown.decode()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs pseudo-terminals")
@pytest.mark.parametrize("bar", [True, False])
def test_a_terminal_that_goes_away_ends_nothing(bar, tmp_path):
    """Nor is the exit code that of a failed write."""
    import pty

    lines = ["get_logger().info('again')"] * 3
    inside = ["with progress(10, 'steps', 'run') as bar:", *(f" bar.advance(); {line}" for line in lines)]
    code = ["import sys", "from shardwright.log import get_logger, progress", "get_logger().info('begun')",
            "sys.stdin.readline()", *(inside if bar else lines)]  # fmt: skip
    far, near = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(code)], stdin=subprocess.PIPE, stdout=near, stderr=near, start_new_session=True
    )
    os.close(near)
    assert b"begun" in os.read(far, 1000)
    os.close(far)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0
