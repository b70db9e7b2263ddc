"""Tokenizers of every kind against the libraries they come from."""

from __future__ import annotations

import base64
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from shardwright.config import ConfigError
from shardwright.data.prepare.inputs import BUNDLED
from shardwright.data.tokenizers import PATTERNS, Tokenizer, _byte_letters

GPT2 = Path(__file__).parents[3] / "shared" / "corpora" / "gpt2-bpe"


def bundled(name, count):
    with gzip.open(BUNDLED / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for _, line in zip(range(count), file, strict=False)]


TEXTS = [text[:4000] for text in bundled("english", 12)] + bundled("chinese_poems", 60)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """One small vocabulary in every file format: tokenizer.json, GPT-2's pair, tiktoken; and SentencePiece models."""
    folder = tmp_path_factory.mktemp("tokenizers")
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    )
    library.model.save(str(folder))
    library.add_special_tokens(["<|endoftext|>"])
    library.enable_truncation(16)
    library.enable_padding(length=32)
    library.save(str(folder / "tokenizer.json"))
    bytes_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
    ranks = {
        bytes(bytes_of[c] for c in token): n for token, n in json.loads((folder / "vocab.json").read_text()).items()
    }
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda x: x[1]))
    (folder / "small.tiktoken").write_bytes(b"".join(lines))
    for kind in ("unigram", "bpe"):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in TEXTS for line in text.split("\n")),
            model_writer=model, vocab_size=1200, model_type=kind, byte_fallback=True, character_coverage=0.99,
            hard_vocab_limit=False, minloglevel=2, num_threads=1,
        )  # fmt: skip
        (folder / f"{kind}.model").write_bytes(model.getvalue())
    return folder, ranks


# --- agreement with the libraries -----------------------------------------------------------------------------------


def test_gpt2_pair_agrees_with_the_json_of_the_same_vocabulary(files):
    folder, _ = files
    (folder / "special").mkdir(exist_ok=True)
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "special" / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": len(vocab)}))
    (folder / "special" / "merges.txt").write_text((folder / "merges.txt").read_text())
    pair = Tokenizer.load(folder / "special")
    whole = Tokenizer.load(folder / "tokenizer.json")
    assert pair.end_of_document == whole.end_of_document == len(vocab)
    for a, b in zip(pair.encode_batch(TEXTS), whole.encode_batch(TEXTS), strict=True):
        assert np.array_equal(a, b)
    assert pair.sha256 == Tokenizer.load(folder / "special" / "merges.txt").sha256


def test_gpt2_agrees_with_transformers():
    if not GPT2.is_dir():
        pytest.skip(f"{GPT2} is absent: GPT-2's own vocabulary is tested where shared/ lies beside the checkout")
    from transformers import GPT2TokenizerFast

    theirs = GPT2TokenizerFast(vocab=str(GPT2 / "vocab.json"), merges=str(GPT2 / "merges.txt"))
    ours = Tokenizer.load(GPT2)
    assert (ours.vocab_size, ours.end_of_document, ours.dtype) == (50257, 50256, np.uint16)
    assert [ids.tolist() for ids in ours.encode_batch(TEXTS)] == [theirs(text)["input_ids"] for text in TEXTS]
    assert ours.decode(ours.encode(TEXTS[0])) == TEXTS[0]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tiktoken_files_encode_as_tiktoken_does(files, pattern):
    folder, ranks = files
    theirs = tiktoken.Encoding("small", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={})
    ours = Tokenizer.load(folder / "small.tiktoken", pattern=pattern)
    assert ours.end_of_document == len(ranks) == ours.vocab_size - 1

    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=60) | st.text("a' 1\n\r.!\t", max_size=40))
    def agree(text):
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text)

    agree()
    assert [ids.tolist() for ids in ours.encode_batch(TEXTS)] == [theirs.encode_ordinary(text) for text in TEXTS]


def test_tiktoken_file_of_unknown_size_needs_its_pattern(files):
    folder, ranks = files
    with pytest.raises(ConfigError, match=rf"{len(ranks)} ranks are no vocabulary known here.*tokenizer.pattern="):
        Tokenizer.load(folder / "small.tiktoken")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_models_encode_as_sentencepiece_does(files, kind):
    folder, _ = files
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{kind}.model"))
    ours = Tokenizer.load(folder / f"{kind}.model")
    assert ours.end_of_document == theirs.eos_id()
    assert ours.file == "tokenizer.model"
    assert [ids.tolist() for ids in ours.encode_batch(TEXTS)] == theirs.encode(TEXTS)
    assert ours.token_id("</s>") == theirs.eos_id() and ours.token_id("no such piece") is None


