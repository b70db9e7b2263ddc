"""Duplicates: brute force as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.config import ConfigError
from shardwright.data.prepare.dedup import check_dedup, exact_duplicates, fingerprint, near_duplicates, signature
from shardwright.data.prepare.options import DedupOptions
from shardwright.data.prepare.words import shingles, word_hashes


@given(st.lists(st.sampled_from("abcdef"), min_size=1))
def test_the_first_of_equal_texts_stays(texts):
    found = exact_duplicates(np.stack([fingerprint(text) for text in texts]))
    assert found.tolist() == [text in texts[:n] for n, text in enumerate(texts)]


def test_nothing_at_all():
    assert exact_duplicates(np.empty((0, 2), np.uint64)).tolist() == []


def near(texts, **options):
    chosen = DedupOptions(near=True, **options)
    return near_duplicates((signature(t, chosen, 0) for t in texts), len(texts), chosen, 0).tolist()


def jaccard(a, b):
    a, b = (set(shingles(word_hashes(t), 5).tolist()) for t in (a, b))
    return len(a & b) / len(a | b)


def test_near_duplicates_in_english_and_chinese(english, poems):
    words = english[0].split()
    words[100:103] = ["CHANGED", "words", "here"]
    changed = " ".join(words)
    poem = "".join(poems[:30])
    other = poem.replace("。", "！").replace(poem[50], "字", 1)
    texts = [english[0], english[1], poem, changed, english[2], other, poem]
    assert jaccard(english[0], changed) > 0.9 and jaccard(poem, other) > 0.9
    assert near(texts) == [False, False, False, True, False, True, True]


def test_threshold_is_held_against_true_similarity(english):
    words = english[3].split()[:2000]
    texts = [" ".join(words)]
    for share in (0.02, 0.2, 0.6):
        varied = list(words)
        for place in range(0, len(words), max(int(1 / share), 1)):
            varied[place] = f"x{place}"
        texts.append(" ".join(varied))
    like = [jaccard(texts[0], text) for text in texts[1:]]
    assert near(texts, threshold=0.8) == [False] + [share >= 0.8 for share in like]
    assert near(texts, threshold=0.2) == [False] + [share >= 0.2 for share in like]


def test_texts_without_words_are_like_nothing():
    assert near(["...", "!!!", "..."]) == [False, False, False]


def test_seed_changes_the_signature_and_nothing_else_does(english):
    options = DedupOptions(near=True)
    assert np.array_equal(signature(english[0], options, 1), signature(english[0], options, 1))
    assert not np.array_equal(signature(english[0], options, 1), signature(english[0], options, 2))


def test_impossible_numbers_are_named():
    check_dedup(DedupOptions(near=True))
    check_dedup(DedupOptions(threshold=1.0))  # near-duplicates are not asked for
    with pytest.raises(ConfigError, match="dedup.threshold=0.95 with dedup.permutations=16: MinHash cannot find"):
        check_dedup(DedupOptions(near=True, threshold=0.95, permutations=16))
