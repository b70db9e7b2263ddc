"""Duplicates by partitions: the same as going through all documents at once, in memory that does not grow."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from shardwright.data.prepare import PrepareConfig, duplicates
from shardwright.data.prepare.dedup import exact_duplicates, fingerprint, near_duplicates, signature
from shardwright.data.prepare.families import assign_bins
from shardwright.data.prepare.units import Job, write_part

OPTIONS = {"near": True, "threshold": 0.4, "permutations": 32, "words": 1}
CONFIG = PrepareConfig(input=["x"], output="x", dedup=OPTIONS)


class NoBar:
    def advance(self, count: float = 1) -> None:
        pass


@contextmanager
def no_bar(*_: object) -> Iterator[NoBar]:
    yield NoBar()


def in_turn(function, tasks):
    return (function(*task) for task in tasks)


def texts_with_relatives(count: int, seed: int) -> list[str]:
    """Texts of some words, many of them another one changed a little, so that likeness runs along long chains."""
    rng = random.Random(seed)
    texts = ["...", "!?"]  # without a word
    while len(texts) < count:
        words = rng.choice(texts).split() if rng.random() < 0.8 else [str(rng.random()) for _ in range(12)]
        for _ in range(rng.randrange(4)):
            words[rng.randrange(len(words))] = str(rng.random())
        texts.append(" ".join(words))
    return texts


def cleaned(work, texts: list[str], per_unit: int) -> tuple[Job, list[tuple[int, int]], np.ndarray, np.ndarray]:
    """The fingerprints and signatures of cleaning, written as its units are."""
    job = Job(str(work), CONFIG.for_workers())
    prints = np.stack([fingerprint(text) for text in texts])
    signatures = np.stack([signature(text, CONFIG.dedup, 0) for text in texts])
    counts = []
    for unit, start in enumerate(range(0, len(texts), per_unit)):
        part = slice(start, start + per_unit)
        write_part(job.part("clean", unit), {"fingerprints": prints[part], "signatures": signatures[part]}, {})
        counts.append((unit, len(prints[part])))
    return job, counts, prints, signatures


def at_once(prints: np.ndarray, signatures: np.ndarray) -> np.ndarray:
    """All documents in one go: what every partition has to agree with."""
    removed = exact_duplicates(prints).astype(np.uint8)
    values = (None if gone else row for gone, row in zip(removed.tolist(), signatures, strict=True))
    removed[near_duplicates(values, len(prints), CONFIG.dedup, 0)] = duplicates.NEAR
    return removed


@pytest.mark.parametrize(
    ("count", "group_bytes", "partition_rows", "bin_documents"),
    [(50, 1, 9, 2), (150, 700, 40, 5), (150, 5000, 200, 20), (150, 1 << 30, 1 << 30, 1 << 30)],
)
def test_partitions_do_not_show(tmp_path, monkeypatch, count, group_bytes, partition_rows, bin_documents):
    monkeypatch.setattr(duplicates, "GROUP_BYTES", group_bytes)
    monkeypatch.setattr(duplicates, "PARTITION_ROWS", partition_rows)
    monkeypatch.setattr(duplicates, "BIN_DOCUMENTS", bin_documents)
    larger = []

    def watched(roots, most):
        found = assign_bins(roots, most)
        larger.extend(found[2])
        return found

    monkeypatch.setattr(duplicates, "assign_bins", watched)
    for seed in range(2):
        texts = texts_with_relatives(count // 7 * 7, seed)
        texts += texts[:14]  # units of which nothing stays
        job, counts, prints, signatures = cleaned(tmp_path / str(seed), texts, per_unit=7)
        removed = duplicates.find_duplicates(in_turn, job, counts, CONFIG, no_bar)
        expected = at_once(prints, signatures)
        assert removed.tolist() == expected.tolist()
        assert (expected == duplicates.EXACT).sum() > count / 20 < (expected == duplicates.NEAR).sum() < count * 0.8
    assert bool(larger) == (bin_documents < count)  # families cut into blocks were among them


def test_what_stays_is_not_a_family_but_whatever_is_unlike_those_kept(tmp_path):
    """a is like b and b like c, but not a like c: c stays, although all three are of one family."""
    words = [str(number) for number in range(64)]
    texts = [" ".join(words[start : start + 40]) for start in (0, 12, 24)]
    job, counts, prints, signatures = cleaned(tmp_path, texts, per_unit=1)
    assert at_once(prints, signatures).tolist() == [0, duplicates.NEAR, 0]
    assert duplicates.find_duplicates(in_turn, job, counts, CONFIG, no_bar).tolist() == [0, duplicates.NEAR, 0]


def test_an_interrupted_search_goes_on(tmp_path):
    """Files that an attempt left are used by the next, not made again."""
    texts = texts_with_relatives(100, 3)
    job, counts, prints, signatures = cleaned(tmp_path, texts, per_unit=9)

    def stops(function, tasks):
        if function is duplicates.find_near:
            raise KeyboardInterrupt
        return in_turn(function, tasks)

    with pytest.raises(KeyboardInterrupt):
        duplicates.find_duplicates(stops, job, counts, CONFIG, no_bar)
    left = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.rows")}
    removed = duplicates.find_duplicates(in_turn, job, counts, CONFIG, no_bar)
    assert left and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.rows")} == left
    assert removed.tolist() == at_once(prints, signatures).tolist()


def peak_of_a_task(work, num_documents: int) -> int:
    """Most bytes that any task had allocated beyond its arguments."""
    peaks = []

    def measured(function, tasks):
        for task in tasks:
            tracemalloc.start()
            result = function(*task)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            yield result

    texts = texts_with_relatives(num_documents, 5)
    job, counts, *_ = cleaned(work, texts, per_unit=50)
    duplicates.find_duplicates(measured, job, counts, CONFIG, no_bar)
    return max(peaks)


@pytest.mark.parametrize("is_bounded", [True, False])
def test_memory_of_a_task_does_not_grow_with_the_corpus(tmp_path, monkeypatch, is_bounded):
    """Four times the documents, the same peak; without partitions (the check of the check) it does grow."""
    if is_bounded:
        monkeypatch.setattr(duplicates, "GROUP_BYTES", 40_000)
        monkeypatch.setattr(duplicates, "PARTITION_ROWS", 1000)
        monkeypatch.setattr(duplicates, "BIN_DOCUMENTS", 64)
    peak_of_a_task(tmp_path / "warm", 60)  # what the libraries allocate once
    ratio = peak_of_a_task(tmp_path / "4", 2400) / peak_of_a_task(tmp_path / "1", 600)
    assert ratio < 1.3 if is_bounded else ratio > 2.5
