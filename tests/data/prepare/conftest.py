"""Small real inputs for the tests of prepare, and a hash of a folder."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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


@pytest.fixture
def without_root() -> Callable[[], AbstractContextManager[None]]:
    """A block in which this process may no more than any user; its modules have to be imported before."""
    return _without_root


@contextmanager
def _without_root() -> Iterator[None]:
    before = os.getresuid()
    if before[1] == 0:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(*before)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user may look into, as the folders of pytest are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """JSON lines with a `text` field."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return path


@pytest.fixture
def jsonl() -> Callable[[Path, list[str]], Path]:
    return write_jsonl
