"""Sequences by number: `Stream` for training (endless, in the order of `order`), `ValidationStream` for evaluation.

Random access is the whole interface: any set of numbers gives their tokens and where documents begin in them. Opening
is lazy: manifests first (totals alone say where a number lies), a shard when one of its tokens is wanted. An objective
turns sequences into a batch, `loader` decides who reads which numbers and when.

Shapes: S sequences, R raw tokens of a sequence, E document starts found in them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shardwright.config import ConfigError
from shardwright.data.files import ShardFiles
from shardwright.data.manifest import ShardError
from shardwright.data.order import Order, Places
from shardwright.data.remote import ShardCache
from shardwright.data.shards import DTYPES
from shardwright.objective.chance import mix
from shardwright.objective.raw import Marks, Pieces

# Positions of a lane by which the shards that it will need are fetched ahead.
_AHEAD = 256


@dataclass(frozen=True)
class Source:
    """A prepared folder or URL, and its share of the mixture relative to the other sources."""

    path: str
    weight: float = 1.0


class Sequences(NamedTuple):
    """Raw sequences, before an objective makes a batch of them."""

    numbers: np.ndarray  # int64 [S], -1 for padding
    tokens: np.ndarray  # uint16 or uint32 [S, R], as stored; end-of-document beyond the row's length
    lengths: np.ndarray  # int64 [S], real tokens of each row: R, less at the end of a validation split, 0 for padding
    rows: np.ndarray  # int64 [E], ascending
    starts: np.ndarray  # int64 [E]: a document begins at tokens[rows, starts]
    words: Marks | None = None  # where words and sentences begin, if asked for
    sentences: Marks | None = None
    pieces: Pieces | None = None  # which documents the rows are of, likewise


@dataclass(frozen=True)
class Wanted:
    """What an objective is told beside tokens and where documents begin."""

    marks: tuple[str, ...] = ()  # of `words`, `sentences`
    documents: bool = False  # which documents they are


NOTHING = Wanted()


@dataclass(frozen=True)
class TrainingSequence:
    """One sequence of a Stream, and where it is from."""

    number: int
    source: int
    epoch: int
    tokens: np.ndarray  # int64 [R]
    document_starts: np.ndarray  # int64, ascending, in tokens of the sequence

    def documents(self) -> np.ndarray:
        """Number of each token's document inside the sequence, int64 [R], from 0."""
        begins = np.zeros(len(self.tokens), np.int64)
        begins[self.document_starts[self.document_starts > 0]] = 1
        return np.cumsum(begins)

    def positions(self) -> np.ndarray:
        """Each token's position since its document began, or since the sequence did, int64 [R]."""
        starts = np.union1d([0], self.document_starts)
        return np.arange(len(self.tokens)) - starts[self.documents()]


