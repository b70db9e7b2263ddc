"""What `prepare` can be told, as one strict config; the command line is made from it.

`output`, `workers`, `engine`, `ray_address` and `on_error` are free: everything else is the recipe, and two
preparations with the same recipe and input give the same bytes. (`on_error` decides only whether broken input stops the
work: what it leaves is the same, so that a preparation stopped by a broken file can go on with `on_error=skip`.)
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import field_validator, model_validator

from shardwright.config import Strict, free, meaning, without_secret
from shardwright.data.prepare.inputs import readable

FREE = {"output", "workers", "engine", "ray_address", "on_error"}  # what has no say in the bytes of the result
_ADDRESS = re.compile(r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")


class TokenizerOptions(Strict):
    """Train a tokenizer on the training split, or take one from a file."""

    train: Literal["bpe", "wordpiece", "unigram"] | None = meaning(
        None, "Train a byte-level BPE (the default), a WordPiece or a Unigram on the training split"
    )
    path: str | None = meaning(
        None, "Take this tokenizer: tokenizer.json, SentencePiece .model, tiktoken file, vocab.json with merges.txt"
    )
    vocab_size: int = meaning(8192, "Tokens of a trained tokenizer, special tokens included", ge=64)
    special_tokens: list[str] | None = meaning(None, "Special tokens of a trained tokenizer; null takes the usual ones")
    end_of_document: str | None = meaning(None, "Token that ends each document; null takes the tokenizer's own")
    pattern: str | None = meaning(
        None, "How byte-level BPE cuts text before merging: gpt2, cl100k, o200k or a regular expression"
    )
    lowercase: bool = meaning(False, "A trained WordPiece lower-cases text")
    limit_alphabet: int = meaning(6000, "Most characters that a trained WordPiece or Unigram spells", ge=1)
    sample_mib: int = meaning(1024, "Training text read at most, a sample spread over the whole split", ge=1)

    @model_validator(mode="after")
    def _one_way(self) -> TokenizerOptions:
        if self.train is not None and self.path is not None:
            raise ValueError("give either train or path, not both")
        if self.pattern is not None and self.train in ("wordpiece", "unigram"):
            raise ValueError(f"pattern belongs to byte-level BPE; leave it out with train={self.train}")
        return self

    @property
    def kind(self) -> str:
        """What is trained when no path is given."""
        return self.train or "bpe"


class CleaningOptions(Strict):
    """Changes to the text; each step can be turned off. Clean text, Chinese included, passes unchanged."""

    fix_text: bool = meaning(True, "Repair mis-decoded text and HTML entities (ftfy); widths and quotes are kept")
    normalize: bool = meaning(True, "Compose characters (NFC), CJK compatibility ideographs left alone")
    control_characters: bool = meaning(True, "Remove control characters other than tab and line end")
    whitespace: bool = meaning(True, "One kind of line end, no blanks at line ends, at most one blank line in a row")
    collapse_spaces: bool = meaning(False, "Also one space for several inside a line; indentation stays")
    lowercase: bool = meaning(False, "Lower-case everything")


class FilterOptions(Strict):
    """Documents left out, and addresses masked; all off by default, each counted in the manifest."""

    languages: list[str] = meaning([], "Keep documents in these languages only (ISO 639-1 codes, as en, zh)")
    language_confidence: float = meaning(0.5, "Least probability of the language for a document to stay", ge=0, le=1)
    min_characters: int = meaning(0, "Shortest document kept, in characters", ge=0)
    max_characters: int | None = meaning(None, "Longest document kept, in characters", ge=1)
    repetition: bool = meaning(False, "Leave out documents that mostly repeat themselves")
    max_duplicate_lines: float = meaning(0.3, "Largest share of characters in repeated lines", ge=0, le=1)
    max_duplicate_ngrams: float = meaning(0.2, "Largest share of words in repeated runs of 10 words", ge=0, le=1)
    max_top_ngram: float = meaning(0.2, "Largest share of words in the most frequent pair of words", ge=0, le=1)
    mask_emails: str | None = meaning(None, "Replace e-mail addresses by this text, for example <email>")
    decontaminate: list[str] = meaning([], "Leave out documents that share a run of words with these evaluation files")
    decontaminate_words: int = meaning(13, "Length of such a run in words; a Chinese character counts as one", ge=2)


class DedupOptions(Strict):
    """Repeated documents; of several the first in input order stays."""

    exact: bool = meaning(True, "Leave out documents whose cleaned text was seen before")
    near: bool = meaning(False, "Leave out near-duplicates (MinHash)")
    threshold: float = meaning(0.8, "Jaccard similarity from which two documents are near-duplicates", gt=0, le=1)
    permutations: int = meaning(128, "Hash functions of a MinHash signature", ge=16, le=2**14)
    words: int = meaning(5, "Words in a shingle; a Chinese character counts as one", ge=1)


class PrepareConfig(Strict):
    """Text in any form becomes token shards, their index and one manifest."""

    input: list[str] = meaning(
        ...,
        "Files, folders, patterns, URLs, bundled:english, bundled:chinese_poems, hf:NAME[:CONFIG[:SPLIT]]",
        min_length=1,
    )
    output: str = free(..., "Folder to write; an interrupted preparation goes on there")
    text_field: str = meaning("text", "Field, column or (dotted) path that holds the text")
    target_field: str | None = meaning(
        None, "Field of the text that each text is to become: makes examples for objective.name=pairs"
    )
    class_field: str | None = meaning(
        None, "Field of the class of each text: makes examples for objective.name=classify"
    )
    format: Literal["auto", "text", "jsonl", "csv", "tsv", "parquet", "warc", "wikipedia"] = meaning(
        "auto", "Format of every input file; auto goes by name and content"
    )
    members: str | None = meaning(
        None, "Members of a tar to read: an ending, as .txt, or a pattern; null takes those whose endings tell a format"
    )
    documents: Literal["file", "line", "paragraph"] = meaning(
        "file", "What a document is in plain text: a whole file, a line, or lines up to a blank one"
    )
    max_document_mib: int = meaning(16, "Longest document read; a longer one counts as broken input", ge=1, le=512)
    on_error: Literal["fatal", "skip"] = free("fatal", "Broken input stops the preparation, or is left out, counted")
    cleaning: CleaningOptions = meaning(CleaningOptions(), "Changes to the text")
    filters: FilterOptions = meaning(FilterOptions(), "Documents left out")
    dedup: DedupOptions = meaning(DedupOptions(), "Repeated documents")
    validation_every: int = meaning(
        20, "A document is for validation when int(sha256(text), 16) is a multiple of this; 0 keeps none back", ge=0
    )
    tokenizer: TokenizerOptions = meaning(TokenizerOptions(), "Vocabulary")
    starts: bool = meaning(False, "Also index where sentences and words start, for BERT, ALBERT, BART, XLNet")
    shard_tokens: int = meaning(2**24, "Tokens at which a shard is full", ge=1024, le=2**30)
    seed: int = meaning(0, "Seed of the tokenizer's sample and of MinHash", ge=0, lt=2**31)
    workers: int = free(0, "Processes, or Ray tasks at a time; 0 takes one a core", ge=0)
    engine: Literal["processes", "ray"] = free("processes", "Who runs the work: processes of this machine, or Ray")
    ray_address: str | None = free(
        None, "Ray cluster to work on: HOST:PORT of its head node, or auto; null starts Ray on this machine alone"
    )

    @model_validator(mode="after")
    def _one_target(self) -> PrepareConfig:
        if self.target_field is not None and self.class_field is not None:
            raise ValueError("target_field and class_field: an example has one of them; keep one")
        return self

    @property
    def makes_examples(self) -> bool:
        """Whether the result is examples of a source and a target, and not text."""
        return self.target_field is not None or self.class_field is not None

    @model_validator(mode="after")
    def _address_of_ray(self) -> PrepareConfig:
        if self.ray_address is None:
            return self
        if self.engine != "ray":
            raise ValueError("ray_address belongs to engine=ray; leave it out, or give both")
        if self.ray_address != "auto" and not _ADDRESS.fullmatch(self.ray_address):
            raise ValueError(
                f"ray_address={self.ray_address}: expected HOST:PORT of the cluster's head node, or auto; "
                "start the command on a machine of the cluster"
            )
        return self

    @field_validator("input")
    @classmethod
    def _no_secrets(cls, places: list[str]) -> list[str]:
        for place in places:
            without_secret(place)
        return places

    def recipe(self) -> dict[str, Any]:
        """All that decides about the bytes of the result, as plain JSON values, for the manifest."""
        return _readable(self.model_dump(exclude=FREE))

    def for_workers(self) -> str:
        """All of it as JSON; names of files, which workers have no use for, as messages spell them."""
        return json.dumps(_readable(self.model_dump()))


def _readable(value: Any) -> Any:
    """Plain values whose strings can be written as UTF-8, which a file's name need not be."""
    if isinstance(value, dict):
        return {key: _readable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_readable(item) for item in value]
    return readable(value) if isinstance(value, str) else value
