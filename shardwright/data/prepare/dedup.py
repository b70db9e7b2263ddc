"""Duplicates: of several like documents the first in input order stays, however many workers there are.

Part of `prepare`. Workers make the fingerprints; one process, in input order, decides.

Memory of the deciding process: exact search holds 16 bytes a document, and twice that while it sorts: 100 million
documents take some 5 GB. Near-duplicate search holds the signatures in datasketch's hash tables, about 4 KB a document
with 128 permutations: 10 million documents take some 40 GB. Prepare larger corpora in parts, or use exact search alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from shardwright.config import ConfigError
from shardwright.data.prepare.options import DedupOptions
from shardwright.data.prepare.words import shingles, word_hashes

_AT_ONCE = 16384  # shingles hashed together, so that a book does not fill the memory


def check_dedup(options: DedupOptions) -> None:
    """ConfigError where no banding of so many hash functions finds documents so much alike."""
    if not options.near:
        return
    _sketch(options, 0)  # names the package if that is missing
    from datasketch import MinHashLSH

    try:
        MinHashLSH(threshold=options.threshold, num_perm=options.permutations)
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

    `signatures` come in input order, None for a document that is out already. Candidates come from banded hash tables
    (Leskovec et al., Mining of Massive Datasets, ch. 3) and are compared by their whole signatures.
    """
    from datasketch import MinHash, MinHashLSH

    tables = MinHashLSH(threshold=options.threshold, num_perm=options.permutations)
    template = _sketch(options, seed)
    kept: dict[int, np.ndarray] = {}
    repeated = np.zeros(count, bool)
    for number, values in enumerate(signatures):
        if values is None:
            continue
        sketch = MinHash(
            num_perm=options.permutations,
            seed=seed,
            hashvalues=values,
            permutations=template.permutations,
            scheme=template.scheme,
        )
        if sketch.is_empty():  # a text without a word is like no other
            continue
        alike = (float((kept[other] == values).mean()) for other in tables.query(sketch))
        if any(share >= options.threshold for share in alike):
            repeated[number] = True
        else:
            tables.insert(number, sketch, check_duplication=False)
            kept[number] = values
    return repeated


def _sketch(options: DedupOptions, seed: int):  # type: ignore[no-untyped-def]
    try:
        from datasketch import MinHash
    except ImportError:
        raise ConfigError("dedup.near needs datasketch: pip install 'shardwright[data]'") from None
    return MinHash(num_perm=options.permutations, seed=seed, hashfunc=int, scheme="affine32")