class _Rows:
    """Gathers the pieces of sequences into one Sequences."""

    def __init__(self, numbers: np.ndarray, raw_length: int, fill: int, dtype: np.dtype, wanted: Wanted) -> None:
        self.numbers, self.raw_length, self.fill, self.wanted = numbers, raw_length, fill, wanted
        self.tokens = np.empty((len(numbers), raw_length), dtype)
        self.lengths = np.zeros(len(numbers), np.int64)
        self.rows: list[int] = []
        self.shifts: list[int] = []  # what to subtract from a shard's offsets to count from the row's first token
        self.starts: list[np.ndarray] = []
        self.shards: list[str] = []  # sha256 of what each piece is from
        self.marks: dict[str, list[np.ndarray]] = {kind: [] for kind in wanted.marks}
        self.plain = wanted == NOTHING

    def add(self, row: int, at: int, files: ShardFiles, number: int, start: int, stop: int) -> None:
        """Tokens [start, stop) of a shard stand at `at` of the row."""
        self.tokens[row, at : at + stop - start], starts = files.shard(number).read(start, stop)
        self.rows.append(row)
        self.shifts.append(start - at)
        self.starts.append(starts)
        if not self.plain:
            self.add_wanted(files, number, start, stop)

    def add_wanted(self, files: ShardFiles, number: int, start: int, stop: int) -> None:
        """What is wanted beside the tokens that were added last."""
        for kind, found in self.marks.items():
            found.append(files.shard(number).marks(kind, start, stop))
        self.shards.append(files.split.shards[number].sha256)

    def done(self) -> Sequences:
        for row in np.flatnonzero(self.lengths < self.raw_length).tolist():
            self.tokens[row, self.lengths[row] :] = self.fill
        starts = self._placed(self.starts)
        inside = starts.starts >= 0  # the document that a row begins in began before it
        return Sequences(
            self.numbers,
            self.tokens,
            self.lengths,
            starts.rows[inside],
            starts.starts[inside],
            pieces=self._pieces(starts) if self.wanted.documents else None,
            **{kind: self._placed(found) for kind, found in self.marks.items()},
        )

    def _placed(self, found: list[np.ndarray]) -> Marks:
        """Tokens of shards, a list for each piece that was added, as places in the rows."""
        if not found:
            return Marks(*np.empty((2, 0), np.int64))
        counts = np.fromiter(map(len, found), np.int64, len(found))
        return Marks(np.repeat(self.rows, counts), np.concatenate(found) - np.repeat(self.shifts, counts))

    def _pieces(self, starts: Marks) -> Pieces:
        """A document's name is a hash of its shard and of its place there."""
        counts = np.fromiter(map(len, self.starts), np.int64, len(self.starts))
        shards = np.array([int(sha256[:12], 16) for sha256 in self.shards], np.int64)
        shifts = np.repeat(np.array(self.shifts, np.int64), counts)
        names = mix(np.repeat(shards, counts), starts.starts + shifts).astype(np.int64)
        return Pieces(starts.rows, np.maximum(starts.starts, 0), names)


