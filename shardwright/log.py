"""One logger and one progress bar for every command; both know the rank and whether anyone is watching.

Lowest room. Everything goes to stderr, so that stdout stays a command's answer (`--json`, generated text).
Rank 0 says everything; other ranks say only warnings and errors, with their rank in front. On a terminal lines
and bars go through one rich console, so that a line never tears a live bar; without one they are plain lines.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

PLAIN_SECONDS = 5.0  # first interval between plain progress lines; grows to a minute on long jobs
STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


@cache
def console() -> Console:
    """The process's one console, on stderr."""
    return Console(file=cast(TextIO, _Stderr()), highlight=False, soft_wrap=True)


class _Stderr:
    """sys.stderr as it is at the moment, which may be lost without an error; what rich needs of a file."""

    @property
    def _file(self) -> TextIO:
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # a live bar puts itself in between

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        try:
            return self._file.write(text)
        except OSError as error:
            outlive(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            outlive(error)


def outlive(error: OSError) -> None:
    """After an error in writing to standard error: where its terminal or pipe is gone, all goes nowhere from now on.

    A run finishes, or saves, whether or not somebody reads along. Any other error is raised.
    """
    if error.errno not in (errno.EIO, errno.EPIPE) or not hasattr(select, "poll"):
        raise error
    for descriptor in (1, 2):  # what is in their buffers would fail once more at the end of the process
        poll = select.poll()
        poll.register(descriptor, 0)
        if poll.poll(0):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def rank() -> int:
    """Rank of this process as its launcher states it; 0 without one."""
    return int(os.environ.get("RANK", 0))


def get_logger(name: str = "shardwright") -> logging.Logger:
    """The project's logger. `get_logger().setLevel(logging.WARNING)` is what quiet means, for bars as well."""
    root = logging.getLogger("shardwright")
    if not any(isinstance(h, _LineHandler) for h in root.handlers):
        root.addHandler(_LineHandler())
        root.setLevel(logging.INFO)
        root.propagate = False
    return logging.getLogger(name)


def is_quiet() -> bool:
    """Whether this process keeps progress to itself."""
    return rank() != 0 or not get_logger().isEnabledFor(logging.INFO)


class Bar:
    """What `progress` hands out: a count that grows. A silent bar only counts."""

    def __init__(self, total: float | None, unit: str, description: str, completed: float = 0) -> None:
        self.total, self.unit, self.description = total, unit, description
        self.completed = self.initial = completed
        self.start = time.monotonic()

    def advance(self, n: float = 1) -> None:
        """Count `n` more units."""
        self.completed += n

    def describe(self, description: str) -> None:
        """Replace the words in front of the bar."""
        self.description = description

    @property
    def elapsed(self) -> float:
        """Seconds since the bar began."""
        return time.monotonic() - self.start

    @property
    def rate(self) -> float:
        """Units a second since the bar began; what was complete before does not count."""
        return (self.completed - self.initial) / max(self.elapsed, 1e-9)

    @property
    def remaining(self) -> float | None:
        """Seconds left at this rate; None where it cannot be known."""
        if self.total is None or self.completed <= self.initial:
            return None
        return max(self.total - self.completed, 0) / max(self.rate, 1e-12)

    def line(self) -> str:
        """The state in words: `tokenise: 41 % of 12.0M tokens, 1.31M tokens/s, 0:05 left`."""
        if self.total:
            share = f"{100 * self.completed / self.total:.0f} % of {quantity(self.total)} {self.unit}"
        else:
            share = f"{quantity(self.completed)} {self.unit}"
        return f"{self.description}: {share}, {quantity(self.rate)} {self.unit}/s, {self.clock()}"

    def clock(self) -> str:
        """Time left; without a total the time so far, at the end the time it took."""
        if self.remaining is None:
            return f"{duration(self.elapsed)} so far"
        return f"{duration(self.remaining)} left" if self.remaining else f"took {duration(self.elapsed)}"

    def close(self) -> None:
        """Stop showing."""


class PlainBar(Bar):
    """A line every few seconds, for logs and pipes."""

    def __init__(self, total: float | None, unit: str, description: str, completed: float = 0) -> None:
        super().__init__(total, unit, description, completed)
        self._next = self.start + PLAIN_SECONDS
        self._said: float | None = None  # the count in the newest line

    def advance(self, n: float = 1) -> None:
        super().advance(n)
        now = time.monotonic()
        if now >= self._next and self.remaining != 0:
            self._next = now + min(max(PLAIN_SECONDS, self.elapsed / 10), 60.0)
            self._say()

    def close(self) -> None:
        if self._said not in (None, self.completed):  # a job that was over before its first line stays silent
            self._say()

    def _say(self) -> None:
        self._said = self.completed
        get_logger().info(self.line())


class RichBar(Bar):
    """A live bar with rate and time left."""

    def __init__(self, total: float | None, unit: str, description: str, completed: float = 0) -> None:
        super().__init__(total, unit, description, completed)
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), _StateColumn(self), console=console()
        )
        self._task = self._progress.add_task(description, total=total, completed=int(completed))
        self._progress.start()

    def advance(self, n: float = 1) -> None:
        super().advance(n)
        self._progress.update(self._task, completed=self.completed)

    def describe(self, description: str) -> None:
        super().describe(description)
        self._progress.update(self._task, description=description)

    def close(self) -> None:
        self._progress.stop()


