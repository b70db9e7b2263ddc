"""Signals of clusters around a run: which ask it to save, which end it, and who is given time."""

import os
import signal
from contextlib import suppress

import pytest

from shardwright.config import RunError
from shardwright.train.signals import Signals, lingering


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


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_each_asks_once_and_the_second_leaves(first):
    with Signals() as signals:
        os.kill(os.getpid(), first)
        assert signals.received == first.name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), first)


def test_the_sigterm_that_follows_sigusr1_does_not_break_the_save():
    """SLURM sends it when the time is over that SIGUSR1 announced, and SIGKILL a good while later."""
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGUSR1"


@pytest.mark.parametrize("first", [[], [signal.SIGTERM]])
def test_when_all_is_saved_signals_change_nothing(first):
    told = []
    with Signals(lambda: told.append(True)) as signals:
        for number in first:
            os.kill(os.getpid(), number)
        received = signals.received
        signals.settle()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert signals.received == received and told == [True]
