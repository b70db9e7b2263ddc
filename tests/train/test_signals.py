"""SIGTERM's handler around a run of several ranks."""

import signal
from contextlib import suppress

import pytest

from shardwright.config import RunError
from shardwright.train.signals import lingering


@pytest.fixture(autouse=True)
def before():
    handler = signal.getsignal(signal.SIGTERM)
    yield handler
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("size", [1, 2])
def test_after_the_run_the_handler_before_is_back(before, size):
    with lingering(size):
        assert (signal.getsignal(signal.SIGTERM) is before) == (size == 1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_rank_that_leaves_with_an_error_has_the_time_to_say_it(before):
    """The launcher's SIGTERM often comes between the error and its line."""
    with suppress(RunError), lingering(2):
        inside = signal.getsignal(signal.SIGTERM)
        raise RunError("rank 1 is gone")
    assert signal.getsignal(signal.SIGTERM) is inside is not before
