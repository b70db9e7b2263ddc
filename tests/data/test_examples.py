"""Examples by number: written, read in any order, by any worker, each once an epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shardwright.config import ConfigError
from shardwright.data.examples import ExampleStream, ValidationExamples, write_examples
from shardwright.data.loader import Loader
from shardwright.data.manifest import Manifest
from shardwright.data.order import Plan
from shardwright.data.tokenizers import load_prepared
from shardwright.objective.pairs import PairsConfig, SupervisedPairs
from shardwright.objective.setting import Setting

EXAMPLES = [(list(range(1, 2 + n % 5)), [n % 400 + 1, 7][: 1 + n % 2]) for n in range(60)]


@pytest.fixture(scope="module")
def examples(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    tokenizer = load_prepared(Manifest.load(prepared))
    write_examples(folder, {"train": EXAMPLES[:50], "validation": EXAMPLES[50:]}, tokenizer, shard_tokens=100)
    return folder


def lists(found: object) -> list[tuple[list[int], list[int]]]:
    sides = (found.sources, found.targets)  # type: ignore[attr-defined]
    cut = [np.split(side.values, side.offsets[1:-1]) for side in sides]
    return [(source.tolist(), target.tolist()) for source, target in zip(*cut, strict=True)]


def test_an_epoch_has_each_example_once(examples: Path) -> None:
    stream = ExampleStream([str(examples)], raw_length=8, seed=3, lanes=2, shuffle_block=8)
    assert len(stream.files[0].sizes) > 2
    first, second = (lists(stream.examples(np.arange(start, start + 50))) for start in (0, 50))
    assert sorted(first) == sorted(second) == sorted(EXAMPLES[:50]) and first != second
    numbers = np.array([13, -1, 2])
    assert lists(stream.examples(numbers)) == [first[13], ([], []), first[2]]
    validation = ValidationExamples([str(examples)], raw_length=8)
    assert validation.num_sequences == 10
    assert lists(validation.examples(np.arange(10))) == EXAMPLES[50:]


def test_the_loader_gives_them_in_any_batch(examples: Path) -> None:
    end = Manifest.load(examples).tokenizer["end_of_document"]
    objective = SupervisedPairs(PairsConfig(), Setting(8, specials={"pad": 600, "end": end}))
    stream = ExampleStream([str(examples)], raw_length=8, seed=3, lanes=2)
    rows: list[dict[int, list[int]]] = []
    for micro, workers in ((8, 0), (2, 1)):
        with Loader(stream, Plan(8, micro, lanes=2), objective, workers=workers) as loader:
            parts = [part for _ in range(10) for part in next(loader).micro_batches]
        rows.append(
            {n: ids for p in parts for n, ids in zip(p["sequence"].tolist(), p["labels"].tolist(), strict=True)}
        )
    assert rows[0] == rows[1] and len(rows[0]) == 80


def test_a_folder_of_texts_is_refused(prepared: Path) -> None:
    with pytest.raises(ConfigError, match="holds texts, the objective needs examples"):
        ExampleStream([str(prepared)], raw_length=8, seed=0)
