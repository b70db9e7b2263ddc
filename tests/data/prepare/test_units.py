"""Units of work: where input is cut, which documents a shard holds, which side a document is on."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardwright.data.prepare.records import JSON, STRETCH_BYTES, TEXT, UNIT_BYTES, Record, cut_stretches, cut_units
from shardwright.data.prepare.units import extract, is_validation, plan_shards


@given(st.lists(st.lists(st.integers(1, 40), max_size=12), max_size=6), st.integers(1, 100))
def test_shards_hold_every_document_once_in_order(lengths, shard_tokens):
    arrays = [np.array(sizes, np.int64) for sizes in lengths]
    plan = list(plan_shards(enumerate(arrays), shard_tokens))
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


@given(st.lists(st.one_of(st.none(), st.integers(0, STRETCH_BYTES * 2)), max_size=30))
def test_stretches_hold_every_file_once_and_their_ends_do_not_move(sizes):
    stretches = cut_stretches(sizes)
    assert [file for stretch in stretches for file in range(stretch.start, stretch.stop)] == list(range(len(sizes)))
    stored = [[sizes[file] for file in range(s.start, s.stop)] for s in stretches]
    assert all(None in found or sum(found) >= STRETCH_BYTES for found in stored[:-1])
    assert all(None not in found[:-1] and sum(found[:-1]) < STRETCH_BYTES for found in stored)
    assert cut_stretches([*sizes, 1])[: len(stretches) - 1] == stretches[:-1]
    numbers = [stretch.unit(place) for stretch in stretches for place in (0, 5, 10**6)]
    assert numbers == sorted(set(numbers))


def test_bundled_english_gives_17_of_368(read):
    texts = [extract(record, "text") for record in read("bundled:english") if record.kind == JSON]
    assert (len(texts), sum(is_validation(text, 20) for text in texts)) == (368, 17)


@given(st.text(st.characters(codec="utf-8")), st.integers(1, 50))
def test_validation_is_by_hash(text, every):
    assert is_validation(text, every) == (int(hashlib.sha256(text.encode()).hexdigest(), 16) % every == 0)
    assert not is_validation(text, 0)
