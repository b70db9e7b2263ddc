"""Where sentences and words start, in tokens: what NSP, SOP, BART, XLNet and whole-word masks need. Part of `prepare`.

Simple rules for English and Chinese; blank lines end sentences in every language.
"""

from __future__ import annotations

import re

import numpy as np

from shardwright.data.prepare.words import IDEOGRAPHS

_CLOSING = "\"'”’」』）)\\]】》"
_SENTENCE_END = re.compile(
    f"[。！？…]+[{_CLOSING}]*"  # Chinese: no space follows
    f"|[.!?]+[{_CLOSING}]*(?=\\s)"
    r"|\n[ \t]*(?=\n)"
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“‘])(?:[A-Za-z]|(?:[A-Za-z]\.)+[A-Za-z]|Mr|Mrs|Ms|Messrs|Dr|Prof|St|Gen|Col|Capt|Lieut|Lt|Sgt|Rev|Hon|Sen"
    r"|Rep|Gov|Jr|Sr|No|Nos|Vol|Fig|vs|etc|viz|cf|e\.g|i\.e|al|Inc|Ltd|Co|Corp|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct"
    r"|Nov|Dec)\.$"
)
_WORD_OR_MARK = re.compile(f"[{IDEOGRAPHS}]|[^\\W{IDEOGRAPHS}]+|[^\\w\\s]")


def sentence_starts(text: str) -> np.ndarray:
    """Character at which each sentence starts, int64 ascending; the first is the text's first visible character."""
    starts = [_skip_blanks(text, 0)]
    for end in _SENTENCE_END.finditer(text):
        if _ends_sentence(text, end):
            starts.append(_skip_blanks(text, end.end()))
    found = np.unique(np.array(starts, np.int64))
    return found[found < len(text)]


def word_starts(text: str) -> np.ndarray:
    """Character at which each word or punctuation mark starts, int64; a Chinese character is a word."""
    return np.fromiter((found.start() for found in _WORD_OR_MARK.finditer(text)), np.int64)


def to_tokens(characters: np.ndarray, token_starts: np.ndarray) -> np.ndarray:
    """Tokens that hold these characters, int64 ascending without repeats.

    `token_starts` is the character at which each token's text starts; tokens that are bytes of one character share it,
    and the first of them counts.
    """
    if not len(token_starts):
        return np.empty(0, np.int64)
    holding = np.maximum(np.searchsorted(token_starts, characters, "right") - 1, 0)
    return np.unique(np.searchsorted(token_starts, token_starts[holding], "left"))


def _ends_sentence(text: str, end: re.Match[str]) -> bool:
    """Whether a full stop is one: not that of an abbreviation, and not before a word in lower case."""
    if not end[0].startswith("."):
        return True
    following = text[_skip_blanks(text, end.end()) :][:1]
    if following.islower():
        return False
    return end[0] != "." or not _ABBREVIATION.search(text[max(end.end() - 12, 0) : end.end()])


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position
