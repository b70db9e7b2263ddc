"""Examples for supervised objectives: a text with the text that it is to become, or with its class. Part of `prepare`.

JSON lines with both fields, cleaned as other text is, exact repetitions left out; nothing else is filtered. Examples
are few beside a corpus, so one process holds them in memory and an interrupted preparation begins anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shardwright.config import ConfigError
from shardwright.data.examples import write_examples
from shardwright.data.manifest import Manifest
from shardwright.data.prepare import state, units
from shardwright.data.prepare.clean import clean
from shardwright.data.prepare.inputs import InputFile, list_inputs
from shardwright.data.prepare.options import PrepareConfig
from shardwright.data.prepare.readers import read_inputs
from shardwright.data.prepare.records import END, JSON, Record
from shardwright.data.prepare.vocabulary import train_tokenizer
from shardwright.data.tokenizers import Tokenizer, files_of
from shardwright.log import get_logger

_AT_ONCE = 1024  # texts given to the tokenizer


class Row(NamedTuple):
    """An example as text; of a class its name."""

    source: str
    target: str
    validation: bool


def prepare_examples(config: PrepareConfig, output: Path) -> Manifest:
    """Write the examples of `config.input` to `output`; ConfigError names a record that is none, and what it lacks."""
    files = list_inputs(config.input, output)
    counts: Counter[str] = Counter()
    hashes: dict[int, str] = {}
    rows = list(_read(files, config, counts, hashes))
    if not any(not row.validation for row in rows):
        raise ConfigError(f"input={', '.join(config.input)}: no example is left for training; counts: {dict(counts)}")
    tokenizer = _tokenizer(config, rows)
    facts: dict[str, Any] = {
        "recipe": config.recipe(),
        "source": {
            "files": [
                {"name": f.name, "bytes": f.size, "sha256": hashes.get(n)} | ({"tag": f.tag} if f.tag else {})
                for n, f in enumerate(files)
            ]
        },
        "counts": dict(counts),
        "versions": state.versions(config, files, tokenizer),
    }
    if config.tokenizer.path is not None:
        facts["source"]["tokenizer"] = files_of(config.tokenizer.path)
    classes: dict[str, int] | None = None
    if config.class_field is not None:
        classes = {name: number for number, name in enumerate(sorted({row.target for row in rows}))}
        facts["counts"]["classes"] = list(classes)
    splits = {
        split: _encoded([row for row in rows if row.validation == (split == "validation")], tokenizer, classes)
        for split in units.SPLITS
    }
    manifest = write_examples(output, splits, tokenizer, config.shard_tokens, facts)
    found = ", ".join(f"{name} {split.documents // 2:,}" for name, split in sorted(manifest.splits.items()))
    get_logger().info("%s: examples: %s%s", output, found, f"; classes: {', '.join(classes)}" if classes else "")
    return manifest


def _read(files: list[InputFile], config: PrepareConfig, counts: Counter[str], hashes: dict[int, str]) -> Iterator[Row]:
    seen: set[tuple[str, str]] = set()
    for record in read_inputs(files, config):
        if record.kind == END:
            hashes[record.file] = record.data
            continue
        counts["records"] += 1
        source, target = (_text(record, files, field, config) for field in _fields(config))
        if not source.strip() or not target.strip():
            counts["empty"] += 1
        elif config.dedup.exact and (source, target) in seen:
            counts["duplicates"] += 1
        else:
            seen.add((source, target))
            yield Row(source, target, units.is_validation(source, config.validation_every))


def _fields(config: PrepareConfig) -> tuple[str, str]:
    return config.text_field, config.target_field or config.class_field or ""


def _text(record: Record, files: list[InputFile], field: str, config: PrepareConfig) -> str:
    where = f"{files[record.file].name} {record.where}"
    if record.kind != JSON:
        raise ConfigError(
            f"{where}: examples are read from JSON lines alone, with fields {' and '.join(_fields(config))}"
        )
    try:
        text = units.extract(record, field)
    except units.BrokenRecord as broken:
        raise ConfigError(f"{where}: {broken}") from None
    return clean(text or "", config.cleaning, Counter()) if field != config.class_field else text or ""


def _tokenizer(config: PrepareConfig, rows: list[Row]) -> Tokenizer:
    """That of `tokenizer.path`, or one of the training texts of both sides."""
    options = config.tokenizer
    if options.path is not None:
        return Tokenizer.load(options.path, end_of_document=options.end_of_document, pattern=options.pattern)
    training = [row for row in rows if not row.validation]
    texts = [row.source for row in training]
    if config.class_field is None:
        texts += [row.target for row in training]
    return train_tokenizer(lambda: iter(texts), options)


def _encoded(
    rows: list[Row], tokenizer: Tokenizer, classes: dict[str, int] | None
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids of both sides; of a class 1 + its number."""
    for first in range(0, len(rows), _AT_ONCE):
        part = rows[first : first + _AT_ONCE]
        sources = tokenizer.encode_batch([row.source for row in part])
        if classes is not None:
            targets = [[1 + classes[row.target]] for row in part]
        else:
            targets = [ids.tolist() for ids in tokenizer.encode_batch([row.target for row in part])]
        yield from zip((ids.tolist() for ids in sources), targets, strict=True)
