"""What makes documents duplicates: fingerprints and signatures of a text, and which of several stays.

Part of `prepare`. Of several like documents the first in input order stays. The functions here look at documents that
one process holds; `duplicates` above spreads a corpus over them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache

import numpy as np

from shardwright.config import ConfigError
from shardwright.data.prepare.options import DedupOptions
from shardwright.data.prepare.words import mix, shingles, word_hashes

_AT_ONCE = 16384  # shingles hashed together, so that a book does not fill the memory
_BLANK = np.uint32(0xFFFFFFFF)  # what a signature holds before the first shingle
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying modulo 2**64 loses nothing


def check_dedup(options: DedupOptions) -> None:
    """ConfigError where no banding of so many hash functions finds documents so much alike."""
    if not options.near:
        return
    _sketch(options, 0)  # names the package if that is missing
    try:
        _banding(options.threshold, options.permutations)
    except ValueError:
        raise ConfigError(
            f"dedup.threshold={options.threshold} with dedup.permutations={options.permutations}: MinHash cannot find "
            "documents so much alike; lower the threshold or raise the permutations"
            + (" (dedup.exact finds equal ones)" if options.exact else "")
        ) from None


def fingerprint(text: str) -> np.ndarray:
    """128 bits of the text's sha256, as uint64 [2]."""
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], "<u8")


def signature(text: str, options: DedupOptions, seed: int) -> np.ndarray:
    """MinHash signature of the text's shingles (Broder 1997), uint32 [permutations]."""
    sketch = _sketch(options, seed)
    found = (shingles(word_hashes(text), options.words) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    for start in range(0, len(found), _AT_ONCE):
        sketch.update_batch(found[start : start + _AT_ONCE])
    return sketch.hashvalues.astype(np.uint32)


def exact_duplicates(fingerprints: np.ndarray) -> np.ndarray:
    """bool [documents]: True where the same fingerprint (uint64 [documents, 2]) stood earlier."""
    order = np.lexsort((fingerprints[:, 1], fingerprints[:, 0]))  # stable: equal ones stay in input order
    ordered = fingerprints[order]
    repeated = np.zeros(len(order), bool)
    repeated[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return repeated


def near_duplicates(
    signatures: Iterable[np.ndarray | None], count: int, options: DedupOptions, seed: int
) -> np.ndarray:
    """bool [count]: True where an earlier document that stays is at least `threshold` alike.

    `signatures` come in input order, None for a document that is out already.
    """
    kept = Kept(options, seed)
    repeated = np.zeros(count, bool)
    for number, values in enumerate(signatures):
        if values is None or is_blank(values):
            continue
        if kept.has_like(values):
            repeated[number] = True
        else:
            kept.add(values)
    return repeated


class Kept:
    """Documents that stay, to be asked whether one is like another.

    Candidates come from banded hash tables (Leskovec et al., Mining of Massive Datasets, ch. 3) and are compared by
    their whole signatures. About 4 KB a document with 128 permutations.
    """

    def __init__(self, options: DedupOptions, seed: int) -> None:
        self.options, self.seed = options, seed
        self._tables, self._template = _tables(options), _sketch(options, seed)
        self._values: list[np.ndarray] = []

    def add(self, values: np.ndarray) -> None:
        """One more that stays, by its signature."""
        self._tables.insert(len(self._values), self._sketch(values), check_duplication=False)
        self._values.append(values)

    def has_like(self, values: np.ndarray) -> bool:
        """Whether one of those that stay is at least `threshold` alike."""
        alike = (float((self._values[n] == values).mean()) for n in self._tables.query(self._sketch(values)))
        return any(share >= self.options.threshold for share in alike)

    def _sketch(self, values: np.ndarray):  # type: ignore[no-untyped-def]
        from datasketch import MinHash

        return MinHash(
            num_perm=self.options.permutations,
            seed=self.seed,
            hashvalues=values,
            permutations=self._template.permutations,
            scheme=self._template.scheme,
        )


def is_blank(signatures: np.ndarray) -> np.ndarray:
    """Whether signatures (uint32 [..., permutations]) are those of texts without a word, which are like no other."""
    return (signatures == _BLANK).all(axis=-1)


def num_bands(options: DedupOptions) -> int:
    """Hash tables in which candidates are looked up."""
    return _banding(options.threshold, options.permutations)[0]


def band_keys(signatures: np.ndarray, options: DedupOptions) -> np.ndarray:
    """uint64 [documents, bands]: only documents that share a key are candidates."""
    bands, rows = _banding(options.threshold, options.permutations)
    keys = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), (len(signatures), bands))
    for row in range(rows):
        keys = keys * _BASE + signatures[:, row : bands * rows : rows]
    return mix(keys)


def _tables(options: DedupOptions):  # type: ignore[no-untyped-def]
    from datasketch import MinHashLSH

    banding = _banding(options.threshold, options.permutations)
    return MinHashLSH(threshold=options.threshold, num_perm=options.permutations, params=banding)


@cache
def _banding(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands, rows in each) that fit the threshold best; found by integration, hence kept."""
    from datasketch import MinHashLSH

    tables = MinHashLSH(threshold=threshold, num_perm=permutations)
    return tables.b, tables.r


def _sketch(options: DedupOptions, seed: int):  # type: ignore[no-untyped-def]
    try:
        from datasketch import MinHash
    except ImportError:
        raise ConfigError("dedup.near needs datasketch: pip install 'shardwright[data]'") from None
    return MinHash(num_perm=options.permutations, seed=seed, hashfunc=int, scheme="affine32")
