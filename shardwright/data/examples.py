"""Examples by number: a source and what belongs to it, for supervised objectives; beside `stream`, over such shards.

In a folder of examples (prepare/examples.py) documents come in twos: document 2k is the k-th source, 2k + 1 its target,
a text or labels. The order is that of the stream with examples in the place of tokens, so lanes, mixtures, epochs and
resume are the same. Shapes: S examples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shardwright.config import ConfigError
from shardwright.data.files import ShardFiles
from shardwright.data.manifest import Manifest, SplitInfo, shard_path
from shardwright.data.order import Order
from shardwright.data.remote import ShardCache
from shardwright.data.shards import ShardInfo, ShardWriter
from shardwright.data.stream import NOTHING, Source, open_sources
from shardwright.data.tokenizers import Tokenizer
from shardwright.objective.raw import Ragged

_TARGETS = ("target_field", "class_field")  # of a recipe, one of which is given where a folder holds examples


class Examples(NamedTuple):
    """Examples, before an objective makes a batch of them."""

    numbers: np.ndarray  # int64 [S], -1 for padding, whose lists are empty
    sources: Ragged
    targets: Ragged


class _Reader(ABC):
    """What training and validation have in common. `raw_length` is about the tokens of an example, for block sizes."""

    def __init__(
        self,
        sources: Sequence[Source | str],
        raw_length: int,
        split: str,
        cache: ShardCache | None,
        allow: Collection[str],
    ) -> None:
        self.sources = [Source(source) if isinstance(source, str) else source for source in sources]
        self.files = open_sources(self.sources, split, cache, allow, NOTHING)
        self.tokenizer: dict[str, Any] = self.files[0].manifest.tokenizer
        self.raw_length = raw_length
        for files in self.files:
            if not any(map(files.manifest.recipe.get, _TARGETS)):
                raise ConfigError(
                    f"{files.manifest.root}: holds texts, the objective needs examples of a source and a target; "
                    "prepare JSON lines with target_field= or class_field="
                )

    def neighbours(self, numbers: np.ndarray) -> np.ndarray:
        """What wants them is no supervised objective, and reads a stream of text."""
        raise AssertionError("an objective of examples asked for neighbours")

    def batches(self, numbers: np.ndarray, size: int) -> Iterator[Examples]:
        """The examples with these numbers (int64; -1 gives padding), `size` at a time."""
        for first in range(0, len(numbers), size):
            yield self.examples(numbers[first : first + size])

    def examples(self, numbers: np.ndarray) -> Examples:
        """The examples with these numbers."""
        real = numbers >= 0
        places = iter(self._places(numbers[real]))
        pairs = [_read(*next(places)) if there else (np.empty(0, np.int64),) * 2 for there in real.tolist()]
        sources, targets = ([pair[side] for pair in pairs] for side in (0, 1))
        return Examples(numbers, _ragged(sources), _ragged(targets))

    @abstractmethod
    def _places(self, numbers: np.ndarray) -> Iterable[tuple[ShardFiles, int, int]]:
        """(files, shard, number of the example in it) of each."""


class ExampleStream(_Reader):
    """Training examples by number: endless, the same for every reader."""

    num_sequences: int | None = None

    def __init__(
        self,
        sources: Sequence[Source | str],
        *,
        raw_length: int,
        seed: int,
        lanes: int = 64,
        shuffle_block: int = 4096,
        period: int = 128,
        split: str = "train",
        cache: ShardCache | None = None,
        allow: Collection[str] = (),
    ) -> None:
        """See `stream.Stream`; ConfigError where a folder holds texts."""
        super().__init__(sources, raw_length, split, cache, allow)
        self.order = Order(
            [np.array([shard.documents // 2 for shard in files.split.shards]) for files in self.files],
            raw_length=1,
            stride=1,
            seed=seed,
            lanes=lanes,
            shuffle_block=shuffle_block,
            weights=[source.weight for source in self.sources],
            period=period,
            names=[source.path for source in self.sources],
        )

    def _places(self, numbers: np.ndarray) -> Iterable[tuple[ShardFiles, int, int]]:
        found = self.order.locate(numbers)
        columns = (found.source.tolist(), found.shard.tolist(), found.offset.tolist())
        return ((self.files[source], shard, place) for source, shard, place in zip(*columns, strict=True))


class ValidationExamples(_Reader):
    """A split in fixed order, each example once."""

    def __init__(
        self,
        sources: Sequence[Source | str],
        *,
        raw_length: int,
        split: str = "validation",
        cache: ShardCache | None = None,
        allow: Collection[str] = (),
    ) -> None:
        """See `stream.ValidationStream`."""
        super().__init__(sources, raw_length, split, cache, allow)
        self._shards = [(files, number) for files in self.files for number in range(len(files.sizes))]
        self._ends = np.cumsum([files.split.shards[number].documents // 2 for files, number in self._shards])
        self.num_sequences = int(self._ends[-1]) if len(self._ends) else 0
        self.num_tokens = sum(files.split.tokens for files in self.files)
        self.text_bytes = sum(files.split.text_bytes for files in self.files)
        if not self.num_sequences:
            raise ConfigError(
                f"{self.files[0].manifest.root}: its {split} split is empty; write one with examples in it"
            )

    def _places(self, numbers: np.ndarray) -> Iterable[tuple[ShardFiles, int, int]]:
        for number in numbers.tolist():
            place = int(self._ends.searchsorted(number, "right"))
            yield *self._shards[place], number - int(self._ends[place - 1] if place else 0)


def _read(files: ShardFiles, number: int, example: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and target without the tokens that end them."""
    shard = files.shard(number)
    start, middle, stop = shard.document_offsets[2 * example : 2 * example + 3].tolist()
    tokens = shard.tokens(start, stop).astype(np.int64)
    return tokens[: middle - start - 1], tokens[middle - start : -1]


