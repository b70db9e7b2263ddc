"""Memory of a task of prepare, whichever process runs it, does not grow with the corpus: measured, task by task.

Those of the search for duplicates are measured in test_duplicates.py.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shardwright.data.prepare import PrepareConfig, pipeline, prepare, records
from shardwright.data.prepare.pool import Pool


def peaks(corpus, output, tokenizer) -> dict[str, int]:
    """The most bytes that any task of a kind had allocated while it ran."""
    found: dict[str, int] = {}

    def measured(function, tasks):
        for task in tasks:
            tracemalloc.start()
            result = function(*task)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            found[function.__name__] = max(found.get(function.__name__, 0), peak)
            yield result

    @contextmanager
    def in_this_process(workers: int) -> Iterator[Pool]:
        yield measured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "build_pool", in_this_process)
        config = {"input": [str(corpus)], "output": str(output), "tokenizer": {"path": str(tokenizer)}}
        prepare(PrepareConfig(**config, shard_tokens=4096), progress=False)
    return found


@pytest.mark.parametrize("is_bounded", [True, False])
def test_memory_of_a_task_does_not_grow_with_the_corpus(tmp_path, jsonl, english, monkeypatch, is_bounded):
    """Four times the text, the same peaks; with units without an end (the check of the check) they do grow."""
    monkeypatch.setattr(records, "UNIT_BYTES", 20_000 if is_bounded else 1 << 30)
    pieces = [text[start : start + 800] for text in english for start in range(0, 4000, 800)]
    small, large = jsonl(tmp_path / "1.jsonl", pieces[:50]), jsonl(tmp_path / "4.jsonl", pieces[:200])
    prepare(PrepareConfig(input=[str(small)], output=str(tmp_path / "t"), tokenizer={"vocab_size": 300}, workers=1))
    peaks(small, tmp_path / "0", tmp_path / "t")  # what libraries allocate once
    one, four = peaks(small, tmp_path / "1", tmp_path / "t"), peaks(large, tmp_path / "4", tmp_path / "t")
    grown = {name: round(four[name] / one[name], 2) for name in ("clean_unit", "encode_unit", "write_shard")}
    assert max(grown.values()) < 1.3 if is_bounded else min(grown.values()) > 1.7, grown
