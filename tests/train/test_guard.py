"""Spikes and delayed reads."""

import torch

from shardwright.config import GuardConfig
from shardwright.train.guard import DelayedRead, SpikeDetector

CPU = torch.device("cpu")


def _run(losses, **options):
    detector = SpikeDetector(GuardConfig(spike="skip", **options), CPU)
    return [bool(detector.judge(torch.tensor(x), ~torch.isfinite(torch.tensor(x)))) for x in losses], detector


def test_a_jump_is_a_spike_and_does_not_enter_the_window():
    flags, detector = _run([5.0, 5.1, 4.9, 5.0, 5.05, 9.0, 5.0, 9.0], window=6, threshold=6.0)
    assert flags == [False] * 5 + [True, False, True]
    assert detector.losses.max() < 6


def test_nothing_is_a_spike_before_half_the_window_is_filled():
    flags, _ = _run([5.0, 50.0], window=6)
    assert flags == [False, False]


def test_a_loss_that_is_not_finite_is_no_spike_and_poisons_nothing():
    flags, detector = _run([5.0, 5.1, 4.9, float("nan"), float("inf"), 5.0, 9.0], window=4)
    assert flags == [False] * 6 + [True]
    assert torch.isfinite(detector.losses).all()


def test_the_window_forgets():
    flags, _ = _run([9.0, 9.1, 9.0, 9.1] + [5.0, 5.1, 5.0, 5.1] + [9.0], window=4, threshold=6.0)
    assert flags[-1]


def test_state_goes_round():
    _, one = _run([5.0, 5.1, 4.9, 5.0], window=4)
    two = SpikeDetector(one.config, CPU)
    two.load_state_tensors(one.state_tensors())
    fine = torch.tensor(False)
    assert bool(one.judge(torch.tensor(9.0), fine)) and bool(two.judge(torch.tensor(9.0), fine))


def test_a_delayed_read_gives_each_tensor_once():
    read = DelayedRead()
    assert read.take() is None
    read.put(torch.tensor([1.0, 2.0]))
    assert read.take() == [1.0, 2.0]
    assert read.take() is None
