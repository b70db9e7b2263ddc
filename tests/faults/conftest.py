"""Faults take half a minute each: continuous integration runs all of them, elsewhere a day runs one in four."""

import datetime
import os

import pytest

DAYS = 4


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the faults of other days."""
    here = [item for item in items if item.path.parent.name == "faults"]
    if os.environ.get("CI") or len(here) == 1:  # one that was named by hand
        return
    today = datetime.date.today().toordinal() % DAYS
    for number, item in enumerate(sorted(here, key=lambda item: item.nodeid)):
        if number % DAYS != today:
            item.add_marker(pytest.mark.skip(reason="a fault of another day; CI=1 runs all of them"))
