"""Filters: documents that are left out, and e-mail addresses that are masked. Part of `prepare`, run by the workers.

All are off by default. A document counts under the first filter that leaves it out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from shardwright.config import ConfigError
from shardwright.data.prepare.archives import page_text
from shardwright.data.prepare.inputs import InputFile
from shardwright.data.prepare.options import FilterOptions, PrepareConfig
from shardwright.data.prepare.readers import read_inputs
from shardwright.data.prepare.records import BROKEN, END, HTML, JSON, WIKI
from shardwright.data.prepare.wikitext import article_text
from shardwright.data.prepare.words import run_hashes, word_hashes
from shardwright.log import get_logger

_EMAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])", re.A)
_LANGUAGE_SAMPLE = 4000  # characters from the middle: beginnings are often titles and menus


class Filters:
    """The filters that are on, in their order."""

    def __init__(self, options: FilterOptions, contamination: np.ndarray | None = None) -> None:
        """`contamination`: sorted uint64 numbers of the evaluation files' runs of words."""
        self.options, self.contamination = options, contamination
        check_languages(options.languages)

    def keep(self, text: str, counts: Counter[str]) -> bool:
        """Whether the document stays; if not, `counts` gains one under the filter's name."""
        for name, is_fine in CHECKS.items():
            if not is_fine(self, text):
                counts[name] += 1
                return False
        return True

    def mask(self, text: str, counts: Counter[str]) -> str:
        """The text with e-mail addresses masked, if asked for; counts the addresses."""
        mask = self.options.mask_emails
        if mask is None:
            return text
        text, count = _EMAIL.subn(lambda _: mask, text)
        counts["masked_emails"] += count
        return text

    def _language(self, text: str) -> bool:
        if not self.options.languages:
            return True
        start = max((len(text) - _LANGUAGE_SAMPLE) // 2, 0)
        language, confidence = identify(text[start : start + _LANGUAGE_SAMPLE])
        return language in self.options.languages and confidence >= self.options.language_confidence

    def _length(self, text: str) -> bool:
        most = self.options.max_characters
        return len(text) >= self.options.min_characters and (most is None or len(text) <= most)

    def _repetition(self, text: str) -> bool:
        """Rules after Rae et al. 2021 (Gopher), appendix A.1.1, on words in place of characters for runs."""
        options = self.options
        if not options.repetition:
            return True
        words = word_hashes(text)
        return (
            repeated_lines(text) <= options.max_duplicate_lines
            and repeated_runs(words, 10) <= options.max_duplicate_ngrams
            and most_frequent_run(words, 2) <= options.max_top_ngram
        )

    def _contamination(self, text: str) -> bool:
        known = self.contamination
        if known is None or not len(known):
            return True
        runs = run_hashes(word_hashes(text), self.options.decontaminate_words)
        places = np.minimum(np.searchsorted(known, runs), len(known) - 1)
        return not bool((known[places] == runs).any())


CHECKS: dict[str, Callable[[Filters, str], bool]] = {
    "length": Filters._length,
    "language": Filters._language,
    "repetition": Filters._repetition,
    "contamination": Filters._contamination,
}


def repeated_lines(text: str) -> float:
    """Share of characters that stand in lines seen before in the document."""
    lines = [line.strip() for line in text.split("\n")]
    seen: set[str] = set()
    repeated = total = 0
    for line in lines:
        total += len(line)
        repeated += len(line) if line in seen else 0
        seen.add(line)
    return repeated / max(total, 1)


def repeated_runs(words: np.ndarray, length: int) -> float:
    """Share of words covered by runs of `length` words that were seen before in the document."""
    runs = run_hashes(words, length)
    if not len(runs):
        return 0.0
    first = np.zeros(len(runs), bool)
    first[np.unique(runs, return_index=True)[1]] = True
    covered = np.zeros(len(words) + 1, np.int64)
    starts = np.flatnonzero(~first)
    np.add.at(covered, starts, 1)
    np.add.at(covered, starts + length, -1)
    return float((np.cumsum(covered)[:-1] > 0).mean())


def most_frequent_run(words: np.ndarray, length: int) -> float:
    """Share of words that the most frequent run of `length` words takes, if it comes more than once."""
    runs = run_hashes(words, length)
    most = int(np.unique(runs, return_counts=True)[1].max()) if len(runs) else 0
    return length * most / len(words) if most > 1 else 0.0


def identify(text: str) -> tuple[str, float]:
    """(ISO 639-1 code, probability) of the text's language (py3langid, Lui and Baldwin 2012)."""
    language, confidence = _identifier().classify(text)
    return language, float(confidence)


def check_languages(codes: list[str]) -> None:
    """ConfigError for a language the identifier does not know."""
    if codes:
        known = set(_identifier().nb_classes)
        unknown = [code for code in codes if code not in known]
        if unknown:
            raise ConfigError(f"filters.languages: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ConfigError("filters.languages needs py3langid: pip install 'shardwright[data]'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def contamination_of(files: list[InputFile], config: PrepareConfig, facts: list[dict[str, Any]]) -> np.ndarray:
    """Sorted numbers of all runs of words in evaluation files, uint64; `facts` gains name, sha256, counts of each file.

    Each file is read by its own format. Of JSON, CSV and Parquet every string counts (question, choices, answer), of
    other formats the text. Records whose texts are all shorter than a run cannot be found again: they are warned of,
    and a file of nothing else is an error, as a broken one always is.
    """
    length = config.filters.decontaminate_words
    runs = [np.empty(0, np.uint64)]
    longest: list[int] = []  # words of the longest text of each record of the file
    for record in read_inputs(files, config.model_copy(update={"format": "auto"}), every_field=True):
        file = files[record.file]
        if record.kind == BROKEN:
            raise ConfigError(f"filters.decontaminate: {file.shown}: {record.where}: {record.data}")
        if record.kind == END:
            counts = {"records": len(longest), "too_short": _num_short(file.shown, longest, length)}
            facts.append({"name": file.name, "sha256": record.data} | counts | ({"tag": file.tag} if file.tag else {}))
            longest = []
            continue
        texts = [word_hashes(text) for text in _strings(record.kind, record.data, f"{file.shown}: {record.where}")]
        longest.append(max(map(len, texts), default=0))
        runs += [run_hashes(words, length) for words in texts]
    return np.unique(np.concatenate(runs))


def _num_short(name: str, longest: list[int], length: int) -> int:
    """How many records of an evaluation file are too short to be found; ConfigError where all are."""
    short = sum(words < length for words in longest)
    if short == len(longest):
        raise ConfigError(
            f"filters.decontaminate: {name}: no text of its {len(longest)} records has {length} words (the longest has "
            f"{max(longest, default=0)}), so that none could be found; lower filters.decontaminate_words"
        )
    if short:
        get_logger().warning(
            f"filters.decontaminate: {name}: {short} of {len(longest)} records have no text of {length} words and "
            "cannot be found; lower filters.decontaminate_words to find more"
        )
    return short


def _strings(kind: str, data: Any, where: str) -> Iterator[str]:
    if kind == JSON:
        try:
            yield from _leaves(json.loads(data))
        except ValueError as error:
            raise ConfigError(f"filters.decontaminate: {where}: not valid JSON: {error}") from None
    elif isinstance(data, bytes):
        yield data.decode("utf-8", "replace")
    elif kind == HTML:
        yield page_text(*data) or ""
    elif kind == WIKI:
        yield article_text(*data) or ""
    else:
        yield from _leaves(data)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.encode("utf-8", "replace").decode()  # lone surrogates stand for bytes that are not UTF-8
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)


def load_contamination(path: Path) -> np.ndarray | None:
    """What `contamination_of` found, as the preparing process left it for the workers."""
    return np.load(path, mmap_mode="r") if path.is_file() else None
