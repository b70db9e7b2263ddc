"""Words as numbers: what repetition, decontamination and near-duplicate search compare. Part of `prepare`.

A word is a run of letters and digits, in lower case; a Chinese character or kana counts as a word of its own, since
Chinese and Japanese put no spaces between words.
"""

from __future__ import annotations

import re
import zlib

import numpy as np

IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(f"[{IDEOGRAPHS}]|[^\\W{IDEOGRAPHS}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying modulo 2**64 loses nothing


def word_hashes(text: str) -> np.ndarray:
    """One number a word, uint64 [words], the same on every machine."""
    crc32 = zlib.crc32
    words = WORD.findall(text.casefold())
    hashes = np.fromiter((crc32(word.encode()) for word in words), np.uint64, len(words))
    return mix(hashes)


def run_hashes(words: np.ndarray, length: int) -> np.ndarray:
    """One number for each run of `length` words, uint64 [words - length + 1]; empty when there are fewer words."""
    count = len(words) - length + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for offset in range(length):
        total = total * _BASE + words[offset : offset + count]
    return mix(total)


def shingles(words: np.ndarray, length: int) -> np.ndarray:
    """Distinct runs of `length` words, sorted; a shorter text is one shingle as a whole."""
    return np.unique(run_hashes(words, min(length, len(words)))) if len(words) else words


def mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64 (the finaliser of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