def _ragged(lists: Sequence[np.ndarray]) -> Ragged:
    offsets = np.cumsum([0, *map(len, lists)])
    return Ragged(np.concatenate([np.empty(0, np.int64), *lists]), offsets)


def write_examples(
    folder: str | Path,
    splits: Mapping[str, Iterable[tuple[Sequence[int], Sequence[int]]]],
    tokenizer: Tokenizer,
    shard_tokens: int = 2**22,
    facts: dict[str, Any] | None = None,
) -> Manifest:
    """Write examples (ids of a source, ids or labels of its target) as a prepared folder; `splits` by name.

    A folder that training can use has `train` and `validation`. `facts` go into the manifest.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / tokenizer.file)
    vocabulary = {
        "file": tokenizer.file,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "end_of_document": tokenizer.end_of_document,
    }
    found = {
        split: SplitInfo.of(_write(folder, split, rows, tokenizer, shard_tokens)) for split, rows in splits.items()
    }
    facts = facts or {"recipe": {"target_field": "target"}}
    Manifest(tokenizer=vocabulary, dtype=tokenizer.dtype.name, splits=found, **facts).save(folder)
    return Manifest.load(folder)


def _write(
    folder: Path,
    split: str,
    rows: Iterable[tuple[Sequence[int], Sequence[int]]],
    tokenizer: Tokenizer,
    shard_tokens: int,
) -> list[ShardInfo]:
    infos: list[ShardInfo] = []
    writer: ShardWriter | None = None
    for source, target in rows:
        path = folder / shard_path(split, len(infos))
        writer = writer or ShardWriter(path, tokenizer.dtype, tokenizer.sha256, root=folder)
        for ids in (source, target):
            writer.add([*ids, tokenizer.end_of_document], len(tokenizer.decode(ids).encode()))
        if writer.num_tokens >= shard_tokens:
            infos.append(writer.close())
            writer = None
    return [*infos, writer.close()] if writer is not None else infos