# --- text in, text out ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=["tokenizer.json", "small.tiktoken", "unigram.model", "bpe.model"])
def tokenizer(files, request):
    return Tokenizer.load(files[0] / request.param, pattern="gpt2" if "tiktoken" in request.param else None)


def test_special_tokens_in_text_are_text(tokenizer):
    for name in ("<|endoftext|>", "</s>"):
        assert tokenizer.end_of_document not in tokenizer.encode(f"a {name} b").tolist()


def test_truncation_and_padding_of_the_file_are_off(files):
    tokenizer = Tokenizer.load(files[0] / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    assert [len(x) for x in tokenizer.encode_batch(["a", ""])] == [1, 0]


@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=50))
def test_stream_gives_the_text_and_never_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    pieces.append(stream.finish())
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_of_poems_is_piecewise(tokenizer):
    stream = tokenizer.stream()
    ids = tokenizer.encode(TEXTS[-1])
    pieces = [stream.push(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert sum(map(bool, pieces)) > len(TEXTS[-1]) / 3


@settings(max_examples=80, deadline=None)
@given(ids=st.lists(st.integers(0, 1100), max_size=30))
@example([131, 1, 1, 197, 131])  # of SentencePiece: a stray byte, special tokens, then a whole character
@example([131, 131, 131, 197, 131])
def test_stream_of_any_tokens_ends_up_as_decode(tokenizer, ids):
    """Also for ids that make no valid UTF-8, and for special tokens."""
    stream = tokenizer.stream()
    text = "".join([stream.push(i) for i in ids]) + stream.finish()
    assert text.replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")


def test_starts_point_at_the_text_of_each_token(tokenizer):
    text = "Hello brave world, 你好吗? Yes."
    ids, begins = tokenizer.encode_with_starts([text])[0]
    assert np.array_equal(ids, tokenizer.encode(text))
    assert begins[0] == 0 and (np.diff(begins) >= 0).all() and begins[-1] < len(text)
    for n in range(len(ids) - 1):
        piece = text[begins[n] : begins[n + 1]]
        assert tokenizer.decode(ids[n : n + 1]).strip() == piece.strip() or "\ufffd" in tokenizer.decode(ids[n : n + 1])


def test_wide_vocabularies_are_uint32(tmp_path):
    vocabulary = {chr(0x10000 + n): n for n in range(70000)} | {"[SEP]": 70000, "[UNK]": 70001}
    Library(models.WordLevel(vocabulary, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.dtype == np.uint32 and tokenizer.end_of_document == 70000
    assert tokenizer.encode(chr(0x10000 + 69999)).dtype == np.uint32


# --- files ----------------------------------------------------------------------------------------------------------


def test_save_and_load_keep_every_byte(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path)
    again = Tokenizer.load(path)
    assert (again.sha256, again.end_of_document) == (tokenizer.sha256, tokenizer.end_of_document)
    assert np.array_equal(again.encode(TEXTS[0]), tokenizer.encode(TEXTS[0]))


def test_end_of_document_by_name_number_and_hugging_face_config(files, tmp_path):
    path = files[0] / "tokenizer.json"
    assert Tokenizer.load(path, end_of_document="!").end_of_document == Tokenizer.load(path).token_id("!")
    assert Tokenizer.load(path, end_of_document=7).end_of_document == 7
    (tmp_path / "tokenizer.json").write_bytes(path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "?"}}))
    assert Tokenizer.load(tmp_path).end_of_document == Tokenizer.load(path).token_id("?")
    with pytest.raises(ConfigError, match="has no token </end>; name one of its tokens"):
        Tokenizer.load(path, end_of_document="</end>")
    with pytest.raises(ConfigError, match="end_of_document=99999 is outside its 1501 tokens"):
        Tokenizer.load(path, end_of_document=99999)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.json", None, "no such tokenizer file or folder"),
        ("bad.json", b'{"model": 3}', "is not a Hugging Face tokenizer.json"),
        ("bad.model", b"\n\x0e\n\x05<unk>\xff\xff", "is no known tokenizer"),
        ("bad.tiktoken", b"IQ== 0\n!!! x\n", "expected lines of a base64 token and its rank"),
        ("vocab.json", b"{}", "merges.txt beside it are both needed"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        Tokenizer.load(path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match="holds no tokenizer; expected one of tokenizer.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "x.model", "x.tiktoken"])
def test_an_empty_file_is_named(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=f"{name}: is empty; expected a tokenizer"):
        Tokenizer.load(tmp_path / name)
