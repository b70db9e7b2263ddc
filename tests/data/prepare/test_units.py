"""Units of work: where input is cut, which documents a shard holds, which side a document is on."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardwright.data.prepare.records import JSON, TEXT, UNIT_BYTES, Record, cut_units
from shardwright.data.prepare.units import extract, is_validation, plan_shards


@given(st.lists(st.lists(st.integers(1, 40), max_size=12), max_size=6), st.integers(1, 100))
def test_shards_hold_every_document_once_in_order(lengths, shard_tokens):
    arrays = [np.array(sizes, np.int64) for sizes in lengths]
    plan = plan_shards(arrays, shard_tokens)
    documents = [(unit, n) for shard in plan for unit, start, stop in shard for n in range(start, stop)]
    assert documents == [(unit, n) for unit, sizes in enumerate(lengths) for n in range(len(sizes))]
    totals = [[lengths[unit][n] for unit, start, stop in shard for n in range(start, stop)] for shard in plan]
    for sizes in totals[:-1]:  # full with its last document, not before
        assert sum(sizes) >= shard_tokens > sum(sizes[:-1])
    assert all(totals)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, UNIT_BYTES)), max_size=20), st.integers(0, 20))
def test_units_go_on_from_any_unit(shape, stop):
    records = [Record(file, "line 1", TEXT, b"x" * size) for file, size in sorted(shape)]
    units = list(cut_units(records, 0, 0, 0))
    assert [r for unit in units for r in unit.records] == records
    if not units:
        return
    done = units[: stop % len(units)]
    file, behind = (done[-1].next_file, done[-1].next_record) if done else (0, 0)
    skipped = sum(len(unit.records) for unit in done)
    assert [r.file < file for r in records[:skipped]].count(False) == behind
    rest = list(cut_units(records[skipped:], len(done), file, behind))
    assert rest == units[len(done) :]


def test_bundled_english_gives_17_of_368(read):
    texts = [extract(record, "text") for record in read("bundled:english") if record.kind == JSON]
    assert (len(texts), sum(is_validation(text, 20) for text in texts)) == (368, 17)


@given(st.text(st.characters(codec="utf-8")), st.integers(1, 50))
def test_validation_is_by_hash(text, every):
    assert is_validation(text, every) == (int(hashlib.sha256(text.encode()).hexdigest(), 16) % every == 0)
    assert not is_validation(text, 0)
