"""Faults of benchmarks/faults.py, each once at a random moment: those that no other test here has.

Killed ranks, agents and keepers, and a stop by signal, are in test_restart.py; a lost host in test_elastic.py.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest

from tests.faults.faults import FAULTS, Fault, Stage, bad_server, build_texts

STEPS = 14
pytestmark = [
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to look for processes left behind"),
    pytest.mark.faults,
    pytest.mark.timeout(900),
]
NAMES = ("network cut, long", "network cut, short", "slow link", "host lost, a spare", "disk full", "checkpoint torn")
SERVER = Fault("bad server", partial(bad_server, kinds=["500", "truncate", "wrong bytes"]))
ONCE = [*(FAULTS[name] for name in NAMES), SERVER]


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
