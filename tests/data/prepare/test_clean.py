"""Cleaning: what is broken is mended, what is clean passes unchanged, Chinese above all."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import ftfy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.data.prepare.clean import STEPS, clean, fix_text, tidy_whitespace
from shardwright.data.prepare.options import CleaningOptions

CORPORA = Path(__file__).parents[4] / "shared" / "corpora"
ALL_OFF = dict.fromkeys(STEPS, False)


def run(text: str, **options: bool) -> str:
    return clean(text, CleaningOptions(**options), Counter())


def read(name: str) -> list[str]:
    path = CORPORA / name
    if not path.exists():
        pytest.skip(f"{path} is absent: the whole of this corpus is tested where shared/ lies beside the checkout")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def test_bundled_poems_pass_unchanged(poems):
    assert [run(poem) for poem in poems] == poems


@pytest.mark.parametrize("name", ["chinese-poems.jsonl.gz", "chinese-law.jsonl.gz"])
def test_clean_chinese_passes_unchanged(name):
    counts: Counter[str] = Counter()
    for text in read(name):
        if any(line != line.rstrip(" \t\u3000") for line in text.split("\n")) or text != text.strip("\n"):
            continue  # blanks at line ends are not clean
        assert clean(text, CleaningOptions(), counts) == text
    assert not counts


def test_widths_quotes_and_compatibility_ideographs_are_kept():
    text = "他說：“ＡＢＣ，１２３！”（見《廬山》）\u3000郎\uf92c ‘ok’ ﾊﾝｶｸ"
    assert run(text) == text


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        ("schÃ¶n, donâ€™t", "schön, don’t"),
        ("AT&amp;T &quot;x&quot;", 'AT&T "x"'),
        ("cafe\u0301", "café"),
        ("a\x00b\x07c\ufeffd\u200be\x7f", "abcde"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("a  \nb\t\n\n\n\nc\u3000\n\n", "a\nb\n\nc"),
        ("\n\n    indented\n", "    indented"),
    ],
)
def test_mends(broken, mended):
    assert run(broken) == mended


def test_each_step_can_be_turned_off():
    text = "schÃ¶n e\u0301\x07  \r\n\r\n\r\n\r\nA  b"
    assert run(text, **ALL_OFF) == text
    for name, step in STEPS.items():
        assert run(text, **(ALL_OFF | {name: True})) == step(text) != text


def test_counts_documents_a_step_changed():
    counts: Counter[str] = Counter()
    for text in ("fine", "tail  \n", "AT&amp;T \x07"):
        clean(text, CleaningOptions(), counts)
    assert counts == {"whitespace": 2, "fix_text": 1, "control_characters": 1}


@given(st.text(st.characters(codec="ascii")))
def test_shortcut_agrees_with_ftfy(text):
    full = ftfy.fix_text(
        text,
        fix_character_width=False,
        uncurl_quotes=False,
        normalization=None,
        remove_control_chars=False,
        fix_line_breaks=False,
    )
    assert fix_text(text) == full


@given(st.text())
def test_cleaning_twice_is_cleaning_once(text):
    once = tidy_whitespace(text)
    assert tidy_whitespace(once) == once