@contextmanager
def progress(
    total: float | None, unit: str, description: str, *, completed: float = 0, quiet: bool | None = None
) -> Iterator[Bar]:
    """Show how far a job is; `bar.advance(n)` inside. `unit` is a plural noun ("tokens", "documents", "bytes").

    A rich bar on a terminal, a plain line every few seconds without one, nothing when quiet or on ranks above 0.
    `total=None` counts without an end; `completed` is what an earlier run already did (not part of the rate).
    """
    silent = is_quiet() if quiet is None else quiet
    kind: type[Bar] = Bar if silent else RichBar if console().is_terminal else PlainBar
    bar = kind(total, unit, description, completed)
    try:
        yield bar
    finally:
        bar.close()


def quantity(value: float, gap: str = "") -> str:
    """Three significant digits with a metric suffix, `gap` before it: 1.31M, 12.0k, 0.052."""
    if not math.isfinite(value):
        return str(value)
    value = float(f"{value:.3g}")
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{_three_digits(value / limit)}{gap}{suffix}"
    return (str(int(value)) if value.is_integer() else f"{value:.3g}") + gap


def duration(seconds: float) -> str:
    """0:05, 12:40, 3:07:09, 2d 03:07."""
    whole = int(seconds + 0.5)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _three_digits(value: float) -> str:
    return f"{value:.{2 - min(math.floor(math.log10(abs(value))), 2)}f}"


class _StateColumn(ProgressColumn):
    """`41 %  1.31M tokens/s  0:05 left`, from the bar's own count."""

    def __init__(self, bar: Bar) -> None:
        super().__init__()
        self._bar = bar

    def render(self, task: Task) -> Text:
        bar = self._bar
        done = f"{100 * bar.completed / bar.total:3.0f} %" if bar.total else f"{quantity(bar.completed)} {bar.unit}"
        return Text(f"{done}  {quantity(bar.rate)} {bar.unit}/s  {bar.clock()}")


class _LineHandler(logging.Handler):
    """`12:34:56 message`; above INFO the level stands before the message, above rank 0 the rank."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            own_rank = rank()
            if own_rank and record.levelno < logging.WARNING:
                return
            clock = time.strftime("%H:%M:%S", time.localtime(record.created))
            who = f"rank {own_rank}: " if own_rank else ""
            level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
            line = Text.assemble((clock, "dim"), f" {who}", (level, STYLES.get(record.levelno, "dim")))
            console().print(line.append(record.getMessage()), soft_wrap=True)
            if record.exc_info:
                console().print(logging.Formatter().formatException(record.exc_info), markup=False, soft_wrap=True)
        except Exception:
            self.handleError(record)
