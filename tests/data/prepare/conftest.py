"""Small real inputs for the tests of prepare, and a hash of a folder."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwright.data.prepare import PrepareConfig
from shardwright.data.prepare.inputs import BUNDLED, list_inputs
from shardwright.data.prepare.readers import read_inputs
from shardwright.data.prepare.records import Record


def bundled(name: str, count: int) -> list[str]:
    """The first documents of a bundled corpus."""
    with gzip.open(BUNDLED / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for _, line in zip(range(count), file, strict=False)]


@pytest.fixture(scope="session")
def english() -> list[str]:
    return bundled("english", 40)


@pytest.fixture(scope="session")
def poems() -> list[str]:
    return bundled("chinese_poems", 400)


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """sha256 of every file below a folder."""
    return lambda folder: {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def read() -> Callable[..., list[Record]]:
    """All records of the given inputs."""

    def run(*inputs: Any, **options: Any) -> list[Record]:
        config = PrepareConfig(input=[str(item) for item in inputs], output="unused", **options)
        return list(read_inputs(list_inputs(config.input), config))

    return run


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """JSON lines with a `text` field."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return path


@pytest.fixture
def jsonl() -> Callable[[Path, list[str]], Path]:
    return write_jsonl
