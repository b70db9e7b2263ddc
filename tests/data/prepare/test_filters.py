"""Filters against small cases whose answer is plain."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from shardwright.config import ConfigError
from shardwright.data.prepare import PrepareConfig
from shardwright.data.prepare.filters import (
    Filters,
    contamination_of,
    most_frequent_run,
    repeated_lines,
    repeated_runs,
)
from shardwright.data.prepare.inputs import list_inputs
from shardwright.data.prepare.options import FilterOptions
from shardwright.data.prepare.words import run_hashes, shingles, word_hashes


def kept(texts, counts=None, **options):
    filters = Filters(FilterOptions(**options))
    return [text for text in texts if filters.keep(text, counts if counts is not None else Counter())]


def test_all_off_keeps_everything(english, poems):
    assert kept(english + poems + [""]) == english + poems + [""]


def test_language(english, poems):
    german = "Der schnelle braune Fuchs springt über den faulen Hund, und dann schläft er unter dem alten Baum."
    counts: Counter[str] = Counter()
    assert kept([*english[:5], *poems[:5], german], counts, languages=["en"]) == english[:5]
    assert counts == {"language": 6}
    assert kept([english[0], german], languages=["de"]) == [german]
    with pytest.raises(ConfigError, match="filters.languages: unknown xx; known: ace, af"):
        Filters(FilterOptions(languages=["en", "xx"]))


def test_length():
    counts: Counter[str] = Counter()
    assert kept(["a", "ab", "abc", "abcd"], counts, min_characters=2, max_characters=3) == ["ab", "abc"]
    assert counts == {"length": 2}


def test_repetition(english, poems):
    spam = "Buy now and save money today.\n" * 20
    runs = " ".join(["one two three four five six seven eight nine ten"] * 9)
    counts: Counter[str] = Counter()
    assert kept([*english, *poems, spam, runs], counts, repetition=True) == english + poems
    assert counts == {"repetition": 2}


def test_repetition_measures():
    assert repeated_lines("ab\ncd\nab\nab") == 4 / 8
    words = word_hashes("a b c a b c x")
    assert repeated_runs(words, 3) == 3 / 7
    assert most_frequent_run(words, 2) == 4 / 7
    assert most_frequent_run(word_hashes("a b c"), 2) == 0
    assert repeated_runs(word_hashes("a"), 3) == 0


def test_emails():
    counts: Counter[str] = Counter()
    filters = Filters(FilterOptions(mask_emails="<email>"))
    text = "Write to a.b+c@mail.example.org, 李x@例 or x@y.co; not to a@b or http://u:p@h/ or 写信给me@x.com。"
    masked = filters.mask(text, counts)
    assert masked == "Write to <email>, 李x@例 or <email>; not to a@b or http://u:p@h/ or 写信给<email>。"
    assert counts == {"masked_emails": 3}
    assert Filters(FilterOptions()).mask(text, counts) == text


@pytest.mark.parametrize("language", ["english", "poems"])
def test_decontamination(tmp_path, request, language):
    texts = request.getfixturevalue(language)
    words = 13 if language == "english" else 8
    snippet = texts[3][20:220]
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"question": "What is it?", "choices": [snippet, "short"]}))
    filters = {"decontaminate": [str(path)], "decontaminate_words": words}
    options = PrepareConfig(input=["x"], output="y", filters=filters)
    facts: list[dict[str, str]] = []
    runs = contamination_of(list_inputs([str(path)]), options, facts)
    assert len(runs) and [fact["name"] for fact in facts] == ["test.jsonl"]
    chosen, counts = Filters(options.filters, runs), Counter()
    left = [text for text in texts if chosen.keep(text, counts)]
    assert texts[3] not in left and counts["contamination"] == len(texts) - len(left) <= 2
    assert chosen.keep(texts[3][:20], counts)


def test_evaluation_texts_that_are_too_short_are_told(tmp_path, english, capsys):
    path = tmp_path / "test.jsonl"
    short = [json.dumps({"question": "Who was the first president of them all?", "answer": "Washington"})] * 2
    path.write_text("\n".join([*short, json.dumps({"question": english[3][20:220]})]))
    options = PrepareConfig(input=["x"], output="y", filters={"decontaminate": [str(path)]})
    facts: list[dict[str, object]] = []
    assert len(contamination_of(list_inputs([str(path)]), options, facts))
    assert (facts[0]["records"], facts[0]["too_short"]) == (3, 2)
    assert "test.jsonl: 2 of 3 records have no text of 13 words and cannot be found" in capsys.readouterr().err
    path.write_text("\n".join(short))
    message = (
        r"test.jsonl: no text of its 2 records has 13 words \(the longest has 8\).*lower filters.decontaminate_words"
    )
    with pytest.raises(ConfigError, match=message):
        contamination_of(list_inputs([str(path)]), options, [])


def test_words_are_letters_and_single_ideographs():
    assert len(word_hashes("Don't stop 2day, 你好！カナ")) == 8
    assert np.array_equal(word_hashes("HELLO World"), word_hashes("hello, world!"))
    assert len(run_hashes(word_hashes("a b c"), 4)) == 0
    assert len(shingles(word_hashes("a b c"), 5)) == 1
    assert len(shingles(word_hashes("a b a b a b"), 2)) == 2
    assert len(shingles(word_hashes(""), 5)) == 0


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_evaluation_tables_count_with_all_their_strings(tmp_path, english, ending):
    import pyarrow.csv
    import pyarrow.parquet

    path = tmp_path / f"test.{ending}"
    table = pyarrow.table({"n": [1], "question": ["What is it?"], "answer": [english[3][20:220]]})
    pyarrow.csv.write_csv(table, path) if ending == "csv" else pyarrow.parquet.write_table(table, path)
    filters = {"decontaminate": [str(path)]}
    options = PrepareConfig(input=["x"], output="y", format="jsonl", filters=filters)
    facts: list[dict[str, str]] = []
    chosen = Filters(options.filters, contamination_of(list_inputs([str(path)]), options, facts))
    assert facts[0]["name"] == f"test.{ending}" and len(facts[0]["sha256"]) == 64
    assert not chosen.keep(english[3], Counter()) and chosen.keep(english[5], Counter())
