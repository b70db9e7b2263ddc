"""What workers do with a unit: raw records become cleaned documents, documents become tokens, tokens become shards.

Part of `prepare`. Each result is one file, written whole or not at all, a pure function of its unit and the recipe: so
it does not matter which process makes it, when, or how often.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shardwright.config import ConfigError
from shardwright.data.manifest import ShardInfo, shard_path, write_atomic
from shardwright.data.prepare import starts
from shardwright.data.prepare.archives import page_text
from shardwright.data.prepare.clean import clean
from shardwright.data.prepare.dedup import fingerprint, signature
from shardwright.data.prepare.filters import Filters, load_contamination
from shardwright.data.prepare.inputs import InputFile
from shardwright.data.prepare.options import PrepareConfig
from shardwright.data.prepare.readers import read_inputs
from shardwright.data.prepare.records import (
    BROKEN,
    END,
    HTML,
    JSON,
    TEXT,
    WIKI,
    Record,
    Stretch,
    Unit,
    cut_units,
    field_of,
)
from shardwright.data.prepare.wikitext import article_text
from shardwright.data.shards import ShardWriter, read_shard_info
from shardwright.data.tokenizers import Tokenizer

SPLITS = ("train", "validation")
Advance = Callable[[int], None]


class Job(NamedTuple):
    """What every task needs to know, small enough to travel with each."""

    work: str  # folder of intermediate files
    config: str  # the PrepareConfig as JSON
    key: str = ""  # hash of the evaluation files or of the tokenizer, so that a worker never keeps another one

    def part(self, kind: str, unit: int) -> Path:
        """File of a unit: kind is `clean` or `tokens`."""
        return Path(self.work) / kind / f"{unit // 1000:04d}" / f"{unit:07d}.part"


class BrokenRecord(Exception):
    """A record that is no document; the message says why, `lines` how many lines into the record."""

    def __init__(self, reason: str, lines: int = 0) -> None:
        super().__init__(reason)
        self.lines = lines

    def where(self, record: Record) -> str:
        """Place of the fault, given that of the record's beginning."""
        head, _, line = record.where.rpartition(" ")
        return f"{head} {int(line) + self.lines}" if self.lines else record.where


# --- cleaning -------------------------------------------------------------------------------------------------------


def clean_unit(unit: Unit, job: Job) -> dict[str, Any]:
    """Write the cleaned documents of a unit; returns its facts, which also stand in the file.

    With `on_error=fatal` a unit with a broken record is not written: the preparation stops on its facts.
    """
    config = read_config(job.config)
    documents: list[str] = []
    validation: list[bool] = []
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("all", "cleaning", "filters")}
    broken: list[tuple[int, str, str]] = []
    ends: list[tuple[int, str]] = []
    records: Counter[int] = Counter()
    for record in unit.records:
        if record.kind == END:
            ends.append((record.file, record.data))
            continue
        counts["all"]["records"] += 1
        records[record.file] += 1
        try:
            raw = extract(record, config.text_field)
        except BrokenRecord as error:
            broken.append((record.file, error.where(record), str(error)))
            continue
        text = _refine(raw, config, _filters(job), counts)
        if text is not None:
            documents.append(text)
            validation.append(is_validation(raw or "", config.validation_every))
    facts = {
        "unit": unit.number,
        "next": [unit.next_file, unit.next_record],
        "documents": len(documents),
        "counts": {name: dict(counter) for name, counter in counts.items()},
        "broken": broken,
        "ends": ends,
        "records": [*records.items()],
    }
    if config.on_error == "skip" or not broken:
        _write_clean(job.part("clean", unit.number), documents, validation, config, facts)
    return facts


def done_units(stretch: Stretch, job: Job) -> list[dict[str, Any]]:
    """Facts of the stretch's units that are cleaned without a gap from its first."""
    facts: list[dict[str, Any]] = []
    while (path := job.part("clean", stretch.unit(len(facts)))).exists():
        facts.append(read_part(path, ())[1])
    return facts


def is_done(stretch: Stretch, done: list[dict[str, Any]]) -> bool:
    """Whether these facts reach to the end of the stretch."""
    return bool(done) and any(file == stretch.stop - 1 for file, _ in done[-1]["ends"])


