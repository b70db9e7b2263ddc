"""Training of tokenizers: the same bytes in every process, lossless where the kind is."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.config import ConfigError
from shardwright.data.prepare.options import TokenizerOptions
from shardwright.data.prepare.vocabulary import check_pattern, train_tokenizer
from shardwright.data.tokenizers import Tokenizer

SCRIPT = """
import sys
from shardwright.data.prepare.options import TokenizerOptions
from shardwright.data.prepare.vocabulary import train_tokenizer
sys.path.insert(0, {folder!r})
from conftest import bundled
texts = bundled("english", 12) + bundled("chinese_poems", 300)
print(train_tokenizer(lambda: iter(texts), TokenizerOptions(train={kind!r}, vocab_size=2500)).sha256)
"""


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_every_process_trains_the_same_bytes(kind):
    """Also with other numbers of threads: hash tables and sums in another order must not show."""
    found = set()
    for threads in ("1", "2", "3"):
        script = SCRIPT.format(folder=os.path.dirname(__file__), kind=kind)
        environment = os.environ | {"RAYON_NUM_THREADS": threads}
        found.add(subprocess.check_output([sys.executable, "-c", script], env=environment, text=True))
    assert len(found) == 1


@pytest.fixture(scope="module", params=["bpe", "unigram", "cl100k"])
def lossless(request, english, poems) -> Tokenizer:
    options = {"train": "bpe", "pattern": "cl100k"} if request.param == "cl100k" else {"train": request.param}
    return train_tokenizer(lambda: [*english[:4], *poems[:100]], TokenizerOptions(vocab_size=1500, **options))


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=60))
def test_any_text_comes_back(lossless, text):
    assert lossless.decode(lossless.encode(text)) == text


def test_names_of_tokens_in_text_come_back(lossless):
    text = "<unk> </s> <0x0A> <pad> <|endoftext|> <mask>"
    ids = lossless.encode(text)
    assert lossless.decode(ids) == text and lossless.end_of_document not in ids


def test_vocabulary_size_is_kept(lossless, english):
    assert lossless.vocab_size == 1500
    small = train_tokenizer(lambda: [english[0]], TokenizerOptions(train="wordpiece", vocab_size=400))
    assert small.vocab_size == 400


def test_wordpiece_is_berts(english):
    tokenizer = train_tokenizer(lambda: english[:4], TokenizerOptions(train="wordpiece", vocab_size=2000))
    assert [tokenizer.token_id(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    assert tokenizer.end_of_document == 3
    assert tokenizer.decode(tokenizer.encode("the Government of our country")) == "the Government of our country"
    lowered = train_tokenizer(lambda: english[:4], TokenizerOptions(train="wordpiece", vocab_size=2000, lowercase=True))
    assert lowered.decode(lowered.encode("The GOVERNMENT")) == "the government"


def test_wordpiece_spells_most_chinese_characters(poems):
    tokenizer = train_tokenizer(lambda: poems, TokenizerOptions(train="wordpiece", vocab_size=4000))
    unknown = tokenizer.token_id("[UNK]")
    ids = np.concatenate(tokenizer.encode_batch(poems))
    assert (ids == unknown).mean() < 0.005
    few = train_tokenizer(lambda: poems, TokenizerOptions(train="wordpiece", vocab_size=4000, limit_alphabet=200))
    letters = [t for t in json.loads(few.data)["model"]["vocab"] if len(t.removeprefix("##")) == 1]
    assert len({t.removeprefix("##") for t in letters}) == 200


def test_special_tokens_and_end_of_document(english):
    options = TokenizerOptions(train="bpe", vocab_size=300, special_tokens=["<pad>", "<mask>"], end_of_document="<end>")
    tokenizer = train_tokenizer(lambda: english[:1], options)
    assert [tokenizer.token_id(t) for t in ("<pad>", "<mask>", "<end>")] == [0, 1, 2]
    assert tokenizer.end_of_document == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 200}, "a bpe needs at least 258 tokens"),
        ({"train": "unigram", "vocab_size": 200}, "a unigram needs at least"),
        ({"train": "unigram", "special_tokens": ["</s>"]}, "a Unigram needs <unk> among them"),
        ({"train": "wordpiece", "special_tokens": ["[SEP]"]}, r"a WordPiece needs \[UNK\] among them"),
    ],
)
def test_impossible_vocabularies(options, message):
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(lambda: ["a"], TokenizerOptions(**options))


def test_a_pattern_that_is_no_expression():
    check_pattern(None), check_pattern("cl100k"), check_pattern(r"\w+|\s")
    with pytest.raises(ConfigError, match=r"tokenizer.pattern='\(a': is no expression"):
        check_pattern("(a")
