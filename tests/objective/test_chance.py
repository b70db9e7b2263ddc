"""Random numbers that depend on nothing but seed, sequence number, place and purpose; and are random."""

from __future__ import annotations

import numpy as np

from shardwright.objective.chance import Chance, mix

PLACES = np.arange(512)


def test_a_seed_means_the_same_in_every_version() -> None:
    assert mix(0)[0] == 0xE220A8397B1DCDAF  # the first number of splitmix64 from seed 0
    assert Chance(7, np.array([0, 3])).bits(2, np.arange(2)).tolist() == [
        [5297786329547272453, 13393137479611764749],
        [14528663286660696245, 589557627523488349],
    ]


def test_rows_do_not_depend_on_each_other_nor_on_how_places_are_given() -> None:
    numbers = np.arange(50)
    whole = Chance(1, numbers).bits(3, PLACES)
    some = np.array([41, 2, 2, 17])
    assert (Chance(1, numbers[some]).bits(3, PLACES) == whole[some]).all()
    assert (Chance(1, numbers).of(some).bits(3, PLACES) == whole[some]).all()
    given = np.broadcast_to(PLACES[::-1], (50, 512))
    assert (Chance(1, numbers).bits(3, given) == whole[:, ::-1]).all()


def test_seeds_numbers_places_purposes_and_splits_are_apart() -> None:
    chances = [Chance(seed, np.arange(40), evaluation) for seed in (0, 1, 2**62) for evaluation in (False, True)]
    drawn = np.concatenate([c.bits(purpose, PLACES).reshape(-1) for c in chances for purpose in (0, 1, 2, 31)])
    assert len(np.unique(drawn)) == drawn.size


def test_numbers_are_uniform_and_uncorrelated() -> None:
    chance = Chance(5, np.arange(2000))
    drawn = chance.uniform(1, PLACES)
    assert drawn.min() >= 0 and drawn.max() < 1
    counts, _ = np.histogram(drawn, 100, (0, 1))
    expected = drawn.size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 160  # chi square of 99 degrees of freedom: 99 +- 14
    for other in (drawn[:, 1:], drawn[1:], chance.uniform(2, PLACES)):
        one = drawn[: len(other), : other.shape[1]]
        assert abs(np.corrcoef(one.reshape(-1), other.reshape(-1))[0, 1]) < 0.005
    below = chance.below(1, PLACES, 7)
    assert np.bincount(below.reshape(-1), minlength=7).min() > drawn.size / 7 * 0.98 and below.max() == 6
    assert chance.below(1, PLACES, 0).max() == 0


def test_classes_are_drawn_by_their_shares() -> None:
    shares = np.array([0.5, 0.2, 0.0, 0.3])
    drawn = Chance(5, np.arange(1000)).drawn(1, PLACES, np.cumsum(shares))
    assert np.abs(np.bincount(drawn.reshape(-1), minlength=4) / drawn.size - shares).max() < 0.003
