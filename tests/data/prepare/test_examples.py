"""Pairs and classes from JSON lines: read back as they were, refused where they are none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardwright.config import ConfigError, parse
from shardwright.data.examples import ExampleStream, ValidationExamples
from shardwright.data.manifest import Manifest
from shardwright.data.prepare import PrepareConfig, prepare
from shardwright.data.tokenizers import load_prepared

ROWS = [
    {"source": f"The {n}. of {n * n} sentences.", "target": f"第{n}句，共{n * n}句。", "label": "ab"[n % 2]}
    for n in range(120)
]


def write(path: Path, rows: list[Any]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def run(input: Path, output: Path, **settings: Any) -> Manifest:
    raw = {
        "input": [str(input)],
        "output": str(output),
        "text_field": "source",
        "tokenizer": {"vocab_size": 400},
        "validation_every": 5,
        **settings,
    }
    return prepare(parse(PrepareConfig, raw, "prepare"), progress=False)


def read_back(folder: Path) -> list[tuple[list[int], list[int]]]:
    manifest, found = Manifest.load(folder), []
    stream = ExampleStream([str(folder)], raw_length=64, seed=0, lanes=1)
    counts = {split: info.documents // 2 for split, info in manifest.splits.items()}
    parts = [stream.examples(np.arange(counts["train"]))]
    parts.append(ValidationExamples([str(folder)], raw_length=64).examples(np.arange(counts["validation"])))
    for part in parts:
        sides = [np.split(side.values, side.offsets[1:-1]) for side in (part.sources, part.targets)]
        found += [(source.tolist(), target.tolist()) for source, target in zip(*sides, strict=True)]
    return found


def test_pairs_come_back_as_they_were(tmp_path: Path) -> None:
    given = write(tmp_path / "pairs.jsonl.gz", [*ROWS, ROWS[3], {"source": " ", "target": "x"}])
    manifest = run(given, tmp_path / "out", target_field="target")
    assert manifest.counts == {"records": 122, "duplicates": 1, "empty": 1}
    tokenizer = load_prepared(manifest)
    found = {(tokenizer.decode(source), tokenizer.decode(target)) for source, target in read_back(tmp_path / "out")}
    assert found == {(row["source"], row["target"]) for row in ROWS}
    assert manifest.splits["validation"].documents >= 20
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    assert run(given, tmp_path / "out", target_field="target") == manifest
    run(given, tmp_path / "again", target_field="target")
    assert (tmp_path / "again" / "manifest.json").read_bytes() == before
    with pytest.raises(ConfigError, match="choose another output= or delete it"):
        run(given, tmp_path / "out", target_field="label")
    assert not (tmp_path / "out" / ".prepare").exists()


def test_classes_are_numbered_by_name(tmp_path: Path) -> None:
    given = write(tmp_path / "classes.jsonl.gz", ROWS)
    manifest = run(given, tmp_path / "out", class_field="label")
    assert manifest.counts["classes"] == ["a", "b"]
    tokenizer = load_prepared(manifest)
    labels = {row["source"]: 1 + "ab".index(row["label"]) for row in ROWS}
    found = read_back(tmp_path / "out")
    assert {tokenizer.decode(source): target for source, target in found} == {k: [v] for k, v in labels.items()}


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"source": "a"}], {"target_field": "target"}, r"pairs\.jsonl\.gz line 1: no field 'target'; it has source"),
        ([{"source": "a", "target": None}], {"target_field": "target"}, "line 1: field 'target' is null"),
        (ROWS, {"target_field": "target", "class_field": "label"}, "an example has one of them"),
        ([{"source": "a b", "target": ""}], {"target_field": "target"}, "no example is left for training"),
    ],
)
def test_what_is_no_example_is_refused(tmp_path: Path, rows: list, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(write(tmp_path / "pairs.jsonl.gz", rows), tmp_path / "out", **settings)


def test_plain_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text\n")
    with pytest.raises(ConfigError, match=r"a\.txt .*: examples are read from JSON lines alone"):
        run(tmp_path / "a.txt", tmp_path / "out", target_field="target")
