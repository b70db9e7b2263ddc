"""The data order: which sequence stands at number *i*, and which numbers a rank takes in a step. Pure, no files.

Below `stream` (which reads the tokens that `Order` points at) and `loader` (which walks a `Plan`). The number *i* is
global and never restarts; ranks and workers decide only who reads which *i*, so the state of a run is one count.

Words: a source's shards, permuted anew each epoch and rotated, are one circle of tokens; cut at multiples of the stride
it gives N sequences. A lane owns a contiguous stretch of M = N // lanes of them and walks it in permuted blocks.
Number i belongs to lane i mod lanes, at position k = i // lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shardwright.config import ConfigError
from shardwright.objective.chance import mix, scramble

# What a hash is for; keeps the permutations of one seed apart.
_SHARDS, _ROTATION, _BLOCK, _MIXTURE = 1, 2, 3, 4
_ROUNDS = 3
_EPOCHS_KEPT = 8


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of [0, size) sends `index`, element by element, without making the permutation.

    index, size: int64 [n], 0 <= index < size < 2^32; key: uint64 [n]. A Feistel network on a rectangle that just covers
    [0, size), walked again while it lands outside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    rows = np.ceil(np.sqrt(size)).astype(np.int64)
    columns = -(-size // rows)
    image = _feistel(index, rows, columns, key)
    outside = np.flatnonzero(image >= size)
    while len(outside):
        image[outside] = _feistel(image[outside], rows[outside], columns[outside], key[outside])
        outside = outside[image[outside] >= size[outside]]
    return image


def _feistel(x: np.ndarray, rows: np.ndarray, columns: np.ndarray, key: np.ndarray) -> np.ndarray:
    row = x // columns
    column = x - row * columns
    for step in range(_ROUNDS):
        row = _shifted(row, rows, key + np.uint64(2 * step + 1), column)
        column = _shifted(column, columns, key + np.uint64(2 * step + 2), row)
    return row * columns + column


def _shifted(half: np.ndarray, size: np.ndarray, key: np.ndarray, other: np.ndarray) -> np.ndarray:
    """half + hash(key, other) modulo size; the hash is scaled to [0, size) by multiplication, which beats division."""
    bits = scramble(key ^ (other.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03))) >> np.uint64(32)
    moved = half + ((bits * size.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
    return np.where(moved >= size, moved - size, moved)


class EpochLayout(NamedTuple):
    """One epoch of a source: its shards in reading order, where each starts in the concatenation, and the rotation."""

    shards: np.ndarray  # int64 [s]
    starts: np.ndarray  # int64 [s + 1]
    rotation: int


class SourceOrder:
    """The order of one source, by lane and by position in the lane."""

    def __init__(
        self, shard_tokens: np.ndarray, *, number: int, seed: int, raw_length: int, stride: int, lanes: int, block: int
    ) -> None:
        self.shard_tokens = np.asarray(shard_tokens, np.int64)
        self.num_tokens = int(self.shard_tokens.sum())
        self.num_sequences = self.num_tokens // stride if self.num_tokens >= raw_length else 0
        self._shared = self.num_sequences < lanes  # too few to divide: every lane walks them all
        self.per_lane = self.num_sequences if self._shared else self.num_sequences // lanes
        self._number, self._seed, self._stride, self._block = number, seed, stride, block
        self._layouts: dict[int, EpochLayout] = {}

    def sequences(self, lane: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, number of the sequence in that epoch) of the n-th sequence that a lane takes from this source."""
        epoch = n // self.per_lane
        place = n - epoch * self.per_lane
        block = place // self._block
        first = block * self._block
        size = np.minimum(self.per_lane - first, self._block)
        key = mix(self._seed, _BLOCK, self._number, epoch, lane, block)
        place = first + permute(place - first, size, key)
        return epoch, place if self._shared else lane * self.per_lane + place

    def layout(self, epoch: int) -> EpochLayout:
        """Shard order and rotation of an epoch; the last few are kept."""
        found = self._layouts.get(epoch)
        if found is None:
            keys = mix(self._seed, _SHARDS, self._number, epoch, np.arange(len(self.shard_tokens)))
            shards = np.argsort(keys, kind="stable")
            starts = np.concatenate([[0], np.cumsum(self.shard_tokens[shards])])
            rotation = int(mix(self._seed, _ROTATION, self._number, epoch)[0] % np.uint64(self.num_tokens))
            found = EpochLayout(shards, starts, rotation)
            while len(self._layouts) >= _EPOCHS_KEPT:
                self._layouts.pop(next(iter(self._layouts)), None)
            self._layouts[epoch] = found
        return found

    def starts(self, epoch: int, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(place of the shard in the epoch's order, the shard, token offset in it) at which sequences begin."""
        layout = self.layout(epoch)
        token = (sequence * self._stride + layout.rotation) % self.num_tokens
        place = layout.starts.searchsorted(token, "right") - 1
        return place, layout.shards[place], token - layout.starts[place]


def quotas(weights: Sequence[float], period: int, names: Sequence[str] | None = None) -> np.ndarray:
    """Sequences of each source in a period (int64, summing to it) by largest remainder; ConfigError on a share of 0."""
    shares = np.asarray(weights, np.float64) / float(np.sum(weights)) * period
    counts = np.floor(shares).astype(np.int64)
    behind = np.argsort(-(shares - counts), kind="stable")[: period - int(counts.sum())]
    counts[behind] += 1
    for number in np.flatnonzero(counts == 0).tolist():
        name = names[number] if names else f"source {number}"
        raise ConfigError(
            f"data.sources: the weight of {name} is {weights[number] / sum(weights):.3%} of the mixture, "
            f"below 1/{period}, the least that can be mixed in; raise it or leave the source out"
        )
    return counts


class Places(NamedTuple):
    """Where sequences begin, each int64 [n]."""

    source: np.ndarray
    epoch: np.ndarray
    sequence: np.ndarray  # its number in the epoch
    place: np.ndarray  # of the shard in the epoch's order
    shard: np.ndarray  # its number in the manifest
    offset: np.ndarray  # tokens into the shard


class Order:
    """The whole order: number *i* -> source, epoch and place of its tokens."""

    def __init__(
        self,
        shard_tokens: Sequence[np.ndarray],
        *,
        raw_length: int,
        stride: int,
        seed: int,
        lanes: int = 64,
        shuffle_block: int = 4096,
        weights: Sequence[float] | None = None,
        period: int = 128,
        names: Sequence[str] | None = None,
    ) -> None:
        """`shard_tokens`: for each source, the tokens of each shard. ConfigError on a source too short to use."""
        self.lanes, self.period, self.raw_length, self.stride = lanes, period, raw_length, stride
        self.seed = seed
        self.sources = [
            SourceOrder(
                tokens,
                number=number,
                seed=seed,
                raw_length=raw_length,
                stride=stride,
                lanes=lanes,
                block=shuffle_block,
            )
            for number, tokens in enumerate(shard_tokens)
        ]
        for number, source in enumerate(self.sources):
            if not source.num_sequences:
                raise ConfigError(
                    f"{names[number] if names else f'source {number}'}: {source.num_tokens} tokens, fewer than one "
                    f"sequence of {raw_length}; give more text or a smaller data.sequence_length"
                )
        self.quotas = quotas(weights or [1.0] * len(self.sources), period, names)
        self._below = np.concatenate([[0], np.cumsum(self.quotas)])

    def locate(self, numbers: np.ndarray) -> Places:
        """Places of the sequences with these numbers (int64 [n], none negative)."""
        k, lane = np.divmod(numbers, self.lanes)
        if len(self.sources) == 1:
            return self._locate_in(0, lane, k)
        period, slot = np.divmod(k, self.period)
        key = mix(self.seed, _MIXTURE, lane, period)
        slot = permute(slot, np.full_like(slot, self.period), key)
        source = self._below.searchsorted(slot, "right") - 1
        n = period * self.quotas[source] + slot - self._below[source]
        places = Places(*np.empty((6, len(numbers)), np.int64))
        for number in np.unique(source).tolist():
            rows = np.flatnonzero(source == number)
            for whole, part in zip(places, self._locate_in(number, lane[rows], n[rows]), strict=True):
                whole[rows] = part
        return places

    def _locate_in(self, number: int, lane: np.ndarray, n: np.ndarray) -> Places:
        source = self.sources[number]
        epoch, sequence = source.sequences(lane, n)
        starts = np.empty((3, len(n)), np.int64)
        epochs = np.unique(epoch).tolist()
        for one in epochs:
            rows = np.flatnonzero(epoch == one) if len(epochs) > 1 else slice(None)
            starts[:, rows] = source.starts(one, sequence[rows])
        return Places(np.full_like(epoch, number), epoch, sequence, *starts)


Ranges = tuple[tuple[int, int], ...]


def merge_ranges(ranges: Iterable[Sequence[int]]) -> Ranges:
    """The union of [start, stop) ranges of sequence numbers: sorted, disjoint, none empty."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((int(a), int(b)) for a, b in ranges):
        if stop <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


@dataclass(frozen=True)
class Plan:
    """Which numbers each step takes, and which of them this rank. Pure; the same on every rank but for `data_rank`.

    `drawn` counts the sequences that finished steps took, skipped steps included; excluded numbers are never taken and
    never counted, so the c-th sequence drawn is the c-th number outside `excluded`. `global_batch` is the number of
    sequences of a step, or a pure function (step, drawn) -> number for a ramp.
    """

    global_batch: int | Callable[[int, int], int]
    micro_batch: int
    lanes: int = 64
    data_rank: int = 0
    data_size: int = 1
    excluded: Ranges = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "excluded", merge_ranges(self.excluded))
        if not 0 <= self.data_rank < self.data_size:
            raise ConfigError(f"data rank {self.data_rank} of {self.data_size}: ranks count from 0 to size - 1")
        if self.micro_batch < 1:
            raise ConfigError(f"batch.micro={self.micro_batch}: must be 1 or more")

    def count(self, step: int, drawn: int) -> int:
        """Sequences that the step takes over all ranks."""
        count = self.global_batch(step, drawn) if callable(self.global_batch) else self.global_batch
        if count < 1:
            raise ConfigError(f"global batch {count} at step {step}: must be 1 or more")
        return int(count)

    def numbers(self, drawn: int, count: int) -> np.ndarray:
        """The next `count` sequence numbers after `drawn`, int64 ascending, jumping over excluded ranges."""
        taken = np.arange(drawn, drawn + count, dtype=np.int64)
        if not self.excluded:
            return taken
        lengths = np.array([stop - start for start, stop in self.excluded])
        skipped = np.concatenate([[0], np.cumsum(lengths)])
        # A range is behind the c-th number once c reaches its start less all that was skipped before it.
        reached = np.array([start for start, _ in self.excluded]) - skipped[:-1]
        return taken + skipped[reached.searchsorted(taken, "right")]

    def share(self, drawn: int, count: int) -> np.ndarray:
        """Numbers that this rank reads in the step, int64 [micro-batches, micro_batch]; -1 is padding of weight zero.

        Sorted by lane, so that a rank keeps its lanes from step to step; every rank has the same number of
        micro-batches.
        """
        return self.share_of(self.numbers(drawn, count))

    def share_of(self, numbers: np.ndarray) -> np.ndarray:
        """This rank's share of a step that takes these numbers; see `share`."""
        count = len(numbers)
        numbers = numbers[np.argsort(numbers % self.lanes, kind="stable")]
        per_rank = -(-count // self.data_size)
        num_micro = self.num_micro_batches(count)
        own = numbers[self.data_rank * per_rank : (self.data_rank + 1) * per_rank]
        share = np.full(num_micro * self.micro_batch, -1, np.int64)
        share[: len(own)] = own
        return share.reshape(num_micro, self.micro_batch)

    def num_micro_batches(self, count: int) -> int:
        """Micro-batches of a step that takes `count` sequences; the same on every rank."""
        return math.ceil(math.ceil(count / self.data_size) / self.micro_batch)
