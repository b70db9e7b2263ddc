"""A tokenizer of our own as transformers finds it: the same ids, the same special tokens, for every kind of file."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from shardwright.config import ConfigError
from shardwright.data.tokenizers import Tokenizer
from shardwright.interop.check import check_tokenizer
from shardwright.interop.folder import PAIR
from shardwright.interop.tokenizer import load_tokenizer, special_ids, special_tokens, write_tokenizer
from shardwright.launcher.cli import run
from tests.interop.commands import done
from tests.interop.test_every_family import CASES
from tests.interop.test_every_family import save_theirs as save_family

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


def test_a_pair_of_marians_is_kept_and_told_of(bundled: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One SentencePiece model a language: a line says what to do, and an export has what transformers opens."""
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    save_family(theirs, "MarianMTModel", CASES["MarianMTModel"][2])
    write_pair(theirs, bundled)
    capsys.readouterr()
    assert run(["import", str(theirs), "--output", str(ours)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "source.spm" in line]
    assert len(said) == 1 and f"{theirs}: opened without a tokenizer, since {', '.join(PAIR)} are one" in said[0]
    assert "MarianTokenizer, or put a tokenizer.json" in said[0]
    done(capsys, "export", ours, "--output", back)
    assert all((back / name).read_bytes() == (theirs / name).read_bytes() for name in PAIR)
    before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (theirs, back))
    assert isinstance(after, transformers.MarianTokenizer)
    assert len(before(TEXT)["input_ids"]) > 10 and after(TEXT) == before(TEXT)

    (theirs / "target.spm").unlink()  # no pair: vocab.json alone is nobody's
    assert load_tokenizer(theirs) is None and "source.spm" not in capsys.readouterr().err


def write_pair(folder: Path, bundled: Path) -> None:
    """Marian's tokenizer, by transformers' own class: two models, and ids for the pieces of both."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = {"</s>": 0, "<unk>": 1}
    text = (bundled / "english.jsonl").read_text("utf-8").splitlines()
    for side, size in zip(PAIR, (90, 120), strict=False):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=model, vocab_size=size, hard_vocab_limit=False, minloglevel=2,
            num_threads=1,
        )  # fmt: skip
        (folder / side).write_bytes(model.getvalue())
        found = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        for number in range(found.vocab_size()):
            pieces.setdefault(found.id_to_piece(number), len(pieces))
    pieces["<pad>"] = len(pieces)
    (folder / "vocab.json").write_text(json.dumps(pieces))
    transformers.MarianTokenizer.from_pretrained(folder).save_pretrained(folder)
