"""Faults of benchmarks/faults.py, each once at a random moment: those that no other test here has.

Killed ranks, agents and keepers, and a stop by signal, are in test_restart.py; a lost host in test_elastic.py.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest

from tests import netns
from tests.faults.faults import (
    FAULTS,
    Fault,
    Stage,
    bad_server,
    bear,
    build_texts,
    cut_short,
    lose_host_with_spare,
    slow_link,
)

STEPS = 14
pytestmark = [
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to look for processes left behind"),
    pytest.mark.faults,
    pytest.mark.timeout(900),
]
#: Two of benchmarks/faults.py in one where that saves a start.
ONCE = [
    Fault("network cut, long, and a spare", partial(lose_host_with_spare, lose=netns.Network.cut), netns.why_not),
    Fault("network cut, short, then slow", partial(bear, happenings=[cut_short, slow_link]), netns.why_not_slow),
    FAULTS["hosts cut apart"],
    FAULTS["disk full"],
    FAULTS["checkpoint torn"],
    Fault("bad server", partial(bad_server, kinds=["500", "truncate", "wrong bytes"])),
]


@pytest.fixture(scope="module")
def texts(prepared, tmp_path_factory):
    """The texts, and the runs that nothing happened to."""
    return build_texts(prepared, tmp_path_factory.mktemp("texts"), STEPS)


@pytest.mark.parametrize("fault", ONCE, ids=lambda fault: fault.name)
def test_nothing_is_lost_but_time(fault, texts, tmp_path):
    if (reason := fault.why_not()) is not None:
        pytest.skip(reason)
    outcome = fault.trial(Stage(tmp_path, texts, STEPS, random.Random(fault.name)))
    assert outcome.passed, outcome
