"""`shardwright doctor`: what this machine has, what is missing for which feature, and a 10-second check of its speed.

Room launcher; `checks` looks, `speed` measures, this file runs them in order and says it. Exit code 0 where training
works (optional features may be missing), 1 where a check failed.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardwright import __version__
from shardwright.launcher.checks import Check, check_features, check_machine, check_torch
from shardwright.launcher.speed import check_speed
from shardwright.log import progress

COLOURS = {"ok": "green", "missing": "dim", "warning": "yellow", "failed": "bold red"}


def doctor(json: bool = False, seconds: float = 10.0) -> int:
    """Examine this machine, print what was found on stdout, return the exit code.

    `json` prints one object: `ok`, `version`, and `checks` with group, name, status, detail and remedy.
    """
    checks = examine(seconds, quiet=json)
    if json:
        answer = {"ok": is_fit(checks), "version": __version__, "checks": [asdict(check) for check in checks]}
        print(json_module.dumps(answer, indent=1))
    else:
        show(checks)
    return 0 if is_fit(checks) else 1


def examine(seconds: float = 10.0, *, quiet: bool = True) -> list[Check]:
    """All checks; `seconds` bounds the measurements."""
    stages: Sequence[tuple[str, Callable[[], Iterable[Check]]]] = (
        ("looking at the machine", check_machine),
        ("looking at torch", check_torch),
        ("looking for features", check_features),
        ("measuring", partial(check_speed, seconds)),
    )
    found: list[Check] = []
    with progress(None, "checks", "doctor", quiet=quiet or None) as bar:
        for words, stage in stages:
            bar.describe(words)
            for check in stage():
                found.append(check)
                bar.advance()
    return found


def is_fit(checks: Iterable[Check]) -> bool:
    """Whether training works here."""
    return all(check.status != "failed" for check in checks)


def verdict(checks: Sequence[Check]) -> str:
    """The findings in one sentence."""
    count = {status: sum(check.status == status for check in checks) for status in COLOURS}
    names = {"failed": "failed", "warning": "with a warning", "missing": "optional and missing"}
    found = ", ".join(f"{count[status]} {words}" for status, words in names.items() if count[status])
    start = "Not all of this machine works" if count["failed"] else "Training works here"
    return f"{start}; of {len(checks)} checks {found}." if found else f"{start}."


def show(checks: Sequence[Check]) -> None:
    """The findings as a table on stdout, grouped, each remedy under what it mends."""
    console = Console(highlight=False)
    for group in dict.fromkeys(check.group for check in checks):
        table = Table.grid(padding=(0, 2))
        table.add_column(width=7)
        table.add_column(no_wrap=True, min_width=16)
        table.add_column(overflow="fold")
        for check in (check for check in checks if check.group == group):
            table.add_row(Text(check.status, COLOURS[check.status]), check.name, Text(check.detail))
            if check.remedy:
                table.add_row("", "", Text(f"-> {check.remedy}", "cyan"))
        console.print(Text(f"\n{group}", "bold"))
        console.print(table)
    console.print(Text(f"\n{verdict(checks)}", "bold"))