class Stream:
    """The training sequences of a mixture of sources, by number: endless, the same for every reader."""

    #: Sequences there are; None for an endless stream.
    num_sequences: int | None = None

    def __init__(
        self,
        sources: Sequence[Source | str],
        *,
        raw_length: int,
        stride: int,
        seed: int,
        lanes: int = 64,
        shuffle_block: int = 4096,
        period: int = 128,
        split: str = "train",
        cache: ShardCache | None = None,
        allow: Collection[str] = (),
        wanted: Wanted = NOTHING,
    ) -> None:
        """Read the manifests. `raw_length`, `stride`, `wanted` are the objective's, the other numbers the order's.

        ConfigError on sources that do not fit together, are too short or lack what is wanted, ShardError on a missing
        or foreign manifest.
        """
        self.sources = [Source(source) if isinstance(source, str) else source for source in sources]
        self.files = open_sources(self.sources, split, cache, allow, wanted)
        self.wanted = wanted
        self.tokenizer: dict[str, Any] = self.files[0].manifest.tokenizer
        self._dtype = np.result_type(*(DTYPES[files.manifest.dtype] for files in self.files))
        self.raw_length, self.lanes = raw_length, lanes
        self.order = Order(
            [np.array(files.sizes) for files in self.files],
            raw_length=raw_length,
            stride=stride,
            seed=seed,
            lanes=lanes,
            shuffle_block=shuffle_block,
            weights=[source.weight for source in self.sources],
            period=period,
            names=[source.path for source in self.sources],
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the split over all sources, each once."""
        return sum(files.split.tokens for files in self.files)

    def epochs(self, drawn: int) -> dict[str, float]:
        """How often each source has been read after `drawn` sequences."""
        shares = self.order.quotas / self.order.period * drawn / self.lanes
        return {s.path: float(x / o.per_lane) for s, o, x in zip(self.sources, self.order.sources, shares, strict=True)}

    def neighbours(self, numbers: np.ndarray) -> np.ndarray:
        """Another sequence for each: its lane's at the next or last position, so that no other host's is read."""
        k, lane = np.divmod(numbers, self.lanes)
        return np.where(numbers < 0, numbers, (k ^ 1) * self.lanes + lane)

    def sequence(self, number: int) -> TrainingSequence:
        """Sequence `number`, read alone."""
        found = self.sequences(np.array([number]))
        places = self.order.locate(np.array([number]))
        tokens = found.tokens[0].astype(np.int64)
        return TrainingSequence(number, int(places.source[0]), int(places.epoch[0]), tokens, found.starts)

    def sequences(self, numbers: np.ndarray) -> Sequences:
        """The sequences with these numbers (int64 [S]; -1 gives a padding row)."""
        return next(self.batches(numbers, len(numbers)))

    def batches(self, numbers: np.ndarray, size: int) -> Iterator[Sequences]:
        """The same, `size` rows at a time; the order is worked out for all at once, which costs a third."""
        filled = np.where(numbers < 0, 0, numbers)
        places = np.stack(self.order.locate(filled))
        for first in range(0, len(numbers), size):
            part = slice(first, first + size)
            yield _with_fresh_copies(self.files, self._sequences, numbers[part], Places(*places[:, part]))

    def _sequences(self, numbers: np.ndarray, places: Places) -> Sequences:
        batch = _Rows(numbers, self.raw_length, int(self.tokenizer["end_of_document"]), self._dtype, self.wanted)
        real = numbers >= 0
        batch.lengths[real] = length = self.raw_length
        remote = any(files.remote for files in self.files)
        if remote:  # side by side; the shards that sequences run on into come when they are read
            self._fetch(ShardFiles.fetch, numbers[real])
        columns = (real, places.source, places.epoch, places.place, places.shard, places.offset)
        for row, (wanted, source, epoch, place, shard, offset) in enumerate(zip(*map(_listed, columns), strict=True)):
            if not wanted:
                continue
            files = self.files[source]
            if offset + length <= files.sizes[shard]:  # `add` written out: this is the path that counts
                batch.tokens[row], starts = (files.open.get(shard) or files.shard(shard)).read(offset, offset + length)
                batch.rows.append(row)
                batch.shifts.append(offset)
                batch.starts.append(starts)
                if not batch.plain:
                    batch.add_wanted(files, shard, offset, offset + length)
            else:
                self._read_on(batch, row, files, self.order.sources[source].layout(epoch).shards, place, offset)
        if remote:
            self._fetch(ShardFiles.fetch_ahead, numbers[real] + _AHEAD * self.lanes)
        return batch.done()

    def _read_on(self, batch: _Rows, row: int, files: ShardFiles, shards: np.ndarray, place: int, offset: int) -> None:
        """A row that runs on into the shards after its first, round the end of the epoch's order if need be."""
        at = 0
        while at < self.raw_length:
            number = int(shards[place])
            stop = min(offset + self.raw_length - at, files.sizes[number])
            if stop > offset:
                batch.add(row, at, files, number, offset, stop)
                at += stop - offset
            place, offset = (place + 1) % len(shards), 0

    def _fetch(self, work: Callable[[ShardFiles, list[int]], None], numbers: np.ndarray) -> None:
        """Hand the remote shards that these sequences begin in to `work`, source by source."""
        places = self.order.locate(numbers)
        for number, files in enumerate(self.files):
            if files.remote:
                work(files, np.unique(places.shard[places.source == number]).tolist())


class ValidationStream:
    """A split in fixed order: sequence n begins at token n * stride, and every token is predicted exactly once.

    An end-of-document token stands before the first document, as one does before every other, so that first tokens are
    predicted too (`raw_length - stride` of them, the objective's context). The last sequence is padded, weight zero.
    """

    def __init__(
        self,
        sources: Sequence[Source | str],
        *,
        raw_length: int,
        stride: int,
        split: str = "validation",
        cache: ShardCache | None = None,
        allow: Collection[str] = (),
        wanted: Wanted = NOTHING,
    ) -> None:
        """Read the manifests; the splits of several sources follow one another."""
        given = [Source(s) if isinstance(s, str) else s for s in sources]
        self.files = open_sources(given, split, cache, allow, wanted)
        self.wanted = wanted
        self.tokenizer: dict[str, Any] = self.files[0].manifest.tokenizer
        self._dtype = np.result_type(*(DTYPES[files.manifest.dtype] for files in self.files))
        self.raw_length, self.lanes, self._stride = raw_length, 1, stride
        self._before = raw_length - stride
        self._shards = [(files, number) for files in self.files for number in range(len(files.sizes))]
        self._ends = np.cumsum([size for files in self.files for size in files.sizes])
        self.num_tokens = int(self._ends[-1]) if len(self._ends) else 0
        self.text_bytes = sum(files.split.text_bytes for files in self.files)
        self.num_sequences = -(-self.num_tokens // stride)
        if not self.num_tokens:
            raise ConfigError(
                f"{self.files[0].manifest.root}: its {split} split is empty; prepare with a larger share of it"
            )

    def neighbours(self, numbers: np.ndarray) -> np.ndarray:
        """Another sequence for each, half the split away."""
        count = self.num_sequences
        return np.where(numbers < 0, numbers, (numbers + count // 2) % count)

    def sequences(self, numbers: np.ndarray) -> Sequences:
        """The sequences with these numbers (int64 [S], below num_sequences; -1 gives a padding row)."""
        return _with_fresh_copies(self.files, self._sequences, numbers)

    def _sequences(self, numbers: np.ndarray) -> Sequences:
        batch = _Rows(numbers, self.raw_length, int(self.tokenizer["end_of_document"]), self._dtype, self.wanted)
        for row in np.flatnonzero(numbers >= 0).tolist():
            self._read(batch, row, int(numbers[row]) * self._stride - self._before)
        return batch.done()

    def batches(self, numbers: np.ndarray, size: int) -> Iterator[Sequences]:
        """The same, `size` rows at a time."""
        for first in range(0, len(numbers), size):
            yield self.sequences(numbers[first : first + size])

    def _read(self, batch: _Rows, row: int, token: int) -> None:
        at = max(0, -token)
        batch.tokens[row, :at] = batch.fill
        token += at
        place = int(self._ends.searchsorted(token, "right"))
        while at < self.raw_length and token < self.num_tokens:
            files, number = self._shards[place]
            end = int(self._ends[place])
            first = end - files.sizes[number]
            stop = min(end, token + self.raw_length - at)
            if stop > token:
                batch.add(row, at, files, number, token - first, stop - first)
            at, token, place = at + stop - token, stop, place + 1
        batch.lengths[row] = at


def _with_fresh_copies(files: Sequence[ShardFiles], read: Callable[..., Sequences], *arguments: Any) -> Sequences:
    """The result of `read`, once more for each copy in the cache that turns out to have gone bad on this disk."""
    while True:
        try:
            return read(*arguments)
        except ShardError as error:
            if not any(one.drop_bad(error) for one in files):
                raise


def _listed(array: np.ndarray) -> list[Any]:
    return array.tolist()


def open_sources(
    sources: Sequence[Source], split: str, cache: ShardCache | None, allow: Collection[str], wanted: Wanted
) -> list[ShardFiles]:
    """The shards of every source; ConfigError where they do not fit together or lack what is wanted."""
    if not sources:
        raise ConfigError("data: no source; name a prepared folder with data.path=FOLDER (see `shardwright prepare`)")
    opened = [ShardFiles(source.path, split, cache, allow) for source in sources]
    first = opened[0].manifest
    for files in opened[1:]:
        if files.manifest.tokenizer["sha256"] != first.tokenizer["sha256"]:
            raise ConfigError(
                f"{files.manifest.root} and {first.root} were prepared with different tokenizers; "
                "prepare one of them again with the other's tokenizer.json"
            )
    for files in opened if wanted.marks else ():
        filled = next((number for number, size in enumerate(files.sizes) if size), None)
        if filled is not None:
            files.shard(filled).check_marks(wanted.marks)  # now, rather than in the middle of the first step
    return opened
