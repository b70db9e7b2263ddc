"""Our tokenizer as the files by which Hugging Face finds one: its own file, and tokenizer_config.json beside it.

The tokenizer's file is kept byte for byte. tokenizer_config.json says which tokens are special; one that came with an
imported model is kept, and otherwise it is written from the names that vocabularies customarily give them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardwright.config import ConfigError
from shardwright.data.tokenizers import Tokenizer
from shardwright.interop.folder import PAIR, TOKENIZER_CONFIG, holds_pair, write_json
from shardwright.log import get_logger

# What transformers calls a special token -> the customary names of it, the first of which a vocabulary has.
CUSTOMARY = {
    "unk_token": ("<unk>", "[UNK]"),
    "pad_token": ("<pad>", "[PAD]", "<|padding|>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("<mask>", "[MASK]"),
}
CLASSES = {"tokenizer.json": "PreTrainedTokenizerFast", "tokenizer.model": "LlamaTokenizer"}


def load_tokenizer(folder: Path, end_of_document: Any = None) -> Tokenizer | None:
    """The tokenizer that lies in a folder; None where there is none, with a warning where it is Marian's.

    `end_of_document`, an id or none, is taken where neither its files nor custom say which token that is.
    """
    names = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
    merges = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))  # a pair of Marian's has none
    if not (merges or any((folder / name).is_file() for name in names) or any(folder.glob("*.tiktoken"))):
        _warn_of_pair(folder)
        return None
    try:
        return Tokenizer.load(folder)
    except ConfigError:
        if not isinstance(end_of_document, int):
            raise
        return Tokenizer.load(folder, end_of_document=end_of_document)


def _warn_of_pair(folder: Path) -> None:
    """Marian's tokenizer is two, one a language, over the ids of a third file; everything here takes one file."""
    if holds_pair(folder):
        get_logger().warning(
            "%s: opened without a tokenizer, since %s are one for each language; give the model ids of transformers' "
            "MarianTokenizer, or put a tokenizer.json with the ids of vocab.json there",
            folder, ", ".join(PAIR),
        )  # fmt: skip


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Names of its special tokens, by what transformers calls them. A document is read after an end of document, so
    that token begins a text as well where the vocabulary has no `<s>`."""
    found = {
        role: next((name for name in names if tokenizer.token_id(name) is not None), None)
        for role, names in CUSTOMARY.items()
    }
    end = tokenizer.spelling(tokenizer.end_of_document)
    begin = "<s>" if tokenizer.token_id("<s>") is not None else end
    return {role: name for role, name in {"bos_token": begin, "eos_token": end, **found}.items() if name is not None}


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """What config.json and generation_config.json say of special tokens."""
    names = special_tokens(tokenizer)
    found = {role: tokenizer.token_id(names[role]) for role in ("bos_token", "eos_token", "pad_token") if role in names}
    return {f"{role}_id": number for role, number in found.items() if number is not None}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, longest: int) -> None:
    """The tokenizer's files in `folder`; a tokenizer_config.json that is there stays."""
    tokenizer.save(folder)
    if (folder / TOKENIZER_CONFIG).is_file():
        return
    raw: dict[str, Any] = {"tokenizer_class": CLASSES[tokenizer.file], "model_max_length": longest}
    if tokenizer.file == "tokenizer.model":
        raw |= {"legacy": False, "add_bos_token": False, "add_eos_token": False}
    write_json(folder / TOKENIZER_CONFIG, raw | special_tokens(tokenizer) | {"clean_up_tokenization_spaces": False})
