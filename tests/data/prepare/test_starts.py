"""Sentence and word starts, and their places in tokens."""

from __future__ import annotations

import numpy as np
import pytest

from shardwright.data.prepare.starts import sentence_starts, to_tokens, word_starts


def sentences(text):
    starts = [*sentence_starts(text), len(text)]
    return [text[a:b].strip() for a, b in zip(starts, starts[1:], strict=False)]


@pytest.mark.parametrize(
    "expected",
    [
        ["Call me Ishmael.", "Some years ago!", "(Never mind.)", "How long?", "It was so."],
        ["Mr. Smith met Gen. J. Grant of the U.S. army.", "They spoke."],
        ["It cost 3.50 dollars, i.e. much.", "He paid."],
        ["He said “Go.”", "She went."],
    ],
)
def test_english(expected):
    assert sentences(" ".join(expected)) == expected


def test_chinese():
    expected = ["扶蘇秦帝子，舉代稱其賢。", "百萬猶在握？", "他說：“可爭天下權！”", "身就一劒……", "棄捐"]
    assert sentences("".join(expected)) == expected


def test_blank_lines_end_sentences():
    assert sentences("CHAPTER 1\n\nCall me\nIshmael") == ["CHAPTER 1", "Call me\nIshmael"]
    assert sentences("") == sentences("  \n ") == []


def test_words():
    text = "Don't go, 你好!"
    assert [text[i] for i in word_starts(text)] == ["D", "'", "t", "g", ",", "你", "好", "!"]


def test_to_tokens():
    #        0    1    2  3  4   (tokens 2 to 4 are bytes of one character)
    begins = np.array([0, 3, 7, 7, 7])
    assert to_tokens(np.array([0, 4, 5, 7]), begins).tolist() == [0, 1, 2]
    assert to_tokens(np.array([0]), np.array([], np.int64)).tolist() == []