def units_left(
    stretch: Stretch, files: list[InputFile], done: list[dict[str, Any]], config: PrepareConfig, advance: Advance
) -> Iterator[Unit]:
    """The stretch's units behind those done; `files` are its own."""
    if is_done(stretch, done):
        return
    file, behind = done[-1]["next"] if done else (stretch.start, 0)
    records = read_inputs(files, config, first_file=file, behind=behind, start=stretch.start, advance=advance)
    yield from cut_units(records, stretch.unit(len(done)), file, behind)


def clean_stretch(stretch: Stretch, files: list[InputFile], known: int, job: Job) -> list[dict[str, Any]]:
    """Read the stretch and clean its units; returns their facts but for those of the first `known`.

    Done again, it goes on behind the units that are there. With `on_error=fatal` it stops at a broken record.
    """
    config = read_config(job.config)
    done = done_units(stretch, job)
    found = done[known:]
    for unit in units_left(stretch, files, done, config, lambda count: None):
        found.append(clean_unit(unit, job))
        if found[-1]["broken"] and config.on_error == "fatal":
            break
    return found


def extract(record: Record, field: str) -> str | None:
    """The text of a record, None for a web page without any; BrokenRecord says what is wrong with it."""
    if record.kind == BROKEN:
        raise BrokenRecord(record.data)
    if record.kind == HTML:
        return _page(record.data)
    if record.kind == WIKI:
        return article_text(*record.data)
    if record.kind == TEXT:
        return _decode(record.data)
    value = _field(_decode(record.data), field, record.where) if record.kind == JSON else record.data
    if not isinstance(value, str):
        kind = "null" if value is None else f"of type {type(value).__name__}"
        raise BrokenRecord(f"field {field!r} is {kind}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"lone surrogate \\u{code:04x}"
        raise BrokenRecord(f"not valid UTF-8: {what} at character {error.start + 1} of the text") from None
    return value


def _page(data: tuple[bytes, str, str]) -> str | None:
    try:
        return page_text(*data)
    except ConfigError:
        raise
    except Exception as error:  # pages of the open web find faults that no library foresaw
        raise BrokenRecord(f"no text can be extracted ({type(error).__name__}: {error})") from None


def is_validation(text: str, every: int) -> bool:
    """Whether a document is kept for validation, by the text as its source gives it, before any cleaning.

    So a document stays on its side whatever cleaning is chosen, and other programs can tell the side from the source.
    """
    return every > 0 and int(hashlib.sha256(text.encode()).hexdigest(), 16) % every == 0


def _refine(text: str | None, config: PrepareConfig, filters: Filters, counts: dict[str, Counter[str]]) -> str | None:
    """Cleaned and masked text, None where there is none or a filter leaves it out."""
    text = clean(text, config.cleaning, counts["cleaning"]) if text else ""
    if not text.strip():
        counts["all"]["empty"] += 1
        return None
    if not filters.keep(text, counts["filters"]):
        return None
    return filters.mask(text, counts["cleaning"])


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        lines = data.count(b"\n", 0, error.start)
        byte = error.start - data.rfind(b"\n", 0, error.start)
        reason = f"not valid UTF-8: 0x{data[error.start]:02x} at byte {byte} of the line; convert it to UTF-8"
        raise BrokenRecord(reason, lines) from None


def _field(line: str, field: str, where: str) -> Any:
    """The value of a field of a JSON object; a dotted name reaches inside unless the object has it as it stands."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BrokenRecord(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BrokenRecord(f"expected a JSON object with a field {field!r}, found {type(value).__name__}")
    kind, found = field_of(value, field, where)
    if kind == BROKEN:
        raise BrokenRecord(found)
    return found


def _write_clean(
    path: Path, documents: list[str], validation: list[bool], config: PrepareConfig, facts: dict[str, Any]
) -> None:
    encoded = [text.encode() for text in documents]
    arrays: dict[str, np.ndarray] = {
        "text": np.frombuffer(b"".join(encoded), np.uint8),
        "offsets": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        "validation": np.array(validation, np.uint8),
    }
    if config.dedup.exact:
        arrays["fingerprints"] = np.array([fingerprint(text) for text in documents], np.uint64).reshape(-1, 2)
    if config.dedup.near:
        signatures = [signature(text, config.dedup, config.seed) for text in documents]
        arrays["signatures"] = np.array(signatures, np.uint32).reshape(-1, config.dedup.permutations)
    write_part(path, arrays, facts)


# --- the tokenizer's sample -----------------------------------------------------------------------------------------


def training_bytes(unit: int, removed: np.ndarray, job: Job) -> int:
    """UTF-8 bytes of a unit's training documents, those in `removed` (bool [documents]) aside."""
    arrays, _ = read_part(job.part("clean", unit), ("offsets", "validation"))
    return int(np.diff(arrays["offsets"])[~removed & (arrays["validation"] == SPLITS.index("train"))].sum())


def training_sample(unit: int, removed: np.ndarray, share: float, job: Job) -> list[str]:
    """Texts of a unit's training documents; a share below 1 is a sample by the texts' hashes."""
    arrays, _ = read_part(job.part("clean", unit), ("text", "offsets", "validation"))
    texts = split_texts(arrays | {"removed": removed}, "train")
    return texts if share >= 1 else [text for text in texts if _in_sample(text, share, read_config(job.config).seed)]


def _in_sample(text: str, share: float, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed} {text}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64


# --- tokens ---------------------------------------------------------------------------------------------------------


def encode_unit(unit: int, removed: np.ndarray, job: Job) -> dict[str, list[int]]:
    """Write the tokens of a unit's documents, those in `removed` (bool [documents]) aside; returns totals by split.

    The cleaned text is deleted afterwards: nobody reads it again.
    """
    source, target = job.part("clean", unit), job.part("tokens", unit)
    if not target.exists():
        config, tokenizer = read_config(job.config), _tokenizer(job)
        try:
            arrays, _ = read_part(source, ("text", "offsets", "validation"))
        except FileNotFoundError:
            if target.exists():  # made just now by a worker that was given up, and the text deleted
                return read_part(target, ())[1]
            raise
        arrays["removed"] = removed
        tokens: dict[str, np.ndarray] = {}
        for split in SPLITS:
            texts = split_texts(arrays, split)
            tokens.update({f"{split}.{name}": a for name, a in _encode(texts, tokenizer, config.starts).items()})
        totals = {split: [len(tokens[f"{split}.lengths"]), len(tokens[f"{split}.tokens"])] for split in SPLITS}
        write_part(target, tokens, totals)
    source.unlink(missing_ok=True)
    return read_part(target, ())[1]


def split_texts(arrays: dict[str, np.ndarray], split: str) -> list[str]:
    """Texts of one split among a unit's cleaned documents, those marked in `removed` left out."""
    chosen = (arrays["validation"] == SPLITS.index(split)) & ~arrays["removed"]
    data, offsets = arrays["text"].tobytes(), arrays["offsets"]
    return [data[offsets[i] : offsets[i + 1]].decode() for i in np.flatnonzero(chosen)]


def _encode(texts: list[str], tokenizer: Tokenizer, with_starts: bool) -> dict[str, np.ndarray]:
    """Documents one after the other, each ended by end-of-document, with their lengths and UTF-8 sizes."""
    end = np.array([tokenizer.end_of_document], tokenizer.dtype)
    arrays: dict[str, np.ndarray] = {"text_bytes": np.array([len(text.encode()) for text in texts], np.int64)}
    if with_starts:
        pairs = tokenizer.encode_with_starts(texts)
        encoded = [ids for ids, _ in pairs]
        for name, find in (("word", starts.word_starts), ("sentence", starts.sentence_starts)):
            places = [starts.to_tokens(find(text), begins) for text, (_, begins) in zip(texts, pairs, strict=True)]
            arrays[f"{name}_starts"] = np.concatenate([np.empty(0, np.int64), *places])
            arrays[f"{name}_counts"] = np.array([len(p) for p in places], np.int64)
    else:
        encoded = tokenizer.encode_batch(texts)
    arrays["tokens"] = np.concatenate([np.empty(0, end.dtype), *(part for ids in encoded for part in (ids, end))])
    arrays["lengths"] = np.array([len(ids) + 1 for ids in encoded], np.int64)
    return arrays


# --- shards ---------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Documents [start, stop) of a unit's split."""

    unit: int
    start: int
    stop: int


def plan_shards(lengths: Iterable[tuple[int, np.ndarray]], shard_tokens: int) -> Iterator[list[Piece]]:
    """Which documents each shard holds: in input order, a shard ends with the document that fills it.

    `lengths` gives for each unit its number and the tokens of its documents.
    """
    current: list[Piece] = []
    room = shard_tokens
    for unit, sizes in lengths:
        ends = np.cumsum(sizes)
        start = 0
        while start < len(sizes):
            behind = int(ends[start - 1]) if start else 0
            stop = min(int(np.searchsorted(ends, behind + room)) + 1, len(sizes))
            current.append(Piece(unit, start, stop))
            room -= int(ends[stop - 1]) - behind
            start = stop
            if room <= 0:
                yield current
                current, room = [], shard_tokens
    if current:
        yield current


def token_lengths(unit: int, split: str, job: Job) -> np.ndarray:
    """Tokens of each document of a unit's split, int64."""
    name = f"{split}.lengths"
    return read_part(job.part("tokens", unit), (name,))[0][name]


def write_shard(split: str, number: int, pieces: list[Piece], job: Job) -> dict[str, Any]:
    """Write one shard below the work folder; returns its ShardInfo as a dict. A whole one is left as it is."""
    root = Path(job.work) / "shards"
    path = root / shard_path(split, number)
    if path.with_suffix(".idx").exists():
        return dataclasses.asdict(read_shard_info(path, root))
    tokenizer = _tokenizer(job)
    temporary = Path(job.work) / "writing" / f"{split}-{number:05d}-{uuid.uuid4().hex}.tar"
    with ShardWriter(path, tokenizer.dtype, tokenizer.sha256, root=root, temporary=temporary) as writer:
        for piece in pieces:
            _add_piece(writer, split, piece, job)
        info: ShardInfo = writer.close()
    return dataclasses.asdict(info)


def _add_piece(writer: ShardWriter, split: str, piece: Piece, job: Job) -> None:
    arrays, _ = read_part(job.part("tokens", piece.unit))
    arrays = {name.removeprefix(f"{split}."): a for name, a in arrays.items() if name.startswith(f"{split}.")}
    ends = np.cumsum(arrays["lengths"])
    sizes = {name: np.cumsum(arrays[f"{name}_counts"]) for name in ("word", "sentence") if f"{name}_counts" in arrays}
    for document in range(piece.start, piece.stop):
        tokens = arrays["tokens"][ends[document] - arrays["lengths"][document] : ends[document]]
        marks = {
            f"{name}_starts": arrays[f"{name}_starts"][size[document - 1] if document else 0 : size[document]]
            for name, size in sizes.items()
        }
        writer.add(tokens, int(arrays["text_bytes"][document]), **marks)


# --- files of a unit ------------------------------------------------------------------------------------------------


def write_part(path: Path, arrays: dict[str, np.ndarray], facts: Any) -> None:
    """A unit's arrays and facts as one safetensors file, whole or not at all.

    Under a name of its own until it is whole: a worker that was given up may still be writing the same file.
    """
    from safetensors.numpy import save

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    write_atomic(path, save(arrays, metadata={"facts": json.dumps(facts)}), temporary)


def read_part(path: Path, names: tuple[str, ...] | None = None) -> tuple[dict[str, np.ndarray], Any]:
    """Arrays (all, or those named and present) and facts of a unit's file."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        present = file.keys()
        wanted = present if names is None else [name for name in names if name in present]
        return {name: file.get_tensor(name) for name in wanted}, json.loads(file.metadata()["facts"])


@lru_cache(2)
def read_config(text: str) -> PrepareConfig:
    """The config that a Job carries."""
    return PrepareConfig.model_validate_json(text)


@lru_cache(2)
def _filters(job: Job) -> Filters:
    return Filters(read_config(job.config).filters, load_contamination(Path(job.work) / "contamination.npy"))


@lru_cache(2)
def _tokenizer(job: Job) -> Tokenizer:
    return load_tokenizer(Path(job.work))


def load_tokenizer(work: Path) -> Tokenizer:
    """The tokenizer of this preparation, as the work folder keeps it."""
    facts = json.loads((work / "tokenizer.facts").read_text("utf-8"))
    return Tokenizer.load(work / facts["file"], end_of_document=facts["end_of_document"])
