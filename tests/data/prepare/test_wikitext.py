"""Wiki markup to text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.data.prepare.wikitext import article_text, strip_markup


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Bold''' and ''italic''", "Bold and italic"),
        ("[[city|cities]] and [[France]]", "cities and France"),
        ("a{{cite|x={{y|{{{z}}}}}}}b", "ab"),
        ("{{lang|fr|Bonjour}} {{nowrap|x y}}", "Bonjour x y"),
        ("x<ref name=a>note [[link]]</ref>y<ref name=b />z", "xyz"),
        ("[[File:A.jpg|thumb|a [[nested]] caption]]x[[Category:Y]][[fr:Z]]", "x"),
        ("[[:Category:Shown]]", "Category:Shown"),
        ("== History ==\n* one\n* two\n# three", "History\none\ntwo\nthree"),
        ("a\n{| class=x\n! h\n|-\n| c\n{|\n| inner\n|}\n|}\nb", "a\n\nb"),
        ("[http://x.org some text] [https://y.org]", "some text"),
        ("AT&amp;T <b>bold</b><br/>next", "AT&T bold\nnext"),
        ("<nowiki>[[kept]]</nowiki> <!-- gone -->", "[[kept]]"),
        ("-{zh-hans:计算机; zh-hant:電腦}-与-{干}-", "计算机与干"),
        ("a-{R|zh-hans:x;}-b-{ A | zh-hans:计算机; zh-hant:電腦 }-", "azh-hans:x;b计算机"),
        ("a-{T|zh-hans:计算机; zh-hant:電腦}--{H|zh:b}--{-|zh:c}--{A;H|zh:d}-e", "ae"),
        ("-{zh-hans;zh-hant|干}- -{zh:[[a|b]]; en:c}- -{[[a|b]]}-", "干 b b"),
        ("__NOTOC__a\n----\nb", "a\n\nb"),
        ("Mozart ({{IPA|x}}) was", "Mozart was"),
    ],
)
def test_markup(markup, text):
    assert strip_markup(markup) == text


def test_title_comes_first():
    assert article_text("Paris", "'''Paris''' is") == "Paris\n\nParis is"


@given(st.text("[]{}|'=<>ab&;\n*-ref/!", max_size=200))
def test_any_input_ends(markup):
    strip_markup(markup)
