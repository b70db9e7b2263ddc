"""A tokenizer of our own as transformers finds it: the same ids, the same special tokens, for every kind of file."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from shardwright.config import ConfigError
from shardwright.data.tokenizers import Tokenizer
from shardwright.interop.check import check_tokenizer
from shardwright.interop.tokenizer import load_tokenizer, special_ids, special_tokens, write_tokenizer

transformers = pytest.importorskip("transformers")

TEXT = "It was a dark night; the people\nof these States.  床前明月光 and 1,234 more."


def trained(kind: str, bundled: Path, tmp_path: Path) -> Tokenizer:
    """One that `prepare` makes."""
    from shardwright.config import parse
    from shardwright.data.prepare import PrepareConfig, prepare

    names = ["<|endoftext|>"] if kind == "bpe" else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    options = {
        "train": kind,
        "vocab_size": 600,
        "special_tokens": names,
        "end_of_document": names[-1 if kind == "bpe" else 3],
    }
    raw = {"input": [str(bundled / "english.jsonl")], "output": str(tmp_path / "data"), "tokenizer": options}
    prepare(parse(PrepareConfig, raw, "prepare"), progress=False)
    return Tokenizer.load(tmp_path / "data")


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_trained_vocabulary_is_found_by_transformers(kind: str, bundled: Path, tmp_path: Path) -> None:
    tokenizer = trained(kind, bundled, tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    write_tokenizer(folder, tokenizer, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXT).tolist()
    assert theirs.eos_token_id == tokenizer.end_of_document and theirs.model_max_length == 64
    expected = {"bos_token", "eos_token"} if kind == "bpe" else {
        "bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token",
    }  # fmt: skip
    assert special_tokens(tokenizer).keys() == expected
    assert all(getattr(theirs, role) == name for role, name in special_tokens(tokenizer).items())
    assert special_ids(tokenizer)["eos_token_id"] == tokenizer.end_of_document


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_is_kept_and_held_against_what_transformers_makes_of_it(kind, bundled, tmp_path, capsys):
    """The first kind is made as Llama's was, which transformers' class is for."""
    sentencepiece = pytest.importorskip("sentencepiece")
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False} if kind == "bpe" else {}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((bundled / "english.jsonl").read_text("utf-8").splitlines()), model_writer=model,
        vocab_size=600, model_type=kind, byte_fallback=True, hard_vocab_limit=False, minloglevel=2, num_threads=1,
        **options,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = Tokenizer.load(tmp_path)
    write_tokenizer(tmp_path, tokenizer, 64)
    assert (tmp_path / "tokenizer.model").read_bytes() == model.getvalue()
    assert check_tokenizer(tmp_path, tokenizer) == (kind == "bpe")
    said = capsys.readouterr().err
    assert ("LlamaTokenizer of transformers cuts text otherwise than tokenizer.model" in said) == (kind == "unigram")


def test_a_tokenizer_config_that_is_there_stays(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    write_tokenizer(tmp_path, Tokenizer.load(prepared), 64)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"chat_template": "x"}


def test_the_end_of_a_document_may_be_told_by_the_model(prepared: Path, tmp_path: Path) -> None:
    """A vocabulary without a customary name of it, as config.json's eos_token_id says."""
    assert load_tokenizer(tmp_path) is None
    text = (prepared / "tokenizer.json").read_text().replace("<|endoftext|>", "<stop>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match="has no token"):
        load_tokenizer(tmp_path)
    found = load_tokenizer(tmp_path, 5)
    assert found is not None and found.end_of_document == 5
