"""The data order as a pure function: the same for every reader, complete, and the same tomorrow."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.config import ConfigError
from shardwright.data.order import Order, Plan, merge_ranges, permute, quotas
from shardwright.objective.chance import mix

RANGES = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)).map(lambda r: (r[0], r[0] + r[1])), max_size=4)


def outside(ranges: tuple[tuple[int, int], ...]) -> itertools.filterfalse:
    """The slow oracle: count, and leave out."""
    return itertools.filterfalse(lambda i: any(a <= i < b for a, b in ranges), itertools.count())


# ---------------------------------------------------------------------------------------------- permutation


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    image = permute(np.arange(size), np.full(size, size), np.repeat(mix(seed), size))
    assert sorted(image.tolist()) == list(range(size))


def test_permute_takes_sizes_and_keys_element_by_element() -> None:
    sizes = np.arange(1, 50)
    index = sizes // 2
    keys = mix(3, sizes)
    alone = [permute(index[i : i + 1], sizes[i : i + 1], keys[i : i + 1])[0] for i in range(len(sizes))]
    assert permute(index, sizes, keys).tolist() == alone


def test_permutations_are_spread_evenly() -> None:
    """All 24 orders of 4 come up about equally often, and no place of 1,000 is favoured."""
    keys = mix(1, np.repeat(np.arange(24000), 4))
    images = permute(np.tile(np.arange(4), 24000), np.full(96000, 4), keys).reshape(-1, 4)
    counts = np.unique(images, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 700 and counts.max() < 1300
    first = permute(np.zeros(20000, np.int64), np.full(20000, 1000), mix(2, np.arange(20000)))
    chi_square = ((np.bincount(first, minlength=1000) - 20) ** 2 / 20).sum()
    assert 800 < chi_square < 1200


def test_the_order_never_changes() -> None:
    """Golden values: a run that goes on under a later version must go on in the same order."""
    assert mix(1, 2, 3).tolist() == [GOLDEN_HASH]
    order = Order([np.full(50, 9000), np.full(20, 7000)], raw_length=129, stride=128, seed=7, weights=[3, 1])
    places = order.locate(np.array([0, 1, 63, 64, 100000]))
    assert [part.tolist() for part in places] == GOLDEN_PLACES


GOLDEN_HASH = 15020427595393229491
GOLDEN_PLACES = [
    [1, 1, 0, 0, 1],
    [0, 0, 0, 0, 23],
    [8, 33, 3444, 45, 544],
    [16, 16, 38, 40, 10],
    [15, 15, 20, 28, 14],
    [531, 3731, 7994, 4922, 6356],
]


# ---------------------------------------------------------------------------------------------- epochs and lanes


def walked(order: Order, lanes: int, stop: int, start: int = 0) -> np.ndarray:
    return np.arange(start * lanes, stop * lanes)


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=9).filter(lambda s: sum(s) > 40),
    st.integers(1, 12),
    st.integers(1, 20),
    st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_each_sequence_once_an_epoch(shards: list[int], lanes: int, block: int, seed: int) -> None:
    order = Order([np.array(shards)], raw_length=9, stride=8, seed=seed, lanes=lanes, shuffle_block=block)
    source = order.sources[0]
    assert source.num_sequences == sum(shards) // 8
    for epoch in range(2):
        places = order.locate(walked(order, lanes, (epoch + 1) * source.per_lane, epoch * source.per_lane))
        assert set(places.epoch.tolist()) == {epoch}
        times = 1 if source.num_sequences >= lanes else lanes
        kept = source.num_sequences // lanes * lanes if times == 1 else source.num_sequences
        assert sorted(places.sequence.tolist()) == sorted(list(range(kept)) * times)
        # Where they begin: at multiples of the stride on the circle of the epoch's tokens.
        layout = source.layout(epoch)
        assert sorted(layout.shards.tolist()) == list(range(len(shards)))
        token = layout.starts[places.place] + places.offset
        assert ((token - layout.rotation) % sum(shards)).tolist() == (places.sequence * 8).tolist()
        assert (layout.shards[places.place] == places.shard).all()
        assert (places.offset < np.array(shards)[places.shard]).all()


def test_a_lane_stays_in_its_stretch_and_walks_it_block_by_block() -> None:
    order = Order([np.full(40, 1000)], raw_length=11, stride=10, seed=1, lanes=4, shuffle_block=100)
    places = order.locate(walked(order, 4, 1000))
    for lane in range(4):
        sequence = places.sequence[lane::4] - lane * 1000
        for block, part in enumerate(sequence.reshape(10, 100)):
            assert sorted(part.tolist()) == list(range(block * 100, block * 100 + 100))
            assert part.tolist() != sorted(part.tolist())


def test_epochs_differ() -> None:
    """The pain of tar shuffles: the same order each epoch. Here are the first places of three epochs."""
    order = Order([np.full(30, 5000)], raw_length=33, stride=32, seed=0, lanes=8)
    per_lane = order.sources[0].per_lane
    firsts = [order.locate(np.arange(16) + epoch * per_lane * 8) for epoch in range(3)]
    for a, b in itertools.combinations(firsts, 2):
        assert (a.sequence != b.sequence).any()
        assert (
            len(
                set(zip(a.shard.tolist(), a.offset.tolist(), strict=True))
                & set(zip(b.shard.tolist(), b.offset.tolist(), strict=True))
            )
            < 3
        )
    layouts = [order.sources[0].layout(e) for e in range(3)]
    assert len({tuple(x.shards.tolist()) for x in layouts}) == len({x.rotation for x in layouts}) == 3
    other = Order([np.full(30, 5000)], raw_length=33, stride=32, seed=1, lanes=8).locate(np.arange(16))
    assert (other.sequence != firsts[0].sequence).any()


def test_ten_thousand_shards_are_located_without_a_file() -> None:
    order = Order([np.random.default_rng(0).integers(10**6, 10**8, 10000)], raw_length=2049, stride=2048, seed=5)
    number = order.sources[0].per_lane * 64 * 3 - 1
    places = order.locate(np.array([number]))
    assert places.epoch.tolist() == [2] and 0 <= places.shard[0] < 10000


# ---------------------------------------------------------------------------------------------- mixing


@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=4), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_quotas_are_exact_in_every_lane_and_period(weights: list[float], seed: int) -> None:
    shards = [np.full(5, 300 + 50 * i) for i in range(len(weights))]
    order = Order(shards, raw_length=9, stride=8, seed=seed, lanes=4, weights=weights, shuffle_block=10)
    want = quotas(weights, 128)
    assert want.sum() == 128
    assert (np.abs(want - np.array(weights) / sum(weights) * 128) < 1).all()
    places = order.locate(np.arange(4 * 128 * 3))
    for lane in range(4):
        for period in range(3):
            part = places.source[lane::4][period * 128 : (period + 1) * 128]
            assert np.bincount(part, minlength=len(weights)).tolist() == want.tolist()
    # Each source is walked epoch by epoch, whatever is mixed in between: no sequence twice in one, in no lane.
    for source, lane in itertools.product(range(len(weights)), range(4)):
        rows = np.flatnonzero(places.source[lane::4] == source)
        seen = list(zip(places.epoch[lane::4][rows].tolist(), places.sequence[lane::4][rows].tolist(), strict=True))
        assert len(set(seen)) == len(seen)


def test_a_share_too_small_to_mix_in_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"small is 0\.1\d*% .* below 1/128"):
        quotas([1, 0.001], 128, ["big", "small"])
    with pytest.raises(ConfigError, match="tiny: 12 tokens, fewer than one sequence of 17"):
        Order([np.array([5, 7])], raw_length=17, stride=16, seed=0, names=["tiny"])


# ---------------------------------------------------------------------------------------------- plan


@given(RANGES, st.integers(0, 400), st.integers(1, 90))
@settings(max_examples=80, deadline=None)
def test_excluded_ranges_are_jumped(ranges: list[tuple[int, int]], drawn: int, count: int) -> None:
    plan = Plan(global_batch=8, micro_batch=4, excluded=tuple(ranges))
    wanted = list(itertools.islice(outside(tuple(ranges)), drawn, drawn + count))
    assert plan.numbers(drawn, count).tolist() == wanted


def test_ranges_merge() -> None:
    assert merge_ranges([(5, 9), (1, 3), (8, 12), (3, 4), (20, 20)]) == ((1, 4), (5, 12))


@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 6), st.integers(1, 70), RANGES, st.integers(0, 50))
@settings(max_examples=80, deadline=None)
def test_ranks_together_take_what_one_rank_takes(
    count: int, data_size: int, micro: int, lanes: int, ranges: list[tuple[int, int]], drawn: int
) -> None:
    def shares(size: int) -> list[np.ndarray]:
        return [Plan(count, micro, lanes, rank, size, tuple(ranges)).share(drawn, count) for rank in range(size)]

    alone, parts = shares(1)[0].reshape(-1), shares(data_size)
    assert len({part.shape for part in parts}) == 1 and parts[0].shape[1] == micro
    together = np.concatenate([part.reshape(-1) for part in parts])
    assert together[together >= 0].tolist() == alone[alone >= 0].tolist()
    assert (
        sorted(alone[alone >= 0].tolist())
        == Plan(count, micro, lanes, excluded=tuple(ranges)).numbers(drawn, count).tolist()
    )
    for part in parts:  # padding only at the end
        flat = part.reshape(-1)
        assert (flat[: (flat >= 0).sum()] >= 0).all()


@given(st.lists(st.integers(1, 40), min_size=3, max_size=8), RANGES, st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_a_ramp_resumed_anywhere_goes_on_with_the_tail(
    sizes: list[int], ranges: list[tuple[int, int]], ranks: int
) -> None:
    def steps(step: int, drawn: int) -> list[list[int]]:
        found = []
        while step < len(sizes):
            plans = [Plan(lambda s, d: sizes[s], 4, 16, rank, ranks, tuple(ranges)) for rank in range(ranks)]
            count = plans[0].count(step, drawn)
            numbers = np.concatenate([plan.share(drawn, count).reshape(-1) for plan in plans])
            found.append(sorted(numbers[numbers >= 0].tolist()))
            step, drawn = step + 1, drawn + count
        return found

    whole = steps(0, 0)
    assert sum(whole, []) == list(itertools.islice(outside(tuple(ranges)), sum(sizes)))
    for step in range(len(sizes)):
        assert steps(step, sum(sizes[:step])) == whole[step:]


def test_a_rank_keeps_its_lanes() -> None:
    for rank in range(4):
        plan = Plan(global_batch=128, micro_batch=8, lanes=64, data_rank=rank, data_size=4)
        for drawn in range(0, 1024, 128):
            assert set((plan.share(drawn, 128) % 64).reshape(-1).tolist()) == set(range(rank * 16, rank * 16 + 16))


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(ConfigError, match="data rank 2 of 2"):
        Plan(8, 4, data_rank=2, data_size=2)
    with pytest.raises(ConfigError, match="batch.micro=0"):
        Plan(8, 0)
    with pytest.raises(ConfigError, match="global batch 0 at step 3"):
        Plan(lambda step, drawn: 0, 4).count(3, 0)
