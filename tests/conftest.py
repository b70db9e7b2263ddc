"""What all tests share: a fixed seed, one thread, and a small real corpus, raw and prepared.

The text is the beginning of the corpora bundled with the package, so no test needs a download. Ask for
`bundled` (JSON lines), or for `prepared` (the same as token shards).
"""

import os

# Before torch is imported anywhere: bits differ between one and two threads, and torchrun sets one as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datetime
import gzip
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from shardwright.log import get_logger
from tests.ranks import ranks

__all__ = ["ranks"]

CORPORA = Path(__file__).resolve().parents[1] / "shardwright" / "data" / "bundled"
NUM_DOCUMENTS = 60
NUM_CHARACTERS = 1500


DAYS = 6


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what another day runs: tests of real launchers and of faults take up to half a minute each."""
    turns = [i for i in items if i.path.parent.name == "faults" or i.get_closest_marker("in_turn")]
    if os.environ.get("CI") or len(turns) == 1:  # one that was named by hand
        return
    today = datetime.date.today().toordinal() % DAYS
    for number, item in enumerate(sorted(turns, key=lambda item: item.nodeid)):
        if number % DAYS != today:
            item.add_marker(pytest.mark.skip(reason="another day's; CI=1 runs all of them"))


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Every test starts from the same seeds, on one thread, with float32 as the default type and a log that speaks."""
    torch.set_num_threads(1)
    get_logger().setLevel(logging.INFO)  # `--json` raises it for the rest of its process
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def first_documents(name: str, count: int = NUM_DOCUMENTS) -> list[dict[str, str]]:
    """The first `count` documents of a bundled corpus, each cut to NUM_CHARACTERS characters."""
    with gzip.open(CORPORA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
    return [{"id": row["id"], "text": row["text"][:NUM_CHARACTERS]} for row in rows]


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `english.jsonl` and `chinese_poems.jsonl`, 60 real documents each, about 90 and 13 kB."""
    folder = tmp_path_factory.mktemp("bundled")
    for name in ("english", "chinese_poems"):
        rows = (json.dumps(row, ensure_ascii=False) for row in first_documents(name))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def prepared(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The English part of `bundled` as a prepared folder with a byte-level BPE of 512 tokens; do not write into it."""
    from shardwright.config import parse
    from shardwright.data.prepare import PrepareConfig, prepare

    output = tmp_path_factory.mktemp("prepared") / "english"
    raw = {
        "input": [str(bundled / "english.jsonl")],
        "output": str(output),
        "tokenizer": {"vocab_size": 512},
        "validation_every": 10,
        "starts": True,
    }
    prepare(parse(PrepareConfig, raw, "prepare"), progress=False)
    return output
